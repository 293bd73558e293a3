"""Argument checks shared by the operations; every message quotes the offending value and the limit."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .tracing import inside_export, inside_torch_func

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype of an active `torch.autocast` of their device; as they are without one."""
    device = tensors[0].device.type
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    if device == "cuda" and all(t.dtype == torch.float32 for t in tensors) and not torch.compiler.is_compiling() \
            and not inside_torch_func() and not inside_export():
        return cast_together(dtype, *tensors)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def cast_together(dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, of one device and dtype, in another dtype, in one launch, as are their gradients: the weights of a
    model are many and small."""
    found: tuple[torch.Tensor, ...] = _Cast.apply(dtype, *tensors)
    return found


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        outs = _copied(tensors, dtype)
        ctx.mark_non_differentiable(*(out for out, wanted in zip(outs, ctx.needs_input_grad[1:], strict=True)
                                      if not wanted))
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # a second derivative
            return None, *(None if grad is None else grad.to(ctx.dtype) for grad in grads)
        there = iter(_copied([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *(None if grad is None else next(there) for grad in grads)


def _copied(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    outs = tuple(torch.empty_like(t, dtype=dtype) for t in tensors)
    if outs:
        torch._foreach_copy_(outs, tuple(tensors))
    return outs


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
