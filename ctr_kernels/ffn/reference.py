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
    return F.linear(activate(F.linear(x, w1, b1), activation, dropout_p, seed), w2, b2)


def activate(hidden: torch.Tensor, activation: str, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """dropout(act(hidden)), [..., hidden] -> the same shape."""
    hidden = ACTIVATIONS[activation](hidden)
    if dropout_p > 0.0:
        assert seed is not None
        mask = dropout_mask(hidden.shape[:-1].numel(), hidden.shape[-1], dropout_p, seed)
        hidden = hidden * mask.view_as(hidden) / (1.0 - dropout_p)
    return hidden
