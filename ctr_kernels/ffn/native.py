"""The native `ctr::ffn` as an operator of autograd and torch.compile, and its launcher."""

from typing import Any

import torch

from ..library import LIBRARY, no_double_backward
from .reference import ACTIVATIONS


def ffn_native(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    activation: str,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """[..., D], fp32 or bf16 -> [..., D]; the inputs are all that backward keeps."""
    tokens = x.reshape(-1, x.shape[-1])
    index = list(ACTIVATIONS).index(activation)
    return torch.ops.ctr.ffn(tokens.contiguous(), w1, b1, w2, b2, index, dropout_p, seed).view(x.shape)


def _fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _fake_backward(grad_out: torch.Tensor, x: torch.Tensor, *weights: Any) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(x), *(torch.empty(w.shape, dtype=torch.float32, device=x.device) for w in weights[:4])


def _save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.activation, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(*tensors, seed)


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple:
    *tensors, seed = ctx.saved_tensors
    grad_x, *grads = torch.ops.ctr.ffn_backward(grad_out.contiguous(), *tensors, ctx.activation, ctx.dropout_p, seed)
    dtype = tensors[0].dtype
    return grad_x, *(g.to(dtype) for g in grads), None, None, None


torch.library.register_fake("ctr::ffn", _fake, lib=LIBRARY)
torch.library.register_fake("ctr::ffn_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("ctr::ffn", _backward, setup_context=_save, lib=LIBRARY)
no_double_backward("ctr::ffn_backward")
