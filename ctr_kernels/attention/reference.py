"""Multi-head attention over the fields of a row in plain PyTorch: the specification of `field_attention`."""

import torch

from ..philox import dropout_mask


def field_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_heads: int,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v for each head; q [B, Q, D], k, v [B, F, D] -> [B, Q, D] (Vaswani et al. 2017, eq. 1).

    Keeps the [B, H, Q, F] map; fused backends must not.
    """
    (batch, queries, dim), fields = q.shape, k.shape[1]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(batch, x.shape[1], num_heads, dim // num_heads).transpose(1, 2)  # [B, H, tokens, D/H]

    probabilities = torch.softmax(heads(q) @ heads(k).transpose(-1, -2) * scale, dim=-1)
    if dropout_p > 0.0:
        assert seed is not None
        mask = dropout_mask(batch * num_heads * queries, fields, dropout_p, seed)
        probabilities = probabilities * mask.view_as(probabilities) / (1.0 - dropout_p)
    return (probabilities @ heads(v)).transpose(1, 2).reshape(batch, queries, dim)
