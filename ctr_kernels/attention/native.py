"""The native `ctr::field_attention` as an operator of autograd and torch.compile, and its launcher."""

from typing import Any

import torch

from ..library import LIBRARY, last_dim_contiguous, no_double_backward


def field_attention_native(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """[B, F, D] x 3, fp32 or bf16, any strides of B and F -> [B, F, D]; q, k, v are all that backward keeps."""
    q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
    return torch.ops.ctr.field_attention(q, k, v, num_heads, scale, dropout_p, seed)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _fake_backward(grad_out: torch.Tensor, q: torch.Tensor, *_: Any) -> torch.Tensor:
    batch, fields, dim = q.shape
    return torch.empty(batch, fields, 3 * dim, dtype=q.dtype, device=q.device)


def _save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    q, k, v, *ctx.settings, seed = inputs
    ctx.save_for_backward(q, k, v, seed)


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple:
    q, k, v, seed = ctx.saved_tensors
    grads = torch.ops.ctr.field_attention_backward(last_dim_contiguous(grad_out), q, k, v, *ctx.settings, seed)
    return *grads.chunk(3, dim=-1), None, None, None, None


def field_attention_packed_native(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """q | k | v in one projection [B, F, 3 D] -> [B, F, D]; its gradient is written in one piece."""
    return torch.ops.ctr.field_attention_packed(last_dim_contiguous(qkv), num_heads, scale, dropout_p, seed)


def _fake_packed(qkv: torch.Tensor, *_: Any) -> torch.Tensor:
    batch, fields, width = qkv.shape
    return torch.empty(batch, fields, width // 3, dtype=qkv.dtype, device=qkv.device)


def _fake_packed_backward(grad_out: torch.Tensor, qkv: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _save_packed(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    qkv, *ctx.settings, seed = inputs
    ctx.save_for_backward(qkv, seed)


def _backward_packed(ctx: Any, grad_out: torch.Tensor) -> tuple:
    qkv, seed = ctx.saved_tensors
    grad = torch.ops.ctr.field_attention_packed_backward(last_dim_contiguous(grad_out), qkv, *ctx.settings, seed)
    return grad, None, None, None, None


torch.library.register_fake("ctr::field_attention", _fake, lib=LIBRARY)
torch.library.register_fake("ctr::field_attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("ctr::field_attention", _backward, setup_context=_save, lib=LIBRARY)
no_double_backward("ctr::field_attention_backward")
torch.library.register_fake("ctr::field_attention_packed", _fake_packed, lib=LIBRARY)
torch.library.register_fake("ctr::field_attention_packed_backward", _fake_packed_backward, lib=LIBRARY)
torch.library.register_autograd("ctr::field_attention_packed", _backward_packed, setup_context=_save_packed,
                                lib=LIBRARY)
no_double_backward("ctr::field_attention_packed_backward")
