"""The halves of a transformer layer in Triton: parity and memory traffic in Triton's interpreter."""

import pytest
import torch
from parity import SEED, check
from plain_layer import Doubled
from torch import nn
from torch.nn import functional as F
from triton_interpreter import interpreted, outside, run_in_the_interpreter
from triton_traffic import counting, times

from ctr_kernels import TransformerLayer
from ctr_kernels.attention.reference import field_attention_reference
from ctr_kernels.ffn.reference import ffn_reference

pytest.importorskip("triton")
from ctr_kernels.ffn import triton as ffn_kernels  # noqa: E402
from ctr_kernels.layer import triton as kernels  # noqa: E402
from ctr_kernels.triton_norm import NORMS  # noqa: E402

DTYPES = [torch.float32, torch.float16]
OPS = torch.ops.ctr
EPS = 1e-5


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 29)


def draw(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Normal tensors, matrices of weights scaled so that outputs are about 1."""
    return [(torch.randn(s) / (s[-1] ** 0.5 if len(s) == 2 else 1.0)).to(dtype) for s in shapes]


def block(norm: str, x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, inner) -> torch.Tensor:
    """x + inner(LN(x)) or LN(x + inner(x))."""
    affine = (x.shape[-1:], norm_weight, norm_bias, EPS)
    return x + inner(F.layer_norm(x, *affine)) if norm == "pre" else F.layer_norm(x + inner(x), *affine)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_half_of_the_ffn(norm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for tokens, dim, hidden, p in [(0, 64, 256, 0.0), (1, 64, 128, 0.3), (70, 64, 72, 0.0), (33, 20, 40, 0.3)]:
        x, norm_weight, norm_bias, *weights = draw(dtype, (tokens, dim), (dim,), (dim,), (hidden, dim), (hidden,),
                                                   (dim, hidden), (dim,))

        def fused(x, norm_weight, norm_bias, *weights, p=p):
            return OPS.ffn_triton(x, *weights, norm_weight, norm_bias, NORMS[norm], EPS, 0, p, torch.tensor([SEED]))[0]

        def formula(x, norm_weight, norm_bias, *weights, p=p):
            return block(norm, x, norm_weight, norm_bias,
                         lambda t: ffn_reference(t, *weights, "gelu", p, torch.tensor([SEED])))

        check(fused, formula, [x * 8, norm_weight, norm_bias, *weights], torch.randn(tokens, dim).to(dtype))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_half_of_the_attention(norm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for batch, fields, dim, heads, p in [(0, 27, 64, 4, 0.0), (3, 27, 64, 4, 0.0), (1, 1, 16, 2, 0.0),
                                         (2, 40, 24, 3, 0.3), (4, 9, 48, 3, 0.3)]:
        inputs = draw(dtype, (batch, fields, dim), (dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,))

        def fused(*tensors, heads=heads, p=p):
            return OPS.attention_block_triton(*tensors, NORMS[norm], EPS, heads, p, torch.tensor([SEED]))[0]

        def formula(x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, dim=dim, heads=heads, p=p):
            def attention(t):
                q, k, v = F.linear(t, qkv_weight, qkv_bias).chunk(3, dim=-1)
                scale = (dim // heads) ** -0.5
                attended = field_attention_reference(q, k, v, heads, scale, p, torch.tensor([SEED]))
                return F.linear(attended, out_weight, out_bias)
            return block(norm, x, norm_weight, norm_bias, attention)

        check(fused, formula, inputs, torch.randn(batch, fields, dim).to(dtype))


@interpreted
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_layer_wider_than_the_fused_halves_is_composed(norm: str) -> None:
    layers = [TransformerLayer(128, 2, 8, norm=norm, kernels=kernels) for kernels in ("triton", "eager")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.linspace(-2, 2, 2 * 3 * 128).view(2, 3, 128)
    torch.testing.assert_close(layers[0](x), layers[1](x), rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_layer_has_the_result_of_its_composition(norm: str) -> None:
    torch.manual_seed(2)
    layers = [TransformerLayer(32, 2, 64, norm=norm, kernels=kernels) for kernels in ("triton", "eager")]
    layers[1].load_state_dict(layers[0].state_dict())
    results = []
    for layer in layers:
        x = torch.linspace(-2, 2, 3 * 5 * 32).view(5, 3, 32).transpose(0, 1).requires_grad_()
        out = layer(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.float16):
        mixed = layers[0](x)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, results[1][0], rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="F=65 fields"):
        layers[0](torch.zeros(1, 65, 32))
    with pytest.raises(TypeError, match="the layer's weight has dtype torch.float32, x has torch.float16"):
        layers[0](torch.zeros(1, 2, 32, dtype=torch.float16))


CHANGED = {
    "attention_norm": lambda layer: setattr(layer, "attention_norm", nn.LayerNorm(32, elementwise_affine=False)),
    "qkv": lambda layer: layer.qkv.register_forward_hook(lambda _, __, out: out * 2.0),
    "out": lambda layer: setattr(layer, "out", nn.Linear(32, 32, bias=False)),
    "ffn_norm": lambda layer: setattr(layer, "ffn_norm", nn.RMSNorm(32)),
    "ffn_in": lambda layer: setattr(layer, "ffn_in", Doubled(32, 64)),
    "ffn_out": lambda layer: layer.ffn_out.register_full_backward_pre_hook(lambda _, grads: (grads[0] * 3.0,)),
}


@interpreted
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("name", CHANGED)
def test_changed_children_are_called_and_the_other_half_is_fused(name: str, norm: str,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    results, calls = [], []
    for function in ("fused_attention", "fused_ffn"):
        run = getattr(kernels, function)
        monkeypatch.setattr(kernels, function, lambda *of, _f=run, _n=function: (calls.append(_n), _f(*of))[1])
    for backend in ("triton", "eager"):
        torch.manual_seed(5)
        layer = TransformerLayer(32, 2, 64, norm=norm, dropout=0.3, kernels=backend)
        CHANGED[name](layer)
        x = torch.randn(2, 3, 32, requires_grad=True)
        out = layer(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    attention_half = name in ("attention_norm", "qkv", "out")
    assert calls == ["fused_ffn" if attention_half else "fused_attention"]


@interpreted
def test_a_compiled_layer_finds_its_backend() -> None:
    layer, x = TransformerLayer(32, 2, 64, kernels="triton"), torch.randn(1, 3, 32)
    assert repr(layer).count("fused (triton)") == 2
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    wide = TransformerLayer(128, 2, 64, kernels="triton")
    assert repr(wide).count("children are called: D=128; the fused half takes up to 64") == 2


@interpreted
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_traffic_of_the_ffn_is_that_of_the_model(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    x, dy, norm_weight, norm_bias, w1, b1, w2, b2 = draw(
        torch.float32, (70, 64), (70, 64), (64,), (64,), (72, 64), (72,), (64, 72), (64,))
    settings = (norm_weight, norm_bias, NORMS[norm], EPS, 0, 0.0, None)
    accesses = counting(monkeypatch)
    y, z = ffn_kernels._forward(x, w1, b1, w2, b2, *settings)
    assert times(accesses["load"], x) == {2} and times(accesses["store"], y) == {1}  # the second from the cache
    assert accesses["store"].total() == y.numel() + z.numel()
    accesses = counting(monkeypatch)
    post = norm == "post"
    dx, dz, _ = ffn_kernels._grad_tokens(dy, x, z if post else None, w1, b1, w2, *settings)
    assert times(accesses["load"], x) == times(accesses["load"], dy) == {1 if post else 2}
    if post:
        assert times(accesses["load"], z) == times(accesses["load"], dz) == times(accesses["store"], dz) == {1}
    tiles = -(-70 // ffn_kernels.tiles_for(64, torch.float32, 0)[0].token.tokens)
    assert accesses["store"].total() == dx.numel() + dz.numel() + tiles * 2 * 64


@interpreted
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_traffic_of_the_attention_is_that_of_the_model(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In elements of memory: each tensor as often as the docstring counts it."""
    torch.manual_seed(4)
    batch, fields, dim, post = 3, 27, 64, norm == "post"
    x, dy, *rest = draw(torch.float32, (batch, fields, dim), (batch, fields, dim), (dim,), (dim,), (3 * dim, dim),
                        (3 * dim,), (dim, dim), (dim,))
    settings = (NORMS[norm], EPS, 4, 0.0, None)
    accesses = counting(monkeypatch)
    y, qkv, heads, z = kernels._forward(x, *rest, *settings)
    assert times(accesses["load"], x) == {2} and times(accesses["load"], qkv) == times(accesses["load"], heads) == {1}
    assert accesses["store"].total() == x.numel() * (6 if post else 5)

    accesses = counting(monkeypatch)
    norm_weight, norm_bias, qkv_weight, _, out_weight, _ = rest
    kernels._backward(dy, x, qkv, heads, z, norm_weight, norm_bias, qkv_weight, out_weight, *settings)
    slices = [-(-n // kernels.TILES[kernels._table_key(torch.float32, 0)][2].outputs) for n in (3 * dim, dim)]
    assert times(accesses["load"], x) == {slices[0] + (not post)}
    assert times(accesses["load"], heads) == {slices[1]} and times(accesses["load"], qkv) == {1}
    assert times(accesses["load"], dy) == {1 if post else 2 + slices[1]}
    if post:
        assert times(accesses["load"], z) == {1}
