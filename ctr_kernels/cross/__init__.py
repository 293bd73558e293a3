"""The low-rank cross layer of DCN-V2: checks, then the chosen backend."""

import torch

from ..backend import resolve
from ..checks import autocast, same_float
from .native import low_rank_cross_native
from .reference import low_rank_cross_reference

TRITON_MAX_RANK = 64
TRITON_MAX_WEIGHT = 2**29  # elements of U or V: offsets are 32 bits wide


def low_rank_cross(
    x0: torch.Tensor,
    x: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    *,
    kernels: str = "auto",
) -> torch.Tensor:
    """x0 * (V (U x) + b) + x (Wang et al. 2021, section 3.5; U and V in the reverse order of the paper's).

    Args:
        x0, x: [B, W], the input of the cross network and of this layer.
        u: [R, W], as `nn.Linear(W, R)` keeps it.
        v, bias: [W, R] and [W], as `nn.Linear(R, W)` keeps them.
        kernels: "auto", "eager", "native" or "triton".

    Returns: [B, W], dtype of x; under autocast in its dtype.

    Raises ValueError (shapes, limits), TypeError (dtypes), BackendUnavailable (a backend that cannot run).

    >>> x = torch.randn(2, 429)
    >>> low_rank_cross(x, x, torch.randn(32, 429), torch.randn(429, 32), torch.zeros(429)).shape
    torch.Size([2, 429])
    """
    x0, x, u, v, bias = autocast(x0, x, u, v, bias)
    if x0.dim() != 2 or u.dim() != 2:
        raise ValueError(f"x0 has shape {tuple(x0.shape)}, u {tuple(u.shape)}; [B, W] and [R, W] are needed")
    (batch, width), rank = x0.shape, len(u)
    expected = {"x": (batch, width), "u": (rank, width), "v": (width, rank), "bias": (width,)}
    for name, tensor in (("x", x), ("u", u), ("v", v), ("bias", bias)):
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with x0 {tuple(x0.shape)} and u "
                             f"{tuple(u.shape)} it must be {expected[name]}")
    same_float({"x0": x0, "x": x, "u": u, "v": v, "bias": bias})
    backend = resolve(kernels, x.device, "low_rank_cross", x.dtype, lambda backend: cross_limits(backend, width, rank))
    if backend == "triton":
        from .triton import low_rank_cross_triton as run
    else:
        run = low_rank_cross_native if backend == "native" else low_rank_cross_reference
    return run(x0, x, u, v, bias)


def cross_limits(backend: str, width: int, rank: int) -> str | None:
    """Why the kernels of `backend` do not take a layer of these sizes; None if they do."""
    if width < 1 or rank < 1:
        return f"W={width}, R={rank}; both must be at least 1"
    if backend == "triton" and rank > TRITON_MAX_RANK:
        return f"R={rank}; kernels='triton' takes up to {TRITON_MAX_RANK}"
    if backend == "triton" and width * rank > TRITON_MAX_WEIGHT:
        return f"R W = {width * rank}; kernels='triton' takes up to {TRITON_MAX_WEIGHT}"
    return None
