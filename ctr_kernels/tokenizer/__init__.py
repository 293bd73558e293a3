"""Lookup and tokens of a row in one pass: checks, then the chosen backend."""

import torch

from ..backend import resolve
from ..checks import same_float
from ..sparse_update.table import check_ids
from .reference import field_tokens_reference


def field_tokens(
    weight: torch.Tensor,
    ids: torch.Tensor,
    dense: torch.Tensor,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor,
    cls: torch.Tensor | None = None,
    field_bias: torch.Tensor | None = None,
    *,
    kernels: str = "auto",
) -> torch.Tensor:
    """Tokens CLS | dense dense_weight^T + dense_bias | weight[ids] + field_bias, written where they belong.

    The tokens of FT-Transformer (Gorishniy et al. 2021, section 3.3) with one token for all numeric features.

    Args:
        weight: [num_rows, D], the embedding table; its gradient is sparse: (ids, rows), not coalesced.
        ids: int32 or int64 [B, K], in [0, num_rows). On CPUs another id raises IndexError; on a GPU its token is NaN.
        dense: [B, N], numeric features.
        dense_weight, dense_bias: [D, N] and [D], as `nn.Linear(N, D)` keeps them.
        cls: [D], the first token of every row; None leaves it out.
        field_bias: [K, D], added to the rows; None adds nothing.
        kernels: "auto", "eager" or "triton".

    Returns: [B, T, D], dtype of weight, T = K + 1, and 1 more with cls; in that dtype under autocast, too.

    Raises ValueError (shapes, limits), TypeError (dtypes), BackendUnavailable (a backend that cannot run).

    >>> weight, ids, dense = torch.randn(100, 64), torch.randint(100, (2, 26)), torch.rand(2, 13)
    >>> field_tokens(weight, ids, dense, torch.randn(64, 13), torch.zeros(64)).shape
    torch.Size([2, 27, 64])
    """
    _check(weight, ids, dense, dense_weight, dense_bias, cls, field_bias)
    if ids.device.type == "cpu":
        check_ids(ids, len(weight))
    if resolve(kernels, weight.device, "field_tokens", weight.dtype) == "triton":
        from .triton import field_tokens_triton as run
    else:
        run = field_tokens_reference
    return run(weight, ids, dense, dense_weight, dense_bias, cls, field_bias)


def _check(weight: torch.Tensor, ids: torch.Tensor, dense: torch.Tensor, dense_weight: torch.Tensor,
           dense_bias: torch.Tensor, cls: torch.Tensor | None, field_bias: torch.Tensor | None) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids have dtype {ids.dtype}; int32 or int64 is needed")
    wanted = {"[num_rows, D]": ("weight", weight), "[B, K]": ("ids", ids), "[B, N]": ("dense", dense)}
    for shape, (name, tensor) in wanted.items():
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {shape} is needed")
    (batch, fields), dim = ids.shape, weight.shape[1]
    named = {"dense": (dense, (batch, dense.shape[1])), "dense_weight": (dense_weight, (dim, dense.shape[1])),
             "dense_bias": (dense_bias, (dim,)), "cls": (cls, (dim,)), "field_bias": (field_bias, (fields, dim))}
    given = {name: (tensor, shape) for name, (tensor, shape) in named.items() if tensor is not None}
    for name, (tensor, expected) in given.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with ids {tuple(ids.shape)} and weight "
                             f"{tuple(weight.shape)} it must be {expected}")
    same_float({"weight": weight, **{name: tensor for name, (tensor, _) in given.items()}})
    if ids.device != weight.device:
        raise ValueError(f"ids are on {ids.device}, weight is on {weight.device}")
