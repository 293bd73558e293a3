"""Arguments of the attention: a scale with a gradient, sizes that nothing divides, dtypes that give wrong products."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from ctr_kernels import TransformerLayer, field_attention
from ctr_kernels.attention import field_attention_packed
from ctr_kernels.attention.operator import supports
from ctr_kernels.attention.reference import field_attention_reference


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "eager"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_scale_that_is_a_parameter_is_learned(shape: tuple[int, ...], kernels: str, packed: bool) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 48, requires_grad=True)
    results = []
    for of in ("found", "expected"):
        scale = nn.Parameter(torch.full(shape, 0.3))
        parts = qkv.chunk(3, dim=-1)
        if of == "expected":
            out = field_attention_reference(*parts, 2, scale.reshape(()), 0.0, None)
        elif packed:
            out = field_attention_packed(qkv, num_heads=2, scale=scale, kernels=kernels)
        else:
            out = field_attention(*parts, num_heads=2, scale=scale, kernels=kernels)
        results.append([out, *torch.autograd.grad(out.square().sum(), [qkv, scale])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_scale_of_another_dtype_leaves_that_of_the_tokens() -> None:
    q = torch.randn(2, 5, 16)
    for dtype in (torch.bfloat16, torch.float64):
        for scale in (torch.tensor(0.3), torch.tensor([0.3], dtype=torch.float64)):
            q = q.to(dtype)
            assert field_attention(q, q, q, num_heads=2, scale=scale).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        out = field_attention(q.float(), q.float(), q.float(), num_heads=2, scale=nn.Parameter(torch.tensor(0.3)))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_scales_that_are_no_number_are_named(kernels: str) -> None:
    q = torch.randn(2, 5, 16)
    for function in (lambda scale: field_attention(q, q, q, num_heads=2, scale=scale, kernels=kernels),
                     lambda scale: field_attention_packed(q.repeat(1, 1, 3), num_heads=2, scale=scale,
                                                          kernels=kernels)):
        with pytest.raises(ValueError, match=r"scale has shape \(2,\); one element is needed"):
            function(torch.ones(2))
        for scale in (torch.tensor(2), torch.tensor(True), torch.tensor(1j)):
            with pytest.raises(TypeError, match=f"scale has dtype {scale.dtype}; floating point is needed"):
                function(scale)


@pytest.mark.parametrize(("fields", "dim", "heads", "reason"), [
    (5, 64, 0, "D=64 is not divisible into num_heads=0"), (5, 64, -4, "not divisible into num_heads=-4"),
    (5, 80, 9, "D=80 is not divisible into num_heads=9"), (0, 64, 4, "F=0 fields; F from 1 to 128"),
    (129, 64, 4, "F=129 fields; F from 1 to 128")])
def test_limits_know_what_no_kernel_divides(fields: int, dim: int, heads: int, reason: str) -> None:
    for kernels in ("native", "triton"):
        assert reason in (supports(kernels, fields, fields, dim, heads) or "")


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_layers_that_nothing_computes_are_refused_when_they_are_made(kernels: str) -> None:
    for dim, heads in ((64, 0), (80, 9), (64, -4), (64, 5)):
        with pytest.raises(ValueError, match=f"dim={dim} is not divisible into num_heads={heads}"):
            TransformerLayer(dim, heads, 256, kernels=kernels)
    for dropout in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"dropout={dropout} is outside"):
            TransformerLayer(64, 4, 256, dropout=dropout, kernels=kernels)
    layer = TransformerLayer(64, 4, 256, kernels=kernels)
    with pytest.raises(ValueError, match="F=0 fields; at least 1 is needed"):
        layer(torch.zeros(2, 0, 64))
    for heads in (0, 9):
        layer.num_heads = heads
        assert "children are called" in repr(layer)
        with pytest.raises(ValueError, match=f"D=64 is not divisible into num_heads={heads}"):
            layer(torch.zeros(2, 3, 64))


INTERPRETER = """
import pytest, torch
from ctr_kernels import TransformerLayer, ffn, field_attention, low_rank_cross
from ctr_kernels.attention import field_attention_packed
torch.manual_seed(0)
shapes = {"ffn": [(3, 16), (8, 16), (8,), (16, 8), (16,)], "cross": [(3, 16), (3, 16), (4, 16), (16, 4), (16,)]}
def draw(name): return [torch.randn(s) for s in shapes[name]]
q = torch.randn(1, 3, 16)
calls = [lambda t: field_attention(t(q), t(q), t(q), num_heads=2, kernels="triton"),
         lambda t: field_attention_packed(t(q.repeat(1, 1, 3)), num_heads=2, kernels="triton"),
         lambda t: ffn(*map(t, draw("ffn")), kernels="triton"),
         lambda t: low_rank_cross(*map(t, draw("cross")), kernels="triton"),
         lambda t: TransformerLayer(16, 2, 8, kernels="triton").to(t(q).dtype)(t(q))]
for call in calls:
    with pytest.raises(TypeError, match="kernels='triton' takes torch.float32 and torch.float16, not torch.bfloat16"):
        call(torch.Tensor.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="not torch.bfloat16"):
            call(lambda tensor: tensor)
    assert torch.isfinite(call(lambda tensor: tensor)).all()
x = q.clone().requires_grad_()
scale = torch.nn.Parameter(torch.tensor(0.3))
grads = [torch.autograd.grad(field_attention(x, x, x, num_heads=2, scale=scale, kernels=kernels).square().sum(),
                             [x, scale]) for kernels in ("triton", "eager")]
for found, expected in zip(*grads): torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
with pytest.raises(ValueError, match="F=0 fields"):
    TransformerLayer(16, 2, 8, kernels="triton")(q[:, :0])
"""


def test_the_interpreter_of_triton_refuses_products_of_bf16() -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", INTERPRETER], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
