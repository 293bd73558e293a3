"""The native `ctr::low_rank_cross` as an operator of autograd and torch.compile, and its launcher."""

from typing import Any

import torch

from ..library import LIBRARY, no_double_backward


def low_rank_cross_native(x0: torch.Tensor, x: torch.Tensor, u: torch.Tensor, v: torch.Tensor,
                          bias: torch.Tensor) -> torch.Tensor:
    """[B, W], fp32, or bf16 with fp32 arithmetic -> [B, W]; the inputs, in fp32, are all that backward keeps."""
    inputs = (t.float().contiguous() for t in (x0, x, u, v, bias))
    y: torch.Tensor = torch.ops.ctr.low_rank_cross(*inputs)
    return y.to(x.dtype)


def _fake(x0: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x0)


def _fake_backward(grad_out: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(t) for t in inputs)


def _save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.ctr.low_rank_cross_backward(grad_out.contiguous(), *ctx.saved_tensors)


torch.library.register_fake("ctr::low_rank_cross", _fake, lib=LIBRARY)
torch.library.register_fake("ctr::low_rank_cross_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("ctr::low_rank_cross", _backward, setup_context=_save, lib=LIBRARY)
no_double_backward("ctr::low_rank_cross_backward")
