"""A layer is fused only where its children are what the kernels compute; others are called, in every backend."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_layer import Doubled, plain_layer
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ctr_kernels import TransformerLayer
from ctr_kernels import layer as layer_module
from ctr_kernels.library import NATIVE_ABSENT

DIM, HEADS, HIDDEN = 64, 4, 128
ALL = ("attention_norm", "qkv", "out", "ffn_norm", "ffn_in", "ffn_out")
needs_native = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=f"native: {NATIVE_ABSENT}")


class LoRA(nn.Module):
    """A frozen linear layer and a trained update of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(4, base.in_features) * 0.1)
        self.b = nn.Parameter(torch.randn(base.out_features, 4) * 0.1)

    @property
    def weight(self) -> nn.Parameter:
        return self.base.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


class OwnTensor(torch.Tensor):
    """A weight of another kind, as quantised and distributed ones are."""


class Shifted(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 0.1


def replace(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[TransformerLayer], None]:
    return lambda layer: setattr(layer, name, make(getattr(layer, name)))


def on(name: str, change: Callable[[Any], Any]) -> Callable[[TransformerLayer], None]:
    return lambda layer: change(getattr(layer, name)) and None


def linear_of(kind: type[nn.Linear], **options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda old: kind(old.in_features, old.out_features, **options)


def scale_gradients(module: nn.Module, grads: tuple, _: tuple) -> tuple:
    return tuple(None if g is None else 3.0 * g for g in grads)


SURGERIES: dict[str, Callable[[TransformerLayer], None]] = {
    "attention norm without affine": replace("attention_norm", lambda _: nn.LayerNorm(DIM, elementwise_affine=False)),
    "ffn norm without affine": replace("ffn_norm", lambda _: nn.LayerNorm(DIM, elementwise_affine=False)),
    "norm without bias": replace("attention_norm", lambda _: nn.LayerNorm(DIM, bias=False)),
    "ffn norm without bias": replace("ffn_norm", lambda _: nn.LayerNorm(DIM, bias=False)),
    "norm with another eps": replace("attention_norm", lambda _: nn.LayerNorm(DIM, eps=0.5)),
    "RMSNorm": replace("attention_norm", lambda _: nn.RMSNorm(DIM)),
    "Identity": replace("ffn_norm", lambda _: nn.Identity()),
    "norm over the last two dimensions": replace("attention_norm", lambda _: nn.LayerNorm((5, DIM))),
    "LoRA of qkv": replace("qkv", LoRA),
    "LoRA of ffn_out": replace("ffn_out", LoRA),
    "subclass of Linear for out": replace("out", linear_of(Doubled)),
    "subclass of Linear for ffn_in": replace("ffn_in", linear_of(Doubled)),
    "qkv without bias": replace("qkv", linear_of(nn.Linear, bias=False)),
    "ffn_in without bias": replace("ffn_in", linear_of(nn.Linear, bias=False)),
    "a wider FFN": lambda layer: (setattr(layer, "ffn_in", nn.Linear(DIM, 200)),
                                  setattr(layer, "ffn_out", nn.Linear(200, DIM)))[0],
    "an odd FFN": lambda layer: (setattr(layer, "ffn_in", nn.Linear(DIM, 77)),
                                 setattr(layer, "ffn_out", nn.Linear(77, DIM)))[0],
    "MLP for out": replace("out", lambda _: nn.Sequential(nn.Linear(DIM, 8), nn.Tanh(), nn.Linear(8, DIM))),
    "forward hook": on("ffn_in", lambda m: m.register_forward_hook(lambda _, __, out: out * 2.0)),
    "forward pre-hook": on("qkv", lambda m: m.register_forward_pre_hook(lambda _, x: (x[0] * 2.0,))),
    "full backward hook": on("out", lambda m: m.register_full_backward_hook(scale_gradients)),
    "backward pre-hook": on("ffn_out", lambda m: m.register_full_backward_pre_hook(lambda _, g: (g[0] * 3.0,))),
    "forward of the instance": on("qkv", lambda m: setattr(m, "forward", lambda x: nn.functional.linear(x, m.weight))),
    "pruned": on("ffn_in", lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "pruned norm": on("ffn_norm", lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "weight norm of old": on("out", torch.nn.utils.weight_norm),
    "weight norm": on("qkv", parametrizations.weight_norm),
    "spectral norm": on("ffn_out", parametrizations.spectral_norm),
    "spectral norm of old": on("out", torch.nn.utils.spectral_norm),
    "parametrised norm": on("attention_norm", lambda m: parametrize.register_parametrization(m, "weight", Shifted())),
    "transposed weight": on("ffn_in", lambda m: setattr(m, "weight", nn.Parameter(torch.randn(DIM, HIDDEN).t() / 8))),
    "norm whose weight was removed": on("attention_norm", lambda m: setattr(m, "weight", None)),
    "norm whose bias was removed": on("ffn_norm", lambda m: setattr(m, "bias", None)),
    "weight that is no parameter": lambda layer: (delattr(layer.out, "weight"),
                                                  setattr(layer.out, "weight", torch.randn(DIM, DIM) / 8))[0],
    "weight of a tensor subclass": on("qkv", lambda m: setattr(m, "weight", nn.Parameter(
        m.weight.detach().as_subclass(OwnTensor)))),
    "scripted child": replace("ffn_in", torch.jit.script),
    "tied norms": lambda layer: setattr(layer, "ffn_norm", layer.attention_norm),
    "tied weights": lambda layer: setattr(layer.ffn_norm, "weight", layer.attention_norm.weight),
    "frozen half": on("qkv", lambda m: m.requires_grad_(False)),
    "frozen norm": on("ffn_norm", lambda m: m.requires_grad_(False)),
}


def build(surgery: str, norm: str, kernels: str) -> TransformerLayer:
    torch.manual_seed(0)
    layer = TransformerLayer(DIM, HEADS, HIDDEN, norm=norm, kernels=kernels)
    for module in (layer.attention_norm, layer.ffn_norm):
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    SURGERIES[surgery](layer)
    return layer.eval()


def results(function: Callable[[torch.Tensor], torch.Tensor], layer: TransformerLayer) -> list[torch.Tensor | None]:
    """Output and all gradients of two steps."""
    x = torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    found: list[torch.Tensor | None] = []
    for _ in range(2):
        out = function(x)
        grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        found += [out.detach(), *grads]
        with torch.no_grad():
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf -= 1e-4 * (0.0 if grad is None else grad)
    return found


@pytest.mark.parametrize("kernels", ["auto", "eager"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("surgery", SURGERIES)
def test_changed_children_do_what_they_do(surgery: str, norm: str, kernels: str) -> None:
    layer, expected = build(surgery, norm, kernels), build(surgery, norm, "eager")
    pairs = zip(results(layer, layer), results(lambda x: plain_layer(expected, x), expected), strict=True)
    for found, wanted in pairs:
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_a_hook_on_all_modules_sees_every_child(kernels: str) -> None:
    layer, seen = TransformerLayer(DIM, HEADS, HIDDEN, kernels=kernels), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(torch.randn(2, 3, DIM))
    finally:
        handle.remove()
    assert seen == [*(getattr(layer, name) for name in ALL), layer]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_every_child_is_called_if_it_is_hooked(norm: str, name: str) -> None:
    layer, calls = TransformerLayer(DIM, HEADS, HIDDEN, norm=norm), []
    handle = getattr(layer, name).register_forward_hook(lambda *_: calls.append(name))
    layer(torch.randn(2, 3, DIM))
    assert calls == [name]
    handle.remove()
    layer(torch.randn(2, 3, DIM))
    assert calls == [name]


def test_a_forward_that_was_replaced_for_all_linear_layers_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls, forward = TransformerLayer(DIM, HEADS, HIDDEN), [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (calls.append(self), forward(self, x))[1])
    layer(torch.randn(2, 3, DIM))
    assert calls == [layer.qkv, layer.out, layer.ffn_in, layer.ffn_out]
    assert "nn.Linear has another forward" in repr(layer)


def test_eager_calls_every_child_once() -> None:
    for norm in ("pre", "post"):
        layer, calls = TransformerLayer(DIM, HEADS, HIDDEN, norm=norm, kernels="eager"), []
        for name in ALL:
            forward = getattr(layer, name).forward
            getattr(layer, name).forward = lambda x, _f=forward, _n=name, _c=calls: (_c.append(_n), _f(x))[1]
        layer(torch.randn(2, 3, DIM))
        assert sorted(calls) == sorted(ALL)


@needs_native
@pytest.mark.parametrize(("norm", "name", "attention", "feed_forward"), [
    ("pre", "attention_norm", False, True), ("pre", "out", False, True), ("pre", "ffn_norm", True, False),
    ("pre", "ffn_in", True, False), ("post", "qkv", False, True), ("post", "attention_norm", True, False),
    ("post", "ffn_out", True, False), ("post", "ffn_norm", True, True)])
def test_the_other_half_stays_fused(norm: str, name: str, attention: bool, feed_forward: bool,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = TransformerLayer(DIM, HEADS, HIDDEN, norm=norm), []
    for function in ("fused_attention", "fused_ffn"):
        run = getattr(layer_module, function)
        monkeypatch.setattr(layer_module, function, lambda *of, _f=run, _n=function: (calls.append(_n), _f(*of))[1])
    getattr(layer, name).register_forward_hook(lambda *_: None)
    layer(torch.randn(2, 3, DIM))
    assert calls == ["fused_attention"] * attention + ["fused_ffn"] * feed_forward


@needs_native
@pytest.mark.parametrize("surgery", ["tied norms", "tied weights", "frozen half", "norm with another eps",
                                     "a wider FFN"])
def test_what_kernels_compute_stays_fused(surgery: str) -> None:
    assert repr(build(surgery, "pre", "auto")).count("fused (native)") == 2


@needs_native
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("name", ALL)
def test_children_that_are_called_draw_the_same_masks(norm: str, name: str) -> None:
    layers = []
    for kernels in ("native", "eager"):
        torch.manual_seed(0)
        layers.append(TransformerLayer(DIM, HEADS, HIDDEN, norm=norm, dropout=0.3, kernels=kernels))
    getattr(layers[0], name).register_forward_hook(lambda *_: None)
    x, outs = torch.randn(3, 5, DIM), []
    for layer in layers:
        torch.manual_seed(1)
        outs.append(layer(x))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


def test_a_child_of_a_wrong_width_or_dtype_is_named() -> None:
    x = torch.randn(2, 3, DIM)
    for name, child, error in [
        ("out", nn.Linear(DIM, 1), r"out gave \(2, 3, 1\) where \(2, 3, 64\) is needed"),
        ("ffn_out", nn.Linear(HIDDEN, 1), r"ffn_out gave \(2, 3, 1\)"),
        ("qkv", nn.Linear(DIM, 64), r"qkv has shape \(2, 3, 64\); \[B, F, 3 D\]"),
        ("qkv", nn.Linear(DIM, 9), r"D=3 is not divisible into num_heads=4"),
    ]:
        layer = TransformerLayer(DIM, HEADS, HIDDEN)
        setattr(layer, name, child)
        with pytest.raises(ValueError, match=error):
            layer(x)
    layer = TransformerLayer(DIM, HEADS, HIDDEN)
    layer.out.register_forward_hook(lambda _, __, out: out.double())
    with pytest.raises(TypeError, match=r"out gave torch\.float64 where torch\.float32 is needed"):
        layer(x)
    with pytest.raises(ValueError, match=r"x has shape \(3, 64\)"):
        layer(x[0])
    layer = TransformerLayer(DIM, HEADS, HIDDEN)
    layer.dropout = 1.0
    with pytest.raises(ValueError, match=r"dropout_p=1\.0 is outside"):
        layer(x)


@needs_native
def test_a_printed_layer_says_what_is_fused() -> None:
    layer = TransformerLayer(DIM, HEADS, HIDDEN)
    assert "attention: fused (native)" in repr(layer) and "FFN: fused (native)" in repr(layer)
    layer.ffn_in = LoRA(layer.ffn_in)
    assert "attention: fused (native)\n" in repr(layer)
    assert "FFN: children are called: ffn_in is a LoRA\n" in repr(layer)
    layer.attention_norm = nn.LayerNorm(DIM, elementwise_affine=False)
    layer.ffn_in = nn.Linear(DIM, 77)
    assert "attention: children are called: attention_norm has no weight\n" in repr(layer)
    assert r"ffn_out.weight has shape (64, 128), not (64, 77)" in repr(layer)
    layer = TransformerLayer(DIM, HEADS, HIDDEN)
    layer.qkv.register_forward_pre_hook(lambda *_: None)
    prune.l1_unstructured(layer.ffn_out, "bias", 0.5)
    assert "qkv has a forward hook" in repr(layer) and "ffn_out has a forward hook" in repr(layer)
    assert "kernels='eager' is eager here" in repr(TransformerLayer(DIM, HEADS, HIDDEN, kernels="eager"))
    assert "the fused half computes in torch.float32, not torch.bfloat16" in repr(layer.bfloat16())
    assert "cannot run" in repr(TransformerLayer(DIM, HEADS, HIDDEN, kernels="triton"))


def test_quantized_children_are_called() -> None:
    torch.manual_seed(0)
    layer = TransformerLayer(DIM, HEADS, HIDDEN).eval()
    x = torch.randn(2, 3, DIM)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), {nn.Linear})
    assert type(quantized.ffn_in) is not nn.Linear
    found = quantized(x)
    torch.testing.assert_close(found, plain_layer(quantized, x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, layer(x))


@needs_native
def test_changed_layers_compile_without_graph_breaks() -> None:
    for surgery in ("LoRA of qkv", "norm without bias", "tied weights"):
        layer = build(surgery, "pre", "auto")
        x = torch.randn(2, 3, DIM)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
