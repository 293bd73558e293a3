"""The transformer layer against its formula, the memory it keeps, and a model trained with either backend."""

import pytest
import torch
from torch.nn import functional as F

from ctr_kernels import SparseSGD, TransformerLayer
from ctr_kernels.library import NATIVE_ABSENT
from ctr_models import FTTransformer

needs_native = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=f"native: {NATIVE_ABSENT}")


def formula(layer: TransformerLayer, x: torch.Tensor, norm: str) -> torch.Tensor:
    """The layer as its docstring words it, with PyTorch's own attention."""

    def attention(x: torch.Tensor) -> torch.Tensor:
        batch, fields, dim = x.shape
        q, k, v = (t.view(batch, fields, layer.num_heads, -1).transpose(1, 2) for t in layer.qkv(x).chunk(3, dim=-1))
        return layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, fields, dim))

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        return layer.ffn_out(F.gelu(layer.ffn_in(x)))

    if norm == "pre":
        x = x + attention(layer.attention_norm(x))
        return x + feed_forward(layer.ffn_norm(x))
    x = layer.attention_norm(x + attention(x))
    return layer.ffn_norm(x + feed_forward(x))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("kernels", ["eager", "auto"])
def test_the_layer_is_its_formula(norm: str, kernels: str) -> None:
    torch.manual_seed(0)
    layer = TransformerLayer(64, 4, 256, norm=norm, dropout=0.5, kernels=kernels).eval()
    for module in (layer.attention_norm, layer.ffn_norm):
        torch.nn.init.normal_(module.weight)
        torch.nn.init.normal_(module.bias)
    x = torch.randn(3, 27, 64, requires_grad=True)
    results = []
    for out in (layer(x), formula(layer, x, norm)):
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def saved(layer: TransformerLayer, x: torch.Tensor) -> dict[int, torch.Tensor]:
    """Storages that autograd keeps for the backward of one forward, parameters left out: address -> a tensor of it."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return kept


@needs_native
def test_neither_map_nor_hidden_is_kept() -> None:
    x = torch.randn(64, 27, 64, requires_grad=True)
    storages = {kernels: saved(TransformerLayer(64, 4, 256, dropout=0.1, kernels=kernels), x)
                for kernels in ("native", "eager")}
    native, eager = (sum(t.untyped_storage().nbytes() for t in storages[k].values()) for k in ("native", "eager"))
    assert native <= eager / 2, f"{native} bytes, eager {eager}"
    for tensor in storages["native"].values():
        assert tensor.shape[-2:] not in ((27, 27), (27, 256)), tuple(tensor.shape)


@needs_native
def test_300_steps_give_the_loss_curve_of_eager() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model gains nothing from more
    curves = []
    for kernels in ("eager", "native"):
        torch.manual_seed(1)
        model = FTTransformer(num_embeddings=500, dim=16, num_heads=2, dropout=0.1, embedding_std=0.1, kernels=kernels)
        optimizers = [SparseSGD(model.embedding_parameters(), lr=1.0, kernels=kernels),
                      torch.optim.AdamW(model.dense_parameter_groups(0.01), lr=1e-3)]
        draw = torch.Generator().manual_seed(2)
        curve = []
        for _ in range(300):
            dense, sparse = torch.rand(16, 13, generator=draw), torch.randint(500, (16, 26), generator=draw)
            label = ((sparse[:, 0] + sparse[:, 1]) % 3 == 0).float()
            loss = F.binary_cross_entropy_with_logits(model(dense, sparse), label)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    torch.set_num_threads(threads)
    assert (curves[0] - curves[1]).abs().max() < 1e-4
    assert curves[0][-50:].mean() < curves[0][:10].mean()  # it does learn
