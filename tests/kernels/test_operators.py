"""The native operators as PyTorch sees them: opcheck, torch.compile, autocast, torch.func, double backward."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.library import opcheck

from ctr_kernels import BackendUnavailable, EmbeddingTable, TransformerLayer, ffn, field_attention, low_rank_cross
from ctr_kernels.library import NATIVE_ABSENT

pytestmark = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=f"native: {NATIVE_ABSENT}")
OPS = torch.ops.ctr
SEED = torch.tensor([4])


def qkv(requires_grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(2, 5, 32, requires_grad=requires_grad) for _ in range(3)]


def weights(requires_grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=requires_grad) for shape in [(16, 32), (16,), (32, 16), (32,)]]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_opcheck_of_attention_and_ffn(dropout_p: float) -> None:
    grad, x = torch.randn(2, 5, 32), torch.randn(7, 32, requires_grad=True)
    opcheck(OPS.field_attention, (*qkv(), 2, 0.25, dropout_p, SEED))
    opcheck(OPS.field_attention_backward, (grad, *qkv(False), 2, 0.25, dropout_p, SEED))
    opcheck(OPS.field_attention_packed, (torch.randn(2, 5, 96, requires_grad=True), 2, 0.25, dropout_p, SEED))
    opcheck(OPS.field_attention_packed_backward, (grad, torch.randn(2, 5, 96), 2, 0.25, dropout_p, SEED))
    opcheck(OPS.ffn, (x, *weights(), None, None, 0, 0.0, 0, dropout_p, SEED))
    opcheck(OPS.ffn_backward, (torch.randn(7, 32), x.detach(), None, *weights(False)[:3], None, None, 0, 0.0, 0,
                               dropout_p, SEED))


@pytest.mark.parametrize("norm", [1, 0])
@pytest.mark.parametrize("queries", [0, 1])
def test_opcheck_of_the_attention_half(norm: int, queries: int) -> None:
    """Tokens of 24 and three heads of 8 and 10 columns; the outputs that backward keeps have no gradient."""
    for width in (24, 30):
        weights = [torch.randn(shape, requires_grad=True)
                   for shape in [(3 * width, 24), (3 * width,), (24, width), (24,), *[(24,)] * (2 * norm)]]
        x, affine = torch.randn(2, 5, 24, requires_grad=True), weights[4:] or [None, None]
        settings = (norm, 1e-5, 3, queries, 0.25, 0.1, SEED)
        opcheck(OPS.attention_block, (x, *weights[:4], *affine, *settings))
        y, *kept = OPS.attention_block(x, *weights[:4], *affine, *settings)
        detached = [None if t is None else t.detach() for t in (y, x, *kept, weights[0], weights[2], *affine)]
        opcheck(OPS.attention_block_backward, (*detached, *settings))


@pytest.mark.parametrize("norm", [0, 1, 3])
@pytest.mark.parametrize("activation", [0, 3])
def test_opcheck_of_the_ffn_half(norm: int, activation: int) -> None:
    rows = 14 if activation == 3 else 7
    tensors = [torch.randn(shape, requires_grad=True) for shape in [(5, 20), (rows, 20), (rows,), (20, 7), (20,)]]
    affine = [torch.randn(20, requires_grad=True) for _ in range(2)] if norm else [None, None]
    settings = (norm, 1e-5, activation, 0.1, SEED)
    opcheck(OPS.ffn, (*tensors, *affine, *settings))
    x, *weights, _ = (t.detach() for t in tensors)
    opcheck(OPS.ffn_backward, (x, x, None, *weights, *(t if t is None else t.detach() for t in affine), *settings))


def test_opcheck_of_the_cross_layer() -> None:
    shapes = [(6, 20), (6, 20), (4, 20), (20, 4), (20,)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    opcheck(OPS.low_rank_cross, inputs)
    opcheck(OPS.low_rank_cross_backward, (torch.randn(6, 20), *(t.detach() for t in inputs)))


def test_opcheck_of_lookup_and_updates() -> None:
    table, ids, rows = torch.randn(10, 4), torch.tensor([1, 2, 1]), torch.randn(3, 4)
    opcheck(OPS.embedding_lookup, (table, ids, False))
    opcheck(OPS.embedding_lookup, (table.bfloat16(), ids, True))
    def settings(rule: int) -> tuple[object, ...]:
        return (None, None, rule, 0.1, None, 0.01, 1e-8, 0.9, 0.999, torch.tensor(1), torch.tensor([5]))

    opcheck(OPS.sparse_update, (table, None, None, torch.zeros(10, dtype=torch.int32), ids, rows, *settings(0)))
    opcheck(OPS.sparse_update, (table, torch.zeros(10), None, None, ids, rows, *settings(1)))
    moments = (torch.zeros(10, 4).bfloat16(), torch.zeros(10, 4).bfloat16())
    opcheck(OPS.sparse_update, (table.bfloat16(), *moments, None, ids, rows, *settings(3)))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_layer_compiles_without_graph_breaks(norm: str) -> None:
    torch.manual_seed(0)
    layer = TransformerLayer(32, 2, 64, norm=norm, kernels="native")
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = torch.ones(3, 27, 32, requires_grad=True)
        out = function(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_a_table_works_inside_a_compiled_model() -> None:
    table = EmbeddingTable(10, 4, kernels="native")
    model = torch.compile(lambda ids: table(ids).square().sum(), backend="aot_eager")
    model(torch.tensor([3, 3])).backward()
    assert table.weight.grad.is_sparse and table.weight.grad._indices().tolist() == [[3, 3]]


@pytest.mark.parametrize("kernels", ["native", "eager"])
def test_autocast_takes_mixed_dtypes(kernels: str) -> None:
    torch.manual_seed(1)
    x, w = torch.randn(2, 5, 32, requires_grad=True), weights()
    with torch.autocast("cpu", torch.bfloat16):
        out = ffn(x, *w, kernels=kernels)
        attended = field_attention(out, x, x, num_heads=2, kernels=kernels)
    assert out.dtype == attended.dtype == torch.bfloat16
    grads = torch.autograd.grad(attended.float().sum(), [x, *w])
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("function", [
    lambda x: field_attention(x, x, x, num_heads=2, kernels="native"),
    lambda x: ffn(x, *weights(False), kernels="native"),
    lambda x: low_rank_cross(x[0], x[1], *(torch.randn(s) for s in [(4, 32), (32, 4), (32,)]), kernels="native"),
])
def test_a_second_derivative_is_refused(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(2, 5, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward needs kernels='eager'"):
        grad.sum().backward()


def test_torch_func_is_told_what_to_do() -> None:
    def loss(x: torch.Tensor, kernels: str) -> torch.Tensor:
        return field_attention(x, x, x, num_heads=2, kernels=kernels).square().sum()

    x = torch.randn(2, 5, 32)
    for transform in (torch.func.grad, torch.vmap):
        with pytest.raises(BackendUnavailable, match=r"no rules for torch\.func .* use kernels='eager'"):
            transform(partial(loss, kernels="native"))(x[None] if transform is torch.vmap else x)
    torch.testing.assert_close(torch.func.grad(loss)(x, "auto"), torch.func.grad(loss)(x, "eager"))


def test_inference_saves_nothing() -> None:
    with torch.inference_mode():
        x = torch.randn(2, 5, 32)
        assert not field_attention(x, x, x, num_heads=2, kernels="native").requires_grad
