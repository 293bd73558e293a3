"""The low-rank cross layer of DCN-V2: checks, then the chosen backend."""

import torch

from ..backend import resolve
from ..checks import autocast, same_float
from .operator import cross, supports
from .reference import low_rank_cross_reference


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
    backend = resolve(kernels, x.device, "low_rank_cross", x.dtype, lambda of: supports(of, width, rank))
    if backend == "eager":
        return low_rank_cross_reference(x0, x, u, v, bias)
    if backend == "native":  # its operator takes fp32 alone
        return cross(*(t.float() for t in (x0, x, u, v, bias))).to(x.dtype)
    return cross(x0, x, u, v, bias)
