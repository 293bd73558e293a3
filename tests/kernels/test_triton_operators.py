"""The Triton operators as PyTorch sees them: opcheck, torch.compile, autocast, double backward, in the interpreter."""

import pytest
import torch
from torch.library import opcheck
from triton_interpreter import interpreted, outside, run_in_the_interpreter

from ctr_kernels import TransformerLayer, ffn, field_attention

pytest.importorskip("triton")
OPS = torch.ops.ctr
SEED = torch.tensor([4])


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 18)


def draw(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, requires_grad=grad)


def weights(grad: bool = True) -> list[torch.Tensor]:
    return [draw(*shape, grad=grad) for shape in [(16, 32), (16,), (32, 16), (32,)]]


@interpreted
def test_opcheck_of_attention() -> None:
    q, k, v = draw(2, 3, 32), draw(2, 5, 32), draw(2, 5, 32)
    opcheck(OPS.field_attention, (q, k, v, 2, 0.25, 0.1, SEED))
    grad = draw(2, 5, 32, grad=False)
    opcheck(OPS.field_attention_backward, (grad[:, :3], *(t.detach() for t in (q, k, v)), 2, 0.25, 0.1, SEED))
    opcheck(OPS.field_attention_packed, (draw(2, 5, 96), 2, 0.25, 0.0, None))
    opcheck(OPS.field_attention_packed_backward, (grad, draw(2, 5, 96, grad=False), 2, 0.25, 0.1, SEED))


@interpreted
@pytest.mark.parametrize("activation", [0, 3])
@pytest.mark.parametrize("norm", [0, 1, 2])
def test_opcheck_of_the_ffn(norm: int, activation: int) -> None:
    tensors = [draw(*shape) for shape in [(7, 20), (18 if activation == 3 else 9, 20), (18 if activation == 3 else 9,),
                                          (20, 9), (20,)]]
    affine = [draw(20), draw(20)] if norm else [None, None]
    settings = (norm, 1e-5, activation, 0.1, SEED)
    opcheck(OPS.ffn, (*tensors, *affine, *settings))
    y, z = OPS.ffn(*tensors, *affine, *settings)
    x, *weights, _ = tensors
    detached = [None if t is None else t.detach() for t in (y, x, z if norm == 2 else None, *weights, *affine)]
    opcheck(OPS.ffn_backward, (*detached, *settings))


@interpreted
@pytest.mark.parametrize("norm", [0, 1, 2])
@pytest.mark.parametrize("queries", [0, 2])
def test_opcheck_of_the_attention_half(norm: int, queries: int) -> None:
    """Tokens of 24 and three heads of 10 columns; the outputs that backward keeps have no gradient."""
    tensors = [draw(*shape) for shape in [(2, 5, 24), (90, 24), (90,), (24, 30), (24,)]]
    affine = [draw(24), draw(24)] if norm else [None, None]
    settings = (norm, 1e-5, 3, queries, 0.25, 0.1, SEED)
    opcheck(OPS.attention_block, (*tensors, *affine, *settings))
    y, *kept = OPS.attention_block(*tensors, *affine, *settings)
    detached = [None if t is None else t.detach() for t in (y, tensors[0], *kept, tensors[1], tensors[3], *affine)]
    opcheck(OPS.attention_block_backward, (*detached, *settings))


@interpreted
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_layer_compiles_without_graph_breaks(norm: str) -> None:
    torch.manual_seed(0)
    layer = TransformerLayer(32, 2, 64, norm=norm, kernels="triton")
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = torch.ones(2, 5, 32, requires_grad=True)
        out = function(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


@interpreted
def test_autocast_takes_mixed_dtypes() -> None:
    torch.manual_seed(1)
    x, w = draw(2, 5, 32), weights()
    with torch.autocast("cpu", torch.float16):
        out = ffn(x, *w, kernels="triton")
        attended = field_attention(out, x, x, num_heads=2, kernels="triton")
    assert out.dtype == attended.dtype == torch.float16
    grads = torch.autograd.grad(attended.float().sum(), [x, *w])
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)


@interpreted
@pytest.mark.parametrize("operation", ["attention", "ffn"])
def test_a_second_derivative_is_refused(operation: str) -> None:
    x = draw(2, 5, 32)
    out = (field_attention(x, x, x, num_heads=2, kernels="triton") if operation == "attention"
           else ffn(x, *weights(False), kernels="triton"))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward needs kernels='eager'"):
        grad.sum().backward()
