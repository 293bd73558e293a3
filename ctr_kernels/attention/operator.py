"""`ctr::field_attention`, for one projection `ctr::field_attention_packed`: one operator each for all backends."""

from typing import Any

import torch

from ..library import LIBRARY, implement_in_triton, last_dim_contiguous, no_double_backward

Tensor = torch.Tensor
MAX_FIELDS = 128
MAX_HEAD_DIM = 128


def supports(backend: str, queries: int, fields: int, dim: int, num_heads: int) -> str | None:
    """Why the kernels of `backend` do not take `queries` over `fields` tokens of `dim` in that many heads, or None."""
    if queries < 1 or not 1 <= fields <= MAX_FIELDS:
        return f"{queries} queries of F={fields} fields; F from 1 to {MAX_FIELDS} is supported"
    if num_heads < 1 or dim % num_heads:
        return f"D={dim} is not divisible into num_heads={num_heads}"
    if not 1 <= dim // num_heads <= MAX_HEAD_DIM:
        return f"D / num_heads = {dim // num_heads}; 1 to {MAX_HEAD_DIM} are supported"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, dropout_p: float,
              seed: Tensor | None) -> Tensor:
    """q [B, Q, D], k and v [B, F, D], any strides of B and F -> [B, Q, D]; q, k, v are all that backward keeps."""
    q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
    out: Tensor = torch.ops.ctr.field_attention(q, k, v, num_heads, scale, dropout_p, seed)
    return out


def attention_packed(qkv: Tensor, num_heads: int, scale: float, dropout_p: float, seed: Tensor | None) -> Tensor:
    """q | k | v in one projection [B, F, 3 D] -> [B, F, D]; its gradient is written in one piece."""
    out: Tensor = torch.ops.ctr.field_attention_packed(last_dim_contiguous(qkv), num_heads, scale, dropout_p, seed)
    return out


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _fake_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    q, k, v, *ctx.settings, seed = inputs
    ctx.save_for_backward(q, k, v, seed)


def _backward(ctx: Any, grad_out: Tensor) -> tuple:
    q, k, v, seed = ctx.saved_tensors
    grads = torch.ops.ctr.field_attention_backward(last_dim_contiguous(grad_out), q, k, v, *ctx.settings, seed)
    return *grads, None, None, None, None


def _fake_packed(qkv: Tensor, *_: Any) -> Tensor:
    batch, fields, width = qkv.shape
    return qkv.new_empty(batch, fields, width // 3)


def _fake_packed_backward(grad_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save_packed(ctx: Any, inputs: tuple, output: Tensor) -> None:
    qkv, *ctx.settings, seed = inputs
    ctx.save_for_backward(qkv, seed)


def _backward_packed(ctx: Any, grad_out: Tensor) -> tuple:
    qkv, seed = ctx.saved_tensors
    grad = torch.ops.ctr.field_attention_packed_backward(last_dim_contiguous(grad_out), qkv, *ctx.settings, seed)
    return grad, None, None, None, None


implement_in_triton("field_attention", ".attention.triton", "forward")
implement_in_triton("field_attention_backward", ".attention.triton", "backward")
implement_in_triton("field_attention_packed", ".attention.triton", "packed_forward")
implement_in_triton("field_attention_packed_backward", ".attention.triton", "packed_backward")
torch.library.register_fake("ctr::field_attention", _fake, lib=LIBRARY)
torch.library.register_fake("ctr::field_attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("ctr::field_attention", _backward, setup_context=_save, lib=LIBRARY)
no_double_backward("ctr::field_attention_backward")
torch.library.register_fake("ctr::field_attention_packed", _fake_packed, lib=LIBRARY)
torch.library.register_fake("ctr::field_attention_packed_backward", _fake_packed_backward, lib=LIBRARY)
torch.library.register_autograd("ctr::field_attention_packed", _backward_packed, setup_context=_save_packed,
                                lib=LIBRARY)
no_double_backward("ctr::field_attention_packed_backward")
