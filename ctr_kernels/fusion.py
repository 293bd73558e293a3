"""What may be fused: a kernel stands in for modules only where they do exactly what it computes.

A kernel reads the weights of modules and does not call them. That is the same only if the modules are PyTorch's own,
with parameters as they come and nothing hooked to them; each function here says why one is not, or gives None.
"""

import os
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import nn
from torch._C import _len_torch_function_stack
from torch.nn import functional as F
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .checks import autocast_enabled

Tensor = torch.Tensor

# What kernels stand in for: a program that replaces one of these for all modules is not fused either. The modules of
# this project that are read in place of a call add their own.
FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {nn.Linear: nn.Linear.forward,
                                                       nn.LayerNorm: nn.LayerNorm.forward}
_CALL, _CALL_IMPL, _F_LINEAR, _F_LAYER_NORM = nn.Module.__call__, nn.Module._call_impl, F.linear, F.layer_norm


def _replaced_before() -> str | None:
    """What a program replaced before it imported this package: found by the file that a function was written in."""
    functions = {"nn.Linear.forward": nn.Linear.forward, "nn.LayerNorm.forward": nn.LayerNorm.forward,
                 "nn.Linear.__call__": nn.Linear.__call__, "nn.LayerNorm.__call__": nn.LayerNorm.__call__,
                 "nn.Module._call_impl": nn.Module._call_impl, "F.linear": F.linear, "F.layer_norm": F.layer_norm}
    for name, function in functions.items():
        code = getattr(function, "__code__", None)
        own = isinstance(function, BuiltinFunctionType) if code is None else code.co_filename.startswith(
            os.path.dirname(torch.__file__) + os.sep)
        if not own:
            return f"{name} is not PyTorch's own"
    return None


_REPLACED_BEFORE = _replaced_before()


def _replaced_for_all(kind: type[nn.Module]) -> str | None:
    """The reason why a call of any module of `kind` is not what it was when this package was imported, or None."""
    if (_REPLACED_BEFORE is None and FORWARDS.get(kind) is kind.forward and kind.__call__ is _CALL
            and kind._call_impl is _CALL_IMPL and F.linear is _F_LINEAR and F.layer_norm is _F_LAYER_NORM
            and not _len_torch_function_stack()):
        return None  # at once, since every child is asked at every step
    if _REPLACED_BEFORE is not None:
        return _REPLACED_BEFORE
    name = f"nn.{kind.__name__}" if kind in (nn.Linear, nn.LayerNorm) else kind.__name__
    if kind in FORWARDS and kind.forward is not FORWARDS[kind]:
        return f"{name} has another forward"
    if kind.__call__ is not _CALL or kind._call_impl is not _CALL_IMPL:
        return f"{name} has another __call__"
    if F.linear is not _F_LINEAR or F.layer_norm is not _F_LAYER_NORM:
        return "torch.nn.functional has another linear or layer_norm"
    return "a TorchFunctionMode is active" if _in_function_mode() else None


def _in_function_mode() -> bool:
    """Whether a mode other than that of a default device sees the calls of PyTorch's functions."""
    if torch.compiler.is_compiling():
        return False
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def replaced_method(module: nn.Module, name: str, own: Callable[..., Any]) -> str | None:
    """The reason why the method of that name is not the function `own`, as a phrase; None if it is."""
    if name in module.__dict__ or getattr(type(module), name) is not own:
        return f"{type(module).__name__} has a {name} of its own"
    return None


def plain_module(module: nn.Module | None, name: str, kind: type[nn.Module]) -> str | None:
    """The reason why calling `module` is not just `kind.forward` of its own attributes, as a phrase; None if it is."""
    if type(module) is not kind:
        return f"{name} is None" if module is None else f"{name} is a {type(module).__name__}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        forward = module._forward_hooks or module._forward_pre_hooks
        return f"{name} has a {'forward' if forward else 'backward'} hook"
    if (_global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks):
        return "all modules have a global hook"
    if "forward" in module.__dict__ or "_call_impl" in module.__dict__:
        return f"{name} has a forward of its own"
    return _replaced_for_all(kind)


def plain_parameter(module: nn.Module, name: str, parameter: str, shape: tuple[int, ...]) -> str | None:
    """The reason why `module.<parameter>` is not an ordinary contiguous parameter of that shape; None if it is."""
    found = module._parameters.get(parameter)
    if found is None:
        computed = parameter in module.__dict__ and module.__dict__[parameter] is not None
        return f"{name}.{parameter} is not a parameter" if computed else f"{name} has no {parameter}"
    if type(found) is not nn.Parameter or found.layout is not torch.strided:
        return f"{name}.{parameter} is a {type(found).__name__} of layout {found.layout}"
    if found.shape != shape:
        return f"{name}.{parameter} has shape {tuple(found.shape)}, not {shape}"
    if not found.is_contiguous():
        return f"{name}.{parameter} is not contiguous"
    return None


def plain_linear(module: nn.Module | None, name: str, in_features: int, out_features: int,
                 bias: bool = True) -> str | None:
    """The reason why `module` is not an ordinary `nn.Linear` of these widths, with or without a bias; None if it is."""
    reason = plain_module(module, name, nn.Linear)
    if reason is not None or module is None:
        return reason
    reason = plain_parameter(module, name, "weight", (out_features, in_features))
    if reason is not None or bias:
        return reason or plain_parameter(module, name, "bias", (out_features,))
    return f"{name} has a bias" if module.bias is not None else None


def out_features(module: nn.Module | None) -> int:
    """The width that an `nn.Linear` gives now, which its attributes may not tell; 0 for another module."""
    weight = module._parameters.get("weight") if type(module) is nn.Linear else None
    return 0 if weight is None or weight.dim() != 2 else weight.shape[0]


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Both of a plain module; the attributes, without nn.Module's search for them."""
    parameters = module._parameters
    return parameters["weight"], parameters["bias"]  # type: ignore[return-value]  # plain modules have both


def plain_norm(module: nn.Module | None, name: str, dim: int) -> str | None:
    """The reason why `module` is not an ordinary `nn.LayerNorm` over the last `dim` elements; None if it is."""
    reason = plain_module(module, name, nn.LayerNorm)
    if reason is not None or not isinstance(module, nn.LayerNorm):
        return reason
    if module.normalized_shape != (dim,):
        return f"{name} normalises {module.normalized_shape}, not {(dim,)}"
    return (plain_parameter(module, name, "weight", (dim,)) or plain_parameter(module, name, "bias", (dim,)))


def same_kind(modules: dict[str, nn.Module | None], device: torch.device,
              dtype: torch.dtype | None = None) -> str | None:
    """The reason why parameters of `modules` are not all on `device` and of `dtype`, or of any one; None if so."""
    for name, module in modules.items():
        for parameter in () if module is None else module._parameters.values():
            if parameter is None:
                continue
            dtype = dtype or parameter.dtype
            if parameter.dtype != dtype:
                return f"{name} has {parameter.dtype}, not {dtype}"
            if parameter.device != device:
                return f"{name} is on {parameter.device}, not {device}"
    return None


def like_input(name: str, out: Tensor, x: Tensor) -> Tensor:
    """`out`, of the child called `name`, if it can be added to x: ValueError for another shape, TypeError for a dtype.

    A sum would broadcast another shape, and change its own dtype, without a word.
    """
    if out.shape != x.shape:
        raise ValueError(f"{name} gave {tuple(out.shape)} where {tuple(x.shape)} is needed")
    if out.dtype != x.dtype and not autocast_enabled(x.device.type) \
            and torch.promote_types(out.dtype, x.dtype) != x.dtype:
        raise TypeError(f"{name} gave {out.dtype} where {x.dtype} is needed")
    return out
