"""The position-wise feed-forward network: checks, then the chosen backend."""

import torch

from ..backend import resolve
from ..checks import autocast, same_float
from ..philox import as_seed, check_dropout
from .native import ffn_native
from .reference import ACTIVATIONS, ffn_reference

TRITON_MAX_DIM = 128
TRITON_MAX_HIDDEN = 2**21  # offsets into weights and partial sums, up to 2^29, are 32 bits wide; into tokens, 64


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

    Args:
        x: [..., D], any number of leading dimensions, 0 rows included.
        w1, b1: [hidden, D] and [hidden], as `nn.Linear(D, hidden)` keeps them. The fused kernels take multiples of 8
            for hidden, Triton's D <= 128.
        w2, b2: [D, hidden] and [D], as `nn.Linear(hidden, D)` keeps them.
        activation: "gelu" (erf), "gelu_tanh" or "relu".
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
    backend = resolve(kernels, x.device, "ffn", x.dtype, lambda backend: ffn_limits(backend, w1.shape[1], len(w1)))
    if backend == "triton":
        from .triton import ffn_triton

        return ffn_triton(x, w1, b1, w2, b2, activation, dropout_p, mask_seed)
    run = ffn_native if backend == "native" else ffn_reference
    return run(x, w1, b1, w2, b2, activation, dropout_p, mask_seed)


def ffn_limits(backend: str, dim: int, hidden: int) -> str | None:
    """Why the kernels of `backend` do not take these widths; None if they do."""
    if hidden < 8 or hidden % 8:
        return f"hidden={hidden}; a positive multiple of 8 is needed"
    if dim < 1:
        return f"D={dim}; at least 1 is needed"
    if backend == "triton" and dim > TRITON_MAX_DIM:
        return f"D={dim}; kernels='triton' takes up to {TRITON_MAX_DIM}"
    if backend == "triton" and hidden > TRITON_MAX_HIDDEN:
        return f"hidden={hidden}; kernels='triton' takes up to {TRITON_MAX_HIDDEN}"
    return None


def _check(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor,
           activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    if x.dim() < 1 or w1.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, w1 {tuple(w1.shape)}; [..., D] and [hidden, D] are needed")
    hidden, dim = w1.shape
    expected = {"x": (*x.shape[:-1], dim), "b1": (hidden,), "w2": (dim, hidden), "b2": (dim,)}
    for name, tensor in (("x", x), ("b1", b1), ("w2", w2), ("b2", b2)):
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with w1 {tuple(w1.shape)} it must be "
                             f"{expected[name]}")
    same_float({"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2})
