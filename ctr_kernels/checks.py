"""Argument checks shared by the operations; every message quotes the offending value and the limit."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_FIELDS = 64
HEAD_DIMS = (8, 16, 32, 64)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype of an active `torch.autocast` of their device; as they are without one."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


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
