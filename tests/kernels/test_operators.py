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
    opcheck(OPS.ffn, (x, *weights(), 0, dropout_p, SEED))
    opcheck(OPS.ffn_backward, (torch.randn(7, 32), x.detach(), *weights(False), 0, dropout_p, SEED))


@pytest.mark.parametrize("norm", [True, False])
def test_opcheck_of_the_halves_of_a_layer(norm: bool) -> None:
    def weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.randn(shape, requires_grad=True) for shape in shapes]

    (x,), gamma = weights((2, 5, 32)), weights((32,), (32,)) if norm else [None, None]
    w_qkv, b_qkv, w_out, b_out = weights((96, 32), (96,), (32, 32), (32,))
    opcheck(OPS.attention_block, (x, *gamma, 1e-5, w_qkv, b_qkv, w_out, b_out, 2, 0.25, 0.1, SEED))
    tensors = [t if t is None else t.detach() for t in (x, x, torch.randn(2, 5, 96), x, *gamma)]
    opcheck(OPS.attention_block_backward, (*tensors, 1e-5, w_qkv.detach(), w_out.detach(), 2, 0.25, 0.1, SEED))
    inputs = [*weights((7, 32), (32,), (32,)), 1e-5, norm, *weights((16, 32), (16,), (32, 16), (32,))]
    opcheck(OPS.ffn_block, (*inputs, 0, 0.1, SEED))
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    opcheck(OPS.ffn_block_backward, (torch.randn(7, 32), *detached, 0, 0.1, SEED))


def test_opcheck_of_the_cross_layer() -> None:
    shapes = [(6, 20), (6, 20), (4, 20), (20, 4), (20,)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    opcheck(OPS.low_rank_cross, inputs)
    opcheck(OPS.low_rank_cross_backward, (torch.randn(6, 20), *(t.detach() for t in inputs)))


def test_opcheck_of_lookup_and_updates() -> None:
    table, ids, rows = torch.randn(10, 4), torch.tensor([1, 2, 1]), torch.randn(3, 4)
    opcheck(OPS.embedding_lookup, (table, ids, False))
    opcheck(OPS.embedding_lookup, (table.bfloat16(), ids, True))
    hyperparameters = (0.1, 0.01, 1e-8, 0.9, 0.999, 1, 5)
    opcheck(OPS.sparse_update, (table, None, None, torch.zeros(10, dtype=torch.int32), ids, rows, 0, *hyperparameters))
    opcheck(OPS.sparse_update, (table, torch.zeros(10), None, None, ids, rows, 1, *hyperparameters))
    moments = (torch.zeros(10, 4).bfloat16(), torch.zeros(10, 4).bfloat16())
    opcheck(OPS.sparse_update, (table.bfloat16(), *moments, None, ids, rows, 3, *hyperparameters))


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
