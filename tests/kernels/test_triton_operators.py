"""The Triton operators as PyTorch sees them: opcheck, torch.compile, autocast, double backward, in the interpreter."""

import pytest
import torch
from torch.library import opcheck
from triton_interpreter import interpreted, outside, run_in_the_interpreter

from ctr_kernels import TransformerLayer, ffn, field_attention

pytest.importorskip("triton")
from ctr_kernels.attention import triton as _attention  # noqa: E402, F401
from ctr_kernels.ffn import triton as _ffn  # noqa: E402, F401

OPS = torch.ops.ctr
SEED = torch.tensor([4])


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 7)


def draw(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, requires_grad=grad)


def weights(grad: bool = True) -> list[torch.Tensor]:
    return [draw(*shape, grad=grad) for shape in [(16, 32), (16,), (32, 16), (32,)]]


@interpreted
def test_opcheck_of_attention() -> None:
    qkv = [draw(2, 5, 32) for _ in range(3)]
    opcheck(OPS.field_attention_triton, (*qkv, 2, 0.25, 0.1, SEED))
    grad, detached = draw(2, 5, 32, grad=False), [t.detach() for t in qkv]
    opcheck(OPS.field_attention_triton_backward, (grad, *detached, 2, 0.25, 0.1, SEED))
    opcheck(OPS.field_attention_packed_triton, (draw(2, 5, 96), 2, 0.25, 0.0, None))
    opcheck(OPS.field_attention_packed_triton_backward, (grad, draw(2, 5, 96, grad=False), 2, 0.25, 0.1, SEED))


@interpreted
def test_opcheck_of_the_ffn() -> None:
    opcheck(OPS.ffn_triton, (draw(7, 32), *weights(), None, None, 0, 0.0, 0, 0.1, SEED))
    opcheck(OPS.ffn_triton, (draw(7, 32), *weights(), draw(32), draw(32), 2, 1e-5, 0, 0.0, None))
    dy, x, z, norm_weight, norm_bias = (draw(*shape, grad=False) for shape in [(7, 32)] * 3 + [(32,)] * 2)
    last = (*weights(False)[:3], norm_weight, norm_bias, 2, 1e-5, 0, 0.0, None)
    opcheck(OPS.ffn_triton_grad_x, (dy, x, z, *last))
    opcheck(OPS.ffn_triton_grad_weights, (dy, x, *last))


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
