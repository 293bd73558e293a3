"""What may be fused: a kernel stands in for modules only where they do exactly what it computes.

A kernel reads the weights of modules and does not call them. That is the same only if the modules are PyTorch's own,
with parameters as they come and nothing hooked to them; each function here says why one is not, or gives None.
"""

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .checks import autocast_enabled

Tensor = torch.Tensor

# What kernels stand in for: a program that replaces one of these for all modules is not fused either.
_LINEAR, _LAYER_NORM = nn.Linear.forward, nn.LayerNorm.forward


def plain_module(module: nn.Module | None, name: str, kind: type[nn.Module]) -> str | None:
    """The reason why calling `module` is not just `kind.forward` of its own attributes, as a phrase; None if it is."""
    if type(module) is not kind:
        return f"{name} is None" if module is None else f"{name} is a {type(module).__name__}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        forward = module._forward_hooks or module._forward_pre_hooks
        return f"{name} has a {'forward' if forward else 'backward'} hook"
    if (_global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks):
        return "all modules have a global hook"
    return f"{name} has a forward of its own" if "forward" in module.__dict__ else None


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
    if nn.Linear.forward is not _LINEAR:
        return "nn.Linear has another forward"
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
    if nn.LayerNorm.forward is not _LAYER_NORM:
        return "nn.LayerNorm has another forward"
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
