"""Numeric tokens have the values of their formulas, computed a feature at a time; history reaches its own field."""

import math

import pytest
import torch

from ctr_models import MODELS, DCNv2, FTTransformer
from ctr_models.numeric import FieldHistory, Periodic, PiecewiseLinear
from ctr_models.tokenizer import FeatureTokenizer

EDGES = [[0.0, 1.0, 3.0], [0.5, 0.75], [2.0]]


def share(x: float, low: float, high: float) -> float:
    """Of a bin that lies below x (Gorishniy et al. 2022, eq. 1), clipped at both ends."""
    return min(max((x - low) / (high - low), 0.0), 1.0)


def test_piecewise_tokens_equal_the_formula_inside_between_and_beyond_the_edges():
    module = PiecewiseLinear(EDGES, 4).double()
    for x in ([0.5, 0.6, 2.0], [2.0, 0.75, 5.0], [-7.0, 0.0, 0.0], [9.0, 9.0, 9.0], [1.0, 0.5, 2.0]):
        tokens = module(torch.tensor([x], dtype=torch.float64))
        for j, edges in enumerate(EDGES):
            expected = module.bias[j].clone()
            for t, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
                expected += share(x[j], low, high) * module.weight[j, t]
            torch.testing.assert_close(tokens[0, j], expected, rtol=0, atol=1e-6)  # the edges are kept in fp32


def test_piecewise_edges_travel_with_the_weights():
    saved, other = PiecewiseLinear(EDGES, 4), PiecewiseLinear([[0.0, 2.0, 5.0], [0.0, 1.0], [1.0]], 4)
    other.load_state_dict(saved.state_dict())
    x = torch.rand(5, 3) * 4
    assert torch.equal(other(x), saved(x))


def test_periodic_tokens_equal_the_formula():
    module = Periodic(2, 3, frequencies=2, sigma=1.0).double()
    x = [0.3, -1.7]
    tokens = module(torch.tensor([x], dtype=torch.float64))
    for j in range(2):
        expected = module.bias[j].clone()
        for i in range(2):
            angle = 2 * math.pi * module.frequency[j, i].item() * x[j]
            expected += math.sin(angle) * module.weight[j, i] + math.cos(angle) * module.weight[j, 2 + i]
        torch.testing.assert_close(tokens[0, j], expected)


def test_history_is_added_to_the_token_of_its_own_field(make_batch):
    dense, sparse = make_batch(3, num_dense=13 + 2 * 26)
    moments = torch.rand(2, 52) + 0.5
    tokenizer = FeatureTokenizer(num_embeddings=1000, dim=8, history=2, history_moments=moments.tolist())
    past = (dense[:, 13:] - moments[0]) / moments[1]
    plain = tokenizer.embedding(sparse)
    tokens = tokenizer(dense, sparse)[:, 1:]
    weight, bias = tokenizer.history.weight, tokenizer.history.bias
    for field in range(26):
        expected = (plain[:, field] + past[:, field, None] * weight[0, field]
                    + past[:, 26 + field, None] * weight[1, field] + bias[field])
        torch.testing.assert_close(tokens[:, field], expected)


def test_embedding_dropout_drops_whole_rows_in_training_only(make_batch):
    dense, sparse = make_batch(200)
    tokenizer = FeatureTokenizer(num_embeddings=1000, dim=8, embedding_dropout=0.25)
    rows = tokenizer.embedding(sparse)
    tokens = tokenizer(dense, sparse)[:, 1:]
    dropped = (tokens == 0).all(dim=-1)
    assert abs(dropped.float().mean().item() - 0.25) < 0.03  # 5200 draws: 5 standard deviations
    torch.testing.assert_close(tokens[~dropped], rows[~dropped] / 0.75)
    tokenizer.eval()
    assert torch.equal(tokenizer(dense, sparse)[:, 1:], rows)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("numeric", ["affine", "periodic", "piecewise"])
def test_every_model_learns_from_its_numbers_and_history(make_batch, name, numeric):
    edges = [[0.0, 1.0, 2.0, 4.0]] * 13
    model = MODELS[name](num_embeddings=1000, dim=32, num_layers=1, numeric=numeric, numeric_edges=edges, history=2)
    dense, sparse = make_batch(8, num_dense=13 + 2 * 26)
    dense.requires_grad_()
    model(dense, sparse).sum().backward()
    assert (dense.grad.abs().sum(dim=0) > 0).all()
    groups = model.dense_parameter_groups(0.1)
    held = {id(p) for group in groups for p in group["params"]} | {id(p) for p in model.embedding_parameters()}
    assert held == {id(p) for p in model.parameters()}


def test_bad_settings_are_quoted():
    with pytest.raises(ValueError, match=r"numeric_edges\[1\]=\[1.0, 1.0\] do not increase"):
        PiecewiseLinear([[0.0, 1.0], [1.0, 1.0]], 4)
    with pytest.raises(ValueError, match="numeric_edges has 2 lists; dense='piecewise' needs one for each of 13"):
        FTTransformer(num_embeddings=100, numeric="piecewise", numeric_edges=[[0.0, 1.0]] * 2)
    with pytest.raises(ValueError, match="history=-1 is negative"):
        FTTransformer(num_embeddings=100, history=-1)
    with pytest.raises(ValueError, match=r"history_moments has lists of \[3\] numbers; 2 lists of 52"):
        FTTransformer(num_embeddings=100, history=2, history_moments=[[0.0] * 3])
    with pytest.raises(ValueError, match="embedding_dropout=1.0 is outside"):
        FTTransformer(num_embeddings=100, embedding_dropout=1.0)
    with pytest.raises(ValueError, match="embedding_dropout=0.1 needs tokens"):
        DCNv2(num_embeddings=100, embedding_dropout=0.1)
    assert FieldHistory(1, 3, 8)(torch.zeros(0, 3)).shape == (0, 3, 8)
