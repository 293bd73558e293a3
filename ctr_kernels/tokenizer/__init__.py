"""Lookup and tokens of a row in one pass: checks, then the chosen backend."""

import torch

from ..backend import resolve
from ..checks import FLOATS, same_float
from ..philox import as_seed, check_dropout
from ..sparse_update.table import check_ids
from .operator import supports
from .reference import NUMERIC, History, field_tokens_reference

__all__ = ["History", "field_tokens"]


def field_tokens(
    weight: torch.Tensor,
    ids: torch.Tensor,
    dense: torch.Tensor,
    dense_weight: torch.Tensor,
    dense_bias: torch.Tensor | None,
    cls: torch.Tensor | None = None,
    field_bias: torch.Tensor | None = None,
    *,
    numeric: str = "token",
    history: History | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    kernels: str = "auto",
) -> torch.Tensor:
    """Tokens CLS | numeric | a token for each field, written where they belong.

    Numeric tokens, of the features x: "token", one for all, x dense_weight^T + dense_bias (the baseline study);
    "affine", one each, x_j dense_weight_j + dense_bias_j (FT-Transformer: Gorishniy et al. 2021, section 3.3);
    "scaled", x_j dense_weight_j (AutoInt: Song et al. 2019, eq. 4). The token of field k:
    dropout(weight[ids_k]) + sum_s history.weight_sk (h_sk - mean_sk) scale_sk + history.bias_k + field_bias_k.

    Args:
        weight: [num_rows, D], the embedding table; its gradient is sparse: (ids, rows), not coalesced, the rows in the
            dtype of the tokens.
        ids: int32 or int64 [B, K], in [0, num_rows). On CPUs another id raises IndexError; on a GPU its token is NaN.
        dense: [B, N + S K], numeric features x and behind them, statistic by statistic, the history h of the fields.
        dense_weight, dense_bias: [D, N] and [D] for "token", as `nn.Linear(N, D)` keeps them; [N, D] each for "affine";
            [N, D] and None for "scaled".
        cls: [D], the first token of every row; None leaves it out.
        field_bias: [K, D], added to the rows; None adds nothing.
        numeric: "token", "affine" or "scaled".
        history: History(weight [S, K, D], bias [K, D], mean [S K], scale [S K]); None: S = 0. mean and scale are
            constants without a gradient.
        dropout_p: probability of leaving out a field's row, in [0, 1); the others are divided by 1 - dropout_p. The
            mask is `philox.py`'s of B rows and K columns.
        seed: 64-bit seed of the mask (int, or int64 tensor [1]); None draws one from torch's generator.
        kernels: "auto", "eager" or "triton".

    Returns: [B, T, D], T = K + 1 ("token") or K + N, and 1 more with cls; dtype of dense_weight, which all tensors
    but `weight` share, under autocast, too.

    Raises ValueError (shapes, limits), TypeError (dtypes), BackendUnavailable (a backend that cannot run).

    >>> weight, ids, dense = torch.randn(100, 64), torch.randint(100, (2, 26)), torch.rand(2, 13)
    >>> field_tokens(weight, ids, dense, torch.randn(64, 13), torch.zeros(64)).shape
    torch.Size([2, 27, 64])
    >>> field_tokens(weight, ids, dense, torch.randn(13, 64), None, numeric="scaled", dropout_p=0.2).shape
    torch.Size([2, 39, 64])
    """
    _check(weight, ids, dense, dense_weight, dense_bias, cls, field_bias, numeric, history)
    check_dropout(dropout_p)
    mask_seed = as_seed(seed, weight.device) if dropout_p > 0.0 else None
    if ids.device.type == "cpu":
        check_ids(ids, len(weight))
    statistics = 0 if history is None else len(history.weight)
    if resolve(kernels, weight.device, "field_tokens", dense_weight.dtype,
               lambda of: supports(of, weight.shape[1], statistics)) == "triton":
        from .triton import field_tokens_triton as run
    else:
        run = field_tokens_reference
    return run(weight, ids, dense, dense_weight, dense_bias, cls, field_bias, numeric, history, dropout_p, mask_seed)


def _check(weight: torch.Tensor, ids: torch.Tensor, dense: torch.Tensor, dense_weight: torch.Tensor,
           dense_bias: torch.Tensor | None, cls: torch.Tensor | None, field_bias: torch.Tensor | None, numeric: str,
           history: History | None) -> None:
    if numeric not in NUMERIC:
        raise ValueError(f"numeric={numeric!r}: choose one of {', '.join(NUMERIC)}")
    if (dense_bias is None) != (numeric == "scaled"):
        bias = "None" if dense_bias is None else f"a tensor {tuple(dense_bias.shape)}"
        raise ValueError(f"dense_bias is {bias}; numeric='scaled' has none, 'token' and 'affine' have one")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids have dtype {ids.dtype}; int32 or int64 is needed")
    wanted = {"[num_rows, D]": ("weight", weight), "[B, K]": ("ids", ids), "[B, N + S K]": ("dense", dense)}
    for shape, (name, tensor) in wanted.items():
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {shape} is needed")
    (batch, fields), dim, width = ids.shape, weight.shape[1], dense.shape[1]
    if history is not None and history.weight.dim() != 3:
        raise ValueError(f"history.weight has shape {tuple(history.weight.shape)}; [S, K, D] is needed")
    statistics = 0 if history is None else len(history.weight)
    features = width - statistics * fields
    if features < 1 or (history is not None and statistics < 1):
        raise ValueError(f"dense has shape {tuple(dense.shape)}; with {statistics} statistics of {fields} fields it "
                         "must be [B, N + S K], N and S at least 1")
    whole = numeric == "token"
    named: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]] = {
        "dense": (dense, (batch, width)), "dense_weight": (dense_weight, (dim, features) if whole else (features, dim)),
        "dense_bias": (dense_bias, (dim,) if whole else (features, dim)), "cls": (cls, (dim,)),
        "field_bias": (field_bias, (fields, dim))}
    if history is not None:
        named |= {"history.weight": (history.weight, (statistics, fields, dim)),
                  "history.bias": (history.bias, (fields, dim)), "history.mean": (history.mean, (statistics * fields,)),
                  "history.scale": (history.scale, (statistics * fields,))}
    given = {"dense_weight": dense_weight}
    for name, (part, expected) in named.items():
        if part is None:
            continue
        given[name] = part
        if tuple(part.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(part.shape)}; with ids {tuple(ids.shape)}, weight "
                             f"{tuple(weight.shape)} and dense {tuple(dense.shape)} it must be {expected}")
    same_float(given)
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight has dtype {weight.dtype}; floating point is needed")
    for name, tensor in (("ids", ids), ("dense_weight", dense_weight)):
        if tensor.device != weight.device:
            raise ValueError(f"{name} are on {tensor.device}, weight is on {weight.device}")
