"""The two-layer feed-forward network in plain PyTorch: the specification of `ffn`."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..philox import dropout_mask


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


Activation = Callable[[torch.Tensor], torch.Tensor]
ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu": F.relu}


def ffn_reference(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    activation: str,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """dropout(act(x w1^T + b1)) w2^T + b2, [..., D] -> [..., D]. Keeps the hidden; fused backends must not."""
    hidden = ACTIVATIONS[activation](F.linear(x, w1, b1))
    if dropout_p > 0.0:
        rows = x.numel() // max(1, x.shape[-1])
        assert seed is not None
        mask = dropout_mask(rows, w1.shape[0], dropout_p, seed)
        hidden = hidden * mask.view_as(hidden) / (1.0 - dropout_p)
    return F.linear(hidden, w2, b2)
