"""`ctr::attention_block`, the attention half of a transformer layer: one operator for all backends."""

from typing import Any

import torch

from ..ffn.operator import NORMS
from ..library import LIBRARY, implement_in_triton, no_double_backward

Tensor = torch.Tensor
TRITON_MAX_DIM = 256  # of tokens and of all heads: sums of wider rows exceed the registers


def supports(backend: str, dim: int, width: int, norm: str | None, queries: int = 0) -> str | None:
    """Why the kernels of `backend` do not take tokens of `dim`, heads of `width` together, that norm ("pre", "post" or
    None) and that many queries (0: all tokens); None if they do."""
    if backend == "native":
        return "norm='post' has no kernels" if norm == "post" else None
    for columns, what in ((dim, f"D={dim}"), (width, f"heads of {width} columns together")):
        if columns > TRITON_MAX_DIM:
            return f"{what}; the fused half takes up to {TRITON_MAX_DIM}"
    return None


def attention_half(x: Tensor, w_qkv: Tensor, b_qkv: Tensor, w_out: Tensor, b_out: Tensor, num_heads: int,
                   scale: float, dropout_p: float, seed: Tensor | None, *, norm: str | None = None,
                   norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, eps: float = 0.0,
                   queries: int = 0) -> Tensor:
    """[B, F, D] -> [B, F, D], or [B, queries, D]: see `reference.py`.

    Backward keeps x, q | k | v, the heads' output, and the sum that a norm "post" takes.
    """
    out: Tensor = torch.ops.ctr.attention_block(x.contiguous(), w_qkv, b_qkv, w_out, b_out, norm_weight, norm_bias,
                                                NORMS[norm], eps, num_heads, queries, scale, dropout_p, seed)[0]
    return out


def _fake(x: Tensor, w_qkv: Tensor, b_qkv: Tensor, w_out: Tensor, b_out: Tensor, norm_weight: Tensor | None,
          norm_bias: Tensor | None, norm: int, eps: float, num_heads: int, queries: int,
          *_: Any) -> tuple[Tensor, ...]:
    batch, fields, dim = x.shape
    width, rows = w_out.shape[1], queries or fields
    y = x.new_empty(batch, rows, dim)
    qkv = w_qkv.new_empty(batch, fields, (2 if queries else 3) * width)
    q = w_qkv.new_empty((batch, queries, width) if queries else (0,))
    z = torch.empty_like(y) if norm == NORMS["post"] else x.new_empty(0)
    return y, qkv, q, w_qkv.new_empty(batch, rows, width), z


def _fake_backward(grad_out: Tensor, x: Tensor, qkv: Tensor, q: Tensor, heads: Tensor, z: Tensor, w_qkv: Tensor,
                   w_out: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, norm: int,
                   *_: Any) -> tuple[Tensor, ...]:
    norms = x.new_empty((2, x.shape[2]) if norm else (0,), dtype=torch.float32)
    linears = (t for w in (w_qkv, w_out) for t in (torch.empty_like(w), w.new_empty(w.shape[0])))
    return torch.empty_like(x), *linears, norms


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, w_qkv, _, w_out, _, norm_weight, norm_bias, *ctx.settings, seed = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], w_qkv, w_out, norm_weight, norm_bias, seed)


def _backward(ctx: Any, grad_out: Tensor, *_: None) -> tuple:
    *tensors, seed = ctx.saved_tensors
    norm_weight = tensors[7]
    *grads, norms = torch.ops.ctr.attention_block_backward(grad_out.contiguous(), *tensors, *ctx.settings, seed)
    affine = (None, None) if norm_weight is None else norms.to(norm_weight.dtype).unbind()
    return *grads, *affine, *(None,) * 7


implement_in_triton("attention_block", ".layer.triton", "forward")
implement_in_triton("attention_block_backward", ".layer.triton", "backward")
torch.library.register_fake("ctr::attention_block", _fake, lib=LIBRARY)
torch.library.register_fake("ctr::attention_block_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("ctr::attention_block", _backward, setup_context=_save, lib=LIBRARY)
no_double_backward("ctr::attention_block_backward")
