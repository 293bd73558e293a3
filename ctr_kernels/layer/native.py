"""The halves of a transformer layer as native operators: LayerNorm, projections or FFN, and residual in one pass.

`ctr::attention_block`: x + out(attention(qkv(n))) with n = LN(x), or n = x without a norm; it keeps x, qkv and the
attended values. `ctr::ffn_block`: n = LN(x), x + ffn(n) or n + ffn(n); it keeps x alone.
"""

from typing import TYPE_CHECKING, Any

import torch

from ..checks import HEAD_DIMS, MAX_FIELDS
from ..ffn.reference import ACTIVATIONS
from ..library import LIBRARY, no_double_backward
from ..philox import as_seed

if TYPE_CHECKING:
    from . import TransformerLayer


def takes_blocks(layer: "TransformerLayer", x: torch.Tensor) -> bool:
    """Whether the native operators do this layer: fp32 throughout, widths that they know, weights as they come."""
    dim = layer.qkv.in_features
    shape = x.dim() == 3 and x.shape[2] == dim and dim % 16 == 0 and 1 <= x.shape[1] <= MAX_FIELDS
    heads = dim % layer.num_heads == 0 and dim // layer.num_heads in HEAD_DIMS and layer.ffn_in.out_features % 8 == 0
    plain = all(p.dtype == torch.float32 and p.is_contiguous() for p in layer.parameters())
    return shape and heads and plain and x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)


def layer_native(layer: "TransformerLayer", x: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """The layer's forward, [B, F, D] -> [B, F, D], in two operators and, for post-norm, a LayerNorm at the end."""
    seeds = [as_seed(None, x.device) if dropout_p > 0.0 else None for _ in range(2)]
    pre, scale = layer.norm == "pre", (x.shape[2] // layer.num_heads) ** -0.5
    first = layer.attention_norm
    norm = (first.weight, first.bias, first.eps) if pre else (None, None, 0.0)
    x, _, _ = torch.ops.ctr.attention_block(x.contiguous(), *norm, layer.qkv.weight, layer.qkv.bias, layer.out.weight,
                                            layer.out.bias, layer.num_heads, scale, dropout_p, seeds[0])
    second = layer.ffn_norm if pre else first
    out: torch.Tensor = torch.ops.ctr.ffn_block(x.view(-1, x.shape[2]), second.weight, second.bias, second.eps, not pre,
                                  layer.ffn_in.weight, layer.ffn_in.bias, layer.ffn_out.weight, layer.ffn_out.bias,
                                  list(ACTIVATIONS).index(layer.activation), dropout_p, seeds[1]).view(x.shape)
    if pre:
        return out
    normed: torch.Tensor = layer.ffn_norm(out)
    return normed


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
