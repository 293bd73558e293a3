"""The position-wise feed-forward network: checks, then the chosen backend."""

import torch

from ..backend import resolve
from ..checks import autocast, same_float
from ..philox import as_seed, check_dropout
from .operator import feed_forward, supports
from .reference import ACTIVATIONS, GATED, ffn_reference


def ffn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    kernels: str = "auto",
) -> torch.Tensor:
    """dropout(activation(x w1^T + b1)) w2^T + b2 (Vaswani et al. 2017, eq. 2; GELU: Hendrycks and Gimpel 2016).

    Gated, the hidden units are a * act(b) of (a | b) = x w1^T + b1 (Shazeer 2020, eqs. 6 and 7).

    Args:
        x: [..., D], any number of leading dimensions, 0 rows included.
        w1, b1: [hidden, D] and [hidden], as `nn.Linear(D, hidden)` keeps them; gated [2 hidden, D] and [2 hidden],
            the rows of a first.
        w2, b2: [D, hidden] and [D], as `nn.Linear(hidden, D)` keeps them.
        activation: "gelu" (erf), "gelu_tanh" or "relu"; gated "reglu", "geglu" (erf) or "swiglu".
        dropout_p: probability of dropping a hidden unit, in [0, 1); the mask is `philox.py`'s.
        seed: 64-bit seed of the mask (int, or int64 tensor [1]); None draws one from torch's generator.
        kernels: "auto", "eager", "native" or "triton".

    Returns: [..., D], dtype of x.

    Raises ValueError (shapes, limits), TypeError (dtypes), BackendUnavailable (a backend that cannot run).

    >>> x, w1, w2 = torch.randn(2, 27, 64), torch.randn(256, 64), torch.randn(64, 256)
    >>> ffn(x, w1, torch.zeros(256), w2, torch.zeros(64)).shape
    torch.Size([2, 27, 64])
    """
    x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    _check(x, w1, b1, w2, b2, activation)
    check_dropout(dropout_p)
    mask_seed = as_seed(seed, x.device) if dropout_p > 0.0 else None
    backend = resolve(kernels, x.device, "ffn", x.dtype, lambda of: supports(of, w2.shape[0], w2.shape[1], activation))
    run = ffn_reference if backend == "eager" else feed_forward
    return run(x, w1, b1, w2, b2, activation, dropout_p, mask_seed)


def _check(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor,
           activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    if x.dim() < 1 or w1.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, w1 {tuple(w1.shape)}; [..., D] and [hidden, D] are needed")
    rows, dim = w1.shape
    if activation in GATED and rows % 2:
        raise ValueError(f"w1 has shape {tuple(w1.shape)}; activation={activation!r} needs [2 hidden, D]")
    hidden = rows // 2 if activation in GATED else rows
    expected = {"x": (*x.shape[:-1], dim), "b1": (rows,), "w2": (dim, hidden), "b2": (dim,)}
    for name, tensor in (("x", x), ("b1", b1), ("w2", w2), ("b2", b2)):
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with w1 {tuple(w1.shape)} it must be "
                             f"{expected[name]}")
    same_float({"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2})
