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
from ctr_kernels.ffn.reference import ffn_reference
from ctr_kernels.layer.operator import attention_half
from ctr_kernels.layer.reference import attention_half_reference

pytest.importorskip("triton")
from ctr_kernels import layer as layers  # noqa: E402
from ctr_kernels.ffn import triton as ffn_kernels  # noqa: E402
from ctr_kernels.layer import triton as kernels  # noqa: E402
from ctr_kernels.triton_norm import NORMS  # noqa: E402

DTYPES = [torch.float32, torch.float16]
OPS = torch.ops.ctr
EPS = 1e-5


@outside
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 33)


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
            return OPS.ffn(x, *weights, norm_weight, norm_bias, NORMS[norm], EPS, 0, p, torch.tensor([SEED]))[0]

        def formula(x, norm_weight, norm_bias, *weights, p=p):
            return block(norm, x, norm_weight, norm_bias,
                         lambda t: ffn_reference(t, *weights, "gelu", p, torch.tensor([SEED])))

        check(fused, formula, [x * 8, norm_weight, norm_bias, *weights], torch.randn(tokens, dim).to(dtype))


# (B, F, D, H, d, queries, dropout): heads of D columns together or not, all queries or the first ones alone.
HALVES = [(0, 27, 64, 4, 16, 0, 0.0), (3, 27, 64, 4, 16, 0, 0.0), (1, 1, 16, 2, 8, 0, 0.0), (2, 40, 24, 3, 8, 0, 0.3),
          (4, 9, 48, 3, 16, 0, 0.3), (3, 9, 64, 4, 16, 1, 0.0), (2, 11, 24, 3, 10, 4, 0.3), (2, 6, 192, 2, 40, 1, 0.3),
          (1, 5, 100, 4, 40, 0, 0.0), (0, 5, 16, 2, 8, 1, 0.0)]


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [None, "pre", "post"])
def test_the_half_of_the_attention(norm: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for batch, fields, dim, heads, head_dim, queries, p in HALVES:
        width = heads * head_dim
        inputs = draw(dtype, (batch, fields, dim), (3 * width, dim), (3 * width,), (dim, width), (dim,),
                      *[(dim,)] * (2 if norm else 0))

        def half(function, heads=heads, head_dim=head_dim, queries=queries, p=p):
            def run(x, w_qkv, b_qkv, w_out, b_out, *affine):
                weight, bias = affine or (None, None)
                return function(x, w_qkv, b_qkv, w_out, b_out, heads, head_dim**-0.5, p, torch.tensor([SEED]),
                                norm=norm, norm_weight=weight, norm_bias=bias, eps=EPS, queries=queries)
            return run

        check(half(attention_half), half(attention_half_reference), inputs,
              torch.randn(batch, queries or fields, dim).to(dtype))


@interpreted
def test_gradients_share_no_memory() -> None:
    x, w_qkv, b_qkv, w_out, b_out = draw(torch.float32, (2, 5, 16), (48, 16), (48,), (16, 16), (16,))
    for queries in (0, 1):
        settings = (None, None, 0, 0.0, 2, queries, 0.25, 0.0, None)
        y, *kept = OPS.attention_block(x, w_qkv, b_qkv, w_out, b_out, *settings)
        grads = OPS.attention_block_backward(y.cos(), x, *kept, w_qkv, w_out, *settings)[:5]
        assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 5


@interpreted
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_layer_wider_than_the_fused_halves_is_composed(norm: str) -> None:
    layers = [TransformerLayer(64, 5, 8, head_dim=64, norm=norm, kernels=kernels) for kernels in ("triton", "eager")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.linspace(-2, 2, 2 * 3 * 64).view(2, 3, 64)
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
    with pytest.raises(ValueError, match="F=129 fields"):
        layers[0](torch.zeros(1, 129, 32))
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
        run = getattr(layers, function)
        monkeypatch.setattr(layers, function, lambda *of, _f=run, _n=function: (calls.append(_n), _f(*of))[1])
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
    wide = TransformerLayer(264, 4, 64, kernels="triton")
    assert "attention: children are called: D=264; the fused half takes up to 256" in repr(wide)


@interpreted
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_traffic_of_the_ffn_is_that_of_the_model(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    x, dy, norm_weight, norm_bias, w1, b1, w2, b2 = draw(
        torch.float32, (70, 64), (70, 64), (64,), (64,), (72, 64), (72,), (64, 72), (64,))
    settings = (NORMS[norm], EPS, 0, 0.0)
    accesses = counting(monkeypatch)
    y, z = ffn_kernels.forward(x, w1, b1, w2, b2, norm_weight, norm_bias, *settings, None)
    assert times(accesses["load"], x) == {2} and times(accesses["store"], y) == {1}  # the second from the cache
    assert accesses["store"].total() == y.numel() + z.numel()
    accesses = counting(monkeypatch)
    post = norm == "post"
    weights = (w1, b1, w2, norm_weight, norm_bias)
    dx, dz, _ = ffn_kernels.grad_tokens(dy, x, z if post else None, weights, settings, None)
    assert times(accesses["load"], x) == times(accesses["load"], dy) == {1 if post else 2}
    if post:
        assert times(accesses["load"], z) == times(accesses["load"], dz) == times(accesses["store"], dz) == {1}
    key = ffn_kernels.launch_key("token", 64, 72, NORMS[norm], False, torch.float32, 0)
    tiles = -(-70 // ffn_kernels.default(key).tokens)
    assert accesses["store"].total() == dx.numel() + dz.numel() + (tiles + 1) * 2 * 64  # partial sums, and their sum


def slices(outputs: int, norm: int = 0) -> int:
    """How many slices of outputs the weight kernel has."""
    return -(-outputs // kernels.default(kernels.launch_key("weight", 64, outputs, norm, torch.float32, 0)).outputs)


@interpreted
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_traffic_of_the_attention_is_that_of_the_model(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In elements of memory: each tensor as often as the docstring counts it."""
    torch.manual_seed(4)
    batch, fields, dim, post = 3, 27, 64, norm == "post"
    x, dy, w_qkv, b_qkv, w_out, b_out, *affine = draw(
        torch.float32, (batch, fields, dim), (batch, fields, dim), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,),
        (dim,), (dim,))
    settings = (*affine, NORMS[norm], EPS, 4, 0, 0.25, 0.0, None)
    accesses = counting(monkeypatch)
    y, qkv, q, heads, z = kernels.forward(x, w_qkv, b_qkv, w_out, b_out, *settings)
    assert times(accesses["load"], x) == {2} and times(accesses["load"], qkv) == times(accesses["load"], heads) == {1}
    assert accesses["store"].total() == x.numel() * (6 if post else 5)

    accesses = counting(monkeypatch)
    kernels.backward(dy, x, qkv, q, heads, z, w_qkv, w_out, *settings)
    assert times(accesses["load"], x) == {slices(3 * dim, NORMS["pre"] if not post else 0) + (not post)}
    assert times(accesses["load"], heads) == {slices(dim)} and times(accesses["load"], qkv) == {1}
    assert times(accesses["load"], dy) == {1 if post else 2 + slices(dim)}
    if post:
        assert times(accesses["load"], z) == {1}


@interpreted
def test_the_traffic_of_one_query_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    x, w_qkv, b_qkv, w_out, b_out, *affine = draw(torch.float32, (3, 40, 64), (192, 64), (192,), (64, 64), (64,), (64,),
                                                  (64,))
    settings = (*affine, NORMS["pre"], EPS, 4, 1, 0.25, 0.0, None)
    accesses = counting(monkeypatch)
    y, kv, q, heads, z = kernels.forward(x, w_qkv, b_qkv, w_out, b_out, *settings)
    assert times(accesses["load"], x[:, 0]) == {3} and times(accesses["load"], x[:, 1:]) == {1}  # kv; q and residual
    assert times(accesses["load"], kv) == {1} and times(accesses["load"], q) == times(accesses["load"], heads) == {1}
    assert accesses["store"].total() == 2 * x.numel() + 3 * y.numel()

    accesses = counting(monkeypatch)
    dx, *_ = kernels.backward(y.cos(), x, kv, q, heads, z, w_qkv, w_out, *settings)
    assert times(accesses["load"], kv) == times(accesses["store"], dx) == {1}
    assert times(accesses["load"], x[:, 1:]) == {1 + slices(128, NORMS["pre"])}
