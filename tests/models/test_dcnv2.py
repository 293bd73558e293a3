"""DCN-V2, both variants, against their formulas in fp64: cross layers of every kind, parallel and stacked."""

import pytest
import torch

from ctr_models import DCNv2

TOLERANCE = {"rtol": 0.0, "atol": 1e-10}
SMALL = {"num_embeddings": 100, "dim": 4, "mlp_dims": (16, 8), "embedding_std": 1.0, "kernels": "eager"}


def cross(layer, x0: torch.Tensor, x: torch.Tensor, *, rank: int | None, num_experts: int, inner: bool) -> torch.Tensor:
    """One cross layer for one row x [width], expert by expert."""
    if rank is None:
        return x0 * (layer.linear.weight @ x + layer.linear.bias) + x
    u = layer.u.weight.reshape(num_experts, rank, -1)  # [K, rank, width]
    v = layer.v.weight.reshape(-1, num_experts, rank).transpose(0, 1)  # [K, width, rank]
    gates = [1.0]
    if num_experts > 1:
        scores = [float(torch.exp(layer.gate.weight[i] @ x + layer.gate.bias[i])) for i in range(num_experts)]
        gates = [score / sum(scores) for score in scores]
    out = x
    for i in range(num_experts):
        hidden = u[i] @ x
        if inner:
            hidden = torch.tanh(layer.inner[i].weight @ torch.tanh(hidden))
        out = out + gates[i] * (x0 * (v[i] @ hidden + layer.v.bias))
    return out


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize(
    ("variant", "rank", "num_experts"),
    [("study", 32, 1), ("study", 6, 4), ("paper", None, 1), ("paper", 6, 1), ("paper", 6, 4)],
)
def test_equals_its_formulas(make_batch, structure, variant, rank, num_experts):
    model = DCNv2(variant=variant, rank=rank, num_experts=num_experts, structure=structure, **SMALL).double().eval()
    dense, sparse = make_batch(5, high=100, dtype=torch.float64)
    inner = variant == "paper" and num_experts > 1
    expected = []
    with torch.no_grad():
        for row in range(5):
            embedded = [model.embedding.table.weight[i] for i in sparse[row]]
            x0 = torch.cat([dense[row], *embedded])
            assert x0.shape == (13 + 26 * 4,)
            x = x0
            assert len(model.cross) == 3
            for layer in model.cross:
                x = cross(layer, x0, x, rank=rank, num_experts=num_experts, inner=inner)
            hidden = x if structure == "stacked" else x0
            for linear in (model.mlp[0], model.mlp[3]):
                hidden = (linear.weight @ hidden + linear.bias).clamp_min(0.0)
            features = hidden if structure == "stacked" else torch.cat([x, hidden])
            expected.append(model.head.weight[0] @ features + model.head.bias[0])
        torch.testing.assert_close(model(dense, sparse), torch.stack(expected), **TOLERANCE)


def test_batch_norm_in_the_mlp_equals_its_formula(make_batch):
    model = DCNv2(norm="batch", structure="stacked", num_layers=1, dropout=0.0, **SMALL).double()
    dense, sparse = make_batch(6, high=100, dtype=torch.float64)
    with torch.no_grad():
        x0 = torch.cat([dense, model.embedding(sparse).flatten(1)], dim=1)
        hidden = model.cross[0](x0, x0)
        for i in (0, 4):
            linear, norm = model.mlp[i], model.mlp[i + 1]
            z = hidden @ linear.weight.T + linear.bias
            z = (z - z.mean(dim=0)) / torch.sqrt(z.var(dim=0, unbiased=False) + norm.eps)
            hidden = (z * norm.weight + norm.bias).clamp_min(0.0)
        expected = (hidden @ model.head.weight.T + model.head.bias).squeeze(1)
        torch.testing.assert_close(model(dense, sparse), expected, **TOLERANCE)


def test_numeric_tokens_are_embedded_before_the_concatenation(make_batch):
    model = DCNv2(numeric="affine", **SMALL).double().eval()
    dense, sparse = make_batch(3, high=100, dtype=torch.float64)
    tokenizer = model.tokenizer
    with torch.no_grad():
        numeric = [dense[:, j, None] * tokenizer.dense_weight[j] + tokenizer.dense_bias[j] for j in range(13)]
        fields = [tokenizer.embedding.table.weight[sparse[:, j]] for j in range(26)]
        x0 = torch.cat([*numeric, *fields], dim=1)
        assert x0.shape == (3, 39 * 4)
        x = x0
        for layer in model.cross:
            x = layer(x0, x)
        expected = model.head(torch.cat([x, model.mlp(x0)], dim=1))
        torch.testing.assert_close(model(dense, sparse), expected, **TOLERANCE)


def test_defaults_of_the_variants():
    study, paper = DCNv2(num_embeddings=100), DCNv2(num_embeddings=100, variant="paper")
    assert study.cross[0].u.weight.shape == (32, 429)
    assert paper.cross[0].linear.weight.shape == (429, 429)
    assert [m.out_features for m in study.mlp if isinstance(m, torch.nn.Linear)] == [256, 128, 64]
    assert study.head.in_features == 429 + 64


def test_bad_settings_are_quoted():
    for settings, message in [
        ({"structure": "serial"}, "structure='serial'"),
        ({"norm": "layer"}, "norm='layer'"),
        ({"variant": "paper", "num_experts": 4}, "num_experts=4: experts are low-rank; give a rank"),
        ({"rank": 0}, "rank=0"),
        ({"mlp_dims": ()}, r"mlp_dims=\(\)"),
        ({"mlp_dims": (64, 0)}, r"mlp_dims\[1\]=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            DCNv2(num_embeddings=100, **settings)
