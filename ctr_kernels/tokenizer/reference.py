"""Lookup, numeric tokens, history and CLS in plain PyTorch: the specification of `field_tokens`."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..checks import without_autocast
from ..philox import dropout_mask
from ..sparse_update.table import lookup

NUMERIC = ("token", "affine", "scaled")


class History(NamedTuple):
    """What maps S statistics of each field's value to a summand of its token; K fields, D the width of a token."""

    weight: torch.Tensor  # [S, K, D]
    bias: torch.Tensor  # [K, D]
    mean: torch.Tensor  # [S K], statistic by statistic as the columns of `dense`; a constant, without a gradient
    scale: torch.Tensor  # [S K], 1 / standard deviation, 0 for a column to leave out; a constant


def field_tokens_reference(
    weight: torch.Tensor,
    ids: torch.Tensor,
    dense: torch.Tensor,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor | None,
    cls: torch.Tensor | None,
    field_bias: torch.Tensor | None,
    numeric: str = "token",
    history: History | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """CLS | numeric tokens | a token for each field, [B, T, D]; the gradient of weight is sparse."""
    with without_autocast(weight.device.type):
        categorical = lookup(weight, ids, dense_weight.dtype, "eager")
        if dropout_p > 0.0:
            assert seed is not None
            categorical = drop_rows(categorical, dropout_p, seed)
        if history is not None:
            statistics, fields, _ = history.weight.shape
            past = (dense[:, -statistics * fields:] - history.mean.detach()) * history.scale.detach()
            past = past.unflatten(1, (statistics, fields))
            categorical = categorical + torch.einsum("bsk,skd->bkd", past, history.weight) + history.bias
            dense = dense[:, :-statistics * fields]
        if field_bias is not None:
            categorical = categorical + field_bias
        if numeric == "token":
            tokens = [F.linear(dense, dense_weight, dense_bias).unsqueeze(1), categorical]
        else:
            numbers = dense.unsqueeze(-1) * dense_weight
            tokens = [numbers if dense_bias is None else numbers + dense_bias, categorical]
    if cls is not None:
        tokens.insert(0, cls.expand(len(ids), 1, -1))
    return torch.cat(tokens, dim=1)


def drop_rows(rows: torch.Tensor, dropout_p: float, seed: torch.Tensor) -> torch.Tensor:
    """Rows [B, K, D] of fields, each 0 with probability p, the others divided by 1 - p.

    The mask is philox.py's of B rows and K columns: field k of sample b is element (b, k).
    """
    keep = dropout_mask(len(rows), rows.shape[1], dropout_p, seed)
    return rows * (keep.to(rows.dtype) / (1.0 - dropout_p)).unsqueeze(-1)
