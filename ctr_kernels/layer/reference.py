"""The attention half of a transformer layer in plain PyTorch: the specification of `ctr::attention_block`."""

import torch
from torch.nn import functional as F

from ..attention.reference import field_attention_reference

Tensor = torch.Tensor


def attention_half_reference(x: Tensor, w_qkv: Tensor, b_qkv: Tensor, w_out: Tensor, b_out: Tensor, num_heads: int,
                             scale: float, dropout_p: float, seed: Tensor | None, *, norm: str | None = None,
                             norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, eps: float = 0.0,
                             queries: int = 0) -> Tensor:
    """x + out(attention(qkv(X))): [B, F, D] -> [B, F, D], or of the first `queries` tokens alone [B, queries, D].

    w_qkv [3 E, D], w_out [D, E], E columns of all heads together. X is x, or LN(x) of norm "pre"; "post" is LN of the
    result. The sum is that of the first `queries` tokens, whose queries see all tokens; 0: of all.
    """
    taken = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps) if norm == "pre" else x
    rows = queries or x.shape[1]
    q, k, v = F.linear(taken, w_qkv, b_qkv).chunk(3, dim=-1)
    heads = field_attention_reference(q[:, :rows], k, v, num_heads, scale, dropout_p, seed)
    out = x[:, :rows] + F.linear(heads, w_out, b_out)
    return F.layer_norm(out, out.shape[-1:], norm_weight, norm_bias, eps) if norm == "post" else out
