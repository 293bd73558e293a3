"""Lookup, dense token and CLS in plain PyTorch: the specification of `field_tokens`."""

import torch
from torch.nn import functional as F


def field_tokens_reference(
    weight: torch.Tensor,
    ids: torch.Tensor,
    dense: torch.Tensor,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor,
    cls: torch.Tensor | None,
    field_bias: torch.Tensor | None,
) -> torch.Tensor:
    """CLS | one numeric token | a token for each field, [B, T, D]; the gradient of weight is sparse."""
    with torch.autocast(weight.device.type, enabled=False):
        categorical = F.embedding(ids, weight, sparse=True)
        tokens = [F.linear(dense, dense_weight, dense_bias).unsqueeze(1),
                  categorical if field_bias is None else categorical + field_bias]
    if cls is not None:
        tokens.insert(0, cls.expand(len(ids), 1, -1))
    return torch.cat(tokens, dim=1)
