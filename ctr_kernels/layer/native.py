"""The halves of a transformer layer as native operators: LayerNorm, projections or FFN, and residual in one pass.

`ctr::attention_block`: x + out(attention(qkv(n))) with n = LN(x), or n = x without a norm; it keeps x, qkv and the
attended values. `ctr::ffn_block`: n = LN(x), x + ffn(n) or n + ffn(n); it keeps x alone.
"""

from typing import TYPE_CHECKING, Any

import torch

from ..checks import attention_limits
from ..ffn import ffn_limits
from ..ffn.reference import ACTIVATIONS
from ..fusion import weight_and_bias
from ..library import LIBRARY, no_double_backward
from ..philox import as_seed
from .halves import attention_half, ffn_half, hidden_width

if TYPE_CHECKING:
    from . import TransformerLayer


def why_attention_is_not_fused(layer: "TransformerLayer", x: torch.Tensor) -> str | None:
    """Why `ctr::attention_block` does not do the attention half of this layer on x [B, F, D], or None."""
    reason = _limits(x) or attention_limits(x.shape[1], x.shape[2], layer.num_heads)
    return reason or attention_half(layer, x, "attention_norm" if layer.norm == "pre" else None, x.dtype)


def why_ffn_is_not_fused(layer: "TransformerLayer", x: torch.Tensor) -> str | None:
    """Why `ctr::ffn_block` does not do the FFN half of this layer on x [B, F, D]; None if it does.

    Post-norm, the block is n + ffn(n) of n = attention_norm(x), and ffn_norm is called.
    """
    reason = _limits(x) or ffn_half(layer, x, "ffn_norm" if layer.norm == "pre" else "attention_norm", x.dtype)
    return reason or ffn_limits("native", x.shape[2], hidden_width(layer))


def _limits(x: torch.Tensor) -> str | None:
    if x.dtype != torch.float32:
        return f"the fused half computes in torch.float32, not {x.dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "under autocast linear layers have another dtype than norms"
    return f"D={x.shape[2]}; a multiple of 16 is needed" if x.shape[2] % 16 else None


def fused_attention(layer: "TransformerLayer", x: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """x + attention(LN(x)) of pre-norm, x + attention(x) of post-norm: [B, F, D] -> [B, F, D]."""
    seed = as_seed(None, x.device) if dropout_p > 0.0 else None
    first, scale = layer.attention_norm, (x.shape[2] // layer.num_heads) ** -0.5
    norm = (*weight_and_bias(first), first.eps) if layer.norm == "pre" else (None, None, 0.0)
    out: torch.Tensor = torch.ops.ctr.attention_block(
        x.contiguous(), *norm, *weight_and_bias(layer.qkv), *weight_and_bias(layer.out), layer.num_heads, scale,
        dropout_p, seed)[0]
    return out


def fused_ffn(layer: "TransformerLayer", x: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """x + ffn(LN(x)) of pre-norm, n + ffn(n) with n = LN(x) of post-norm: [B, F, D] -> [B, F, D]."""
    seed, pre = as_seed(None, x.device) if dropout_p > 0.0 else None, layer.norm == "pre"
    norm = layer.ffn_norm if pre else layer.attention_norm
    out: torch.Tensor = torch.ops.ctr.ffn_block(
        x.reshape(-1, x.shape[2]).contiguous(), *weight_and_bias(norm), norm.eps, not pre,
        *weight_and_bias(layer.ffn_in), *weight_and_bias(layer.ffn_out), list(ACTIVATIONS).index(layer.activation),
        dropout_p, seed)
    return out.view(x.shape)


def _fake_attention(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    batch, fields, dim = x.shape
    return torch.empty_like(x), x.new_empty(batch, fields, 3 * dim), torch.empty_like(x)


def _fake_attention_backward(grad_out: torch.Tensor, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    dim = x.shape[2]
    shapes = [(dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
    return torch.empty_like(x), *(x.new_empty(shape) for shape in shapes)


def _save_attention(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gamma, beta, ctx.eps, w_qkv, _, w_out, _, *ctx.settings, seed = inputs
    _, qkv, attended = output
    ctx.mark_non_differentiable(qkv, attended)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, qkv, attended, gamma, beta, w_qkv, w_out, seed)


def _attention_backward(ctx: Any, grad_out: torch.Tensor, *_: Any) -> tuple:
    x, qkv, attended, gamma, beta, w_qkv, w_out, seed = ctx.saved_tensors
    grad_x, *norm, grad_w_qkv, grad_b_qkv, grad_w_out, grad_b_out = torch.ops.ctr.attention_block_backward(
        grad_out.contiguous(), x, qkv, attended, gamma, beta, ctx.eps, w_qkv, w_out, *ctx.settings, seed)
    norm = [None, None] if gamma is None else norm
    return (grad_x, *norm, None, grad_w_qkv, grad_b_qkv, grad_w_out, grad_b_out, *(None,) * 4)


def _fake_ffn(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _fake_ffn_backward(grad_out: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float,
                       normed_residual: bool, *weights: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (x, gamma, beta, *weights[:4]))


def _save_ffn(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, gamma, beta, *ctx.norm, w1, b1, w2, b2, ctx.activation, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(x, gamma, beta, w1, b1, w2, b2, seed)


def _ffn_backward(ctx: Any, grad_out: torch.Tensor) -> tuple:
    x, gamma, beta, *weights, seed = ctx.saved_tensors
    grad_x, grad_gamma, grad_beta, *grads = torch.ops.ctr.ffn_block_backward(
        grad_out.contiguous(), x, gamma, beta, *ctx.norm, *weights, ctx.activation, ctx.dropout_p, seed)
    return grad_x, grad_gamma, grad_beta, None, None, *grads, None, None, None


torch.library.register_fake("ctr::attention_block", _fake_attention, lib=LIBRARY)
torch.library.register_fake("ctr::attention_block_backward", _fake_attention_backward, lib=LIBRARY)
torch.library.register_autograd("ctr::attention_block", _attention_backward, setup_context=_save_attention,
                                lib=LIBRARY)
no_double_backward("ctr::attention_block_backward")
torch.library.register_fake("ctr::ffn_block", _fake_ffn, lib=LIBRARY)
torch.library.register_fake("ctr::ffn_block_backward", _fake_ffn_backward, lib=LIBRARY)
torch.library.register_autograd("ctr::ffn_block", _ffn_backward, setup_context=_save_ffn, lib=LIBRARY)
no_double_backward("ctr::ffn_block_backward")
