"""Argument checks shared by the operations; every message quotes the offending value and the limit."""

from contextlib import AbstractContextManager, nullcontext

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype of an active `torch.autocast` of their device; as they are without one."""
    device = tensors[0].device.type
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which an operation multiplies x: that of an active `torch.autocast`, as `autocast` has it."""
    device = x.device.type
    if not x.is_floating_point() or x.dtype == torch.float64 or not autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def same_float(named: dict[str, torch.Tensor]) -> None:
    """TypeError unless all tensors share one floating dtype; ValueError unless they share one device."""
    (first_name, first), *others = named.items()
    if first.dtype not in FLOATS:
        raise TypeError(f"{first_name} has dtype {first.dtype}; floating point is needed")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, {first_name} has {first.dtype}; they must agree")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, {first_name} is on {first.device}")


def autocast_enabled(device_type: str) -> bool:
    """Whether `torch.autocast` is active for that kind of device; it knows nothing of "meta" and refuses to say."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context without `torch.autocast`."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
