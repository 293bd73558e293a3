"""`ctr::low_rank_cross`: one operator for all backends."""

from typing import Any

import torch

from ..library import LIBRARY, implement_in_triton, no_double_backward

Tensor = torch.Tensor
TRITON_MAX_RANK = 64
TRITON_MAX_WEIGHT = 2**29  # elements of U or V: offsets are 32 bits wide


def supports(backend: str, width: int, rank: int) -> str | None:
    """Why the kernels of `backend` do not take a layer of these sizes; None if they do."""
    if width < 1 or rank < 1:
        return f"W={width}, R={rank}; both must be at least 1"
    if backend == "triton" and rank > TRITON_MAX_RANK:
        return f"R={rank}; kernels='triton' takes up to {TRITON_MAX_RANK}"
    if backend == "triton" and width * rank > TRITON_MAX_WEIGHT:
        return f"R W = {width * rank}; kernels='triton' takes up to {TRITON_MAX_WEIGHT}"
    return None


def cross(x0: Tensor, x: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """[B, W] -> [B, W]; the inputs are all that backward keeps."""
    y: Tensor = torch.ops.ctr.low_rank_cross(*(t.contiguous() for t in (x0, x, u, v, bias)))
    return y


def _fake(x0: Tensor, x: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(grad_out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in inputs)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.ctr.low_rank_cross_backward(grad_out.contiguous(), *ctx.saved_tensors)


implement_in_triton("low_rank_cross", ".cross.triton", "forward")
implement_in_triton("low_rank_cross_backward", ".cross.triton", "backward")
torch.library.register_fake("ctr::low_rank_cross", _fake, lib=LIBRARY)
torch.library.register_fake("ctr::low_rank_cross_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("ctr::low_rank_cross", _backward, setup_context=_save, lib=LIBRARY)
no_double_backward("ctr::low_rank_cross_backward")
