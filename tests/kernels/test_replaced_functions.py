"""What replaces functions of PyTorch, or methods of a layer, is called: before and after the import, for all or one."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ctr_kernels import TransformerLayer
from ctr_kernels.library import NATIVE_ABSENT

needs_native = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=f"native: {NATIVE_ABSENT}")


class Doubling(TorchFunctionMode):
    """Everything that F.linear gives, twice."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        return 2.0 * out if function is torch.nn.functional.linear else out


@contextmanager
def replaced(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    had, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, change(before))
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def doubled(function: Any) -> Any:
    return lambda *args, **kwargs: 2.0 * function(*args, **kwargs)


def for_linear(function: Any) -> Any:
    return lambda self, *args: (2.0 if isinstance(self, nn.Linear) else 1.0) * function(self, *args)


PATCHES: dict[str, Callable[[TransformerLayer], Any]] = {
    "nn.Linear.__call__": lambda _: replaced(nn.Linear, "__call__", doubled),
    "nn.LayerNorm.__call__": lambda _: replaced(nn.LayerNorm, "__call__", doubled),
    "nn.Module.__call__": lambda _: replaced(nn.Module, "__call__", for_linear),
    "nn.Module._call_impl": lambda _: replaced(nn.Module, "_call_impl", for_linear),
    "nn.LayerNorm.forward": lambda _: replaced(nn.LayerNorm, "forward", doubled),
    "_call_impl of a child": lambda layer: replaced(layer.out, "_call_impl", doubled),
    "F.linear": lambda _: replaced(torch.nn.functional, "linear", doubled),
    "F.layer_norm": lambda _: replaced(torch.nn.functional, "layer_norm", doubled),
    "a mode": lambda _: Doubling(),
    "a mode below a device": lambda _: both(Doubling(), torch.device("cpu")),
    "_ffn of the layer": lambda layer: replaced(layer, "_ffn", doubled),
    "_attention of the layer": lambda layer: replaced(layer, "_attention", doubled),
    "_ffn of the class": lambda _: replaced(TransformerLayer, "_ffn", doubled),
    "_attention of the class": lambda _: replaced(TransformerLayer, "_attention", doubled),
}


@contextmanager
def both(first: Any, second: Any) -> Iterator[None]:
    with first, second:
        yield


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("patch", PATCHES)
def test_what_was_replaced_is_called(patch: str, norm: str) -> None:
    torch.manual_seed(0)
    layers = [TransformerLayer(32, 2, 64, norm=norm, kernels=kernels) for kernels in ("auto", "eager")]
    layers[1].load_state_dict(layers[0].state_dict())
    x, outs = torch.randn(2, 3, 32), []
    plain = layers[1](x)
    for layer in layers:
        with PATCHES[patch](layer):
            outs.append(layer(x))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outs[1], plain, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layers[0](x), plain, rtol=1e-4, atol=1e-4)


class OwnHalves(TransformerLayer):
    """Both halves scaled, as LayerScale does."""

    def _attention(self, x: torch.Tensor, dropout_p: float) -> torch.Tensor:
        return 3.0 * super()._attention(x, dropout_p)

    def _ffn(self, x: torch.Tensor, dropout_p: float) -> torch.Tensor:
        return 2.0 * super()._ffn(x, dropout_p)


def test_a_subclass_has_its_own_halves() -> None:
    torch.manual_seed(0)
    layer = OwnHalves(32, 2, 64)
    x = torch.randn(2, 3, 32)
    found = layer(x)
    layer.kernels = "eager"
    torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-4)
    layer.kernels = "auto"
    if NATIVE_ABSENT is None:
        assert "attention: children are called: OwnHalves has a _attention of its own" in repr(layer)


@needs_native
@pytest.mark.parametrize("patch", ["nn.Linear.forward", "nn.LayerNorm.forward", "nn.Module.__call__",
                                   "torch.nn.functional.linear", "nn.Module._call_impl"])
def test_what_was_replaced_before_the_import_is_called(patch: str) -> None:
    owner, name = patch.rsplit(".", 1)
    said = patch.replace("torch.nn.functional", "F").replace("nn.Module.__", "nn.Linear.__")
    code = f"""
import functools, torch
from torch import nn
function, calls = {patch}, []
@functools.wraps(function)
def forward(*args, **kwargs):
    calls.append(args)
    return function(*args, **kwargs)
{owner}.{name} = forward
from ctr_kernels import TransformerLayer
layer = TransformerLayer(32, 2, 64)
layer(torch.randn(2, 3, 32))
assert len(calls) >= 2, calls
assert "children are called: {said} is not PyTorch's own" in repr(layer), layer
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_native
def test_a_default_device_and_a_subclass_of_nothing_stay_fused() -> None:
    layer = type("Named", (TransformerLayer,), {})(32, 2, 64)
    with torch.device("cpu"):
        assert repr(layer).count("fused (native)") == 2
    torch.set_default_device("cpu")
    try:
        assert repr(layer).count("fused (native)") == 2
    finally:
        torch.set_default_device(None)


@needs_native
def test_a_compiled_layer_stays_fused() -> None:
    layer, seen = TransformerLayer(32, 2, 64), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(2, 3, 32))
    assert any("attention_block" in name for name in seen) and any("ctr.ffn" in name for name in seen), seen
    assert not any("functorch" in name or "function_stack" in name for name in seen), seen  # checks leave no node


@needs_native
def test_a_compiled_function_of_torch_func_is_eager() -> None:
    torch.manual_seed(0)
    layer, x = TransformerLayer(32, 2, 64), torch.randn(2, 3, 32)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return layer(x).square().sum()

    torch.testing.assert_close(torch.compile(torch.func.grad(loss), backend="eager")(x), torch.func.grad(loss)(x))
    rows = torch.compile(torch.vmap(lambda row: layer(row[None])[0]), backend="eager")(x)
    torch.testing.assert_close(rows, layer(x), rtol=1e-4, atol=1e-4)
