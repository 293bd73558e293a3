"""The native `ctr::linear`, which the layer uses for its projections, as an operator of autograd and torch.compile."""

from typing import Any

import torch
from torch import nn

from ..library import LIBRARY, no_double_backward


def takes_linear(linear: nn.Linear, x: torch.Tensor) -> bool:
    """Whether the native linear does this one: fp32 throughout, widths that are multiples of 16, a bias."""
    widths = linear.in_features % 16 == 0 and linear.out_features % 16 == 0 and linear.bias is not None
    return (widths and x.dtype == linear.weight.dtype == torch.float32
            and not torch.is_autocast_enabled(x.device.type))


def linear_native(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`linear(x)`, [..., in] -> [..., out]: tiles of tokens against weights that stay in the cache."""
    tokens = x.reshape(-1, linear.in_features).contiguous()
    out = torch.ops.ctr.linear(tokens, linear.weight.contiguous(), linear.bias)
    return out.view(*x.shape[:-1], linear.out_features)


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_backward(grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.ctr.linear_backward(grad_out.contiguous(), *ctx.saved_tensors)


torch.library.register_fake("ctr::linear", _fake, lib=LIBRARY)
torch.library.register_fake("ctr::linear_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("ctr::linear", _backward, setup_context=_save, lib=LIBRARY)
no_double_backward("ctr::linear_backward")
