"""The two-layer feed-forward network in plain PyTorch: the specification of `ffn`."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..philox import dropout_mask


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


Activation = Callable[[torch.Tensor], torch.Tensor]
# In the order of the operator's argument; the gated ones are a * act(b) of the two halves a | b of the first layer's
# output (Shazeer 2020), with the act that is given here.
ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu": F.relu, "reglu": F.relu,
                                      "geglu": F.gelu, "swiglu": F.silu}
GATED = ("reglu", "geglu", "swiglu")


def ffn_reference(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    activation: str,
    dropout_p: float,
    seed: torch.Tensor | None,
    *,
    norm: str | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """dropout(act(x w1^T + b1)) w2^T + b2, [..., D] -> [..., D]. Keeps the hidden; fused backends must not.

    With a norm, f being this, half a layer: x + f(LN(x)) of "pre", LN(x + f(x)) of "post", n + f(n) with n = LN(x) of
    "normed".
    """

    def layer_norm(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)

    taken = layer_norm(x) if norm in ("pre", "normed") else x
    out = F.linear(activate(F.linear(taken, w1, b1), activation, dropout_p, seed), w2, b2)
    if norm is None:
        return out
    out = out + (taken if norm == "normed" else x)
    return layer_norm(out) if norm == "post" else out


def activate(hidden: torch.Tensor, activation: str, dropout_p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """dropout(act(hidden)): [..., hidden] -> the same shape; gated, of a | b [..., 2 hidden], [..., hidden]."""
    if activation in GATED:
        a, b = hidden.chunk(2, dim=-1)
        hidden = a * ACTIVATIONS[activation](b)
    else:
        hidden = ACTIVATIONS[activation](hidden)
    if dropout_p > 0.0:
        assert seed is not None
        mask = dropout_mask(hidden.shape[:-1].numel(), hidden.shape[-1], dropout_p, seed)
        hidden = hidden * mask.view_as(hidden) / (1.0 - dropout_p)
    return hidden
