"""SparseSGD, SparseRowwiseAdagrad, SparseAdagrad, SparseLazyAdam: torch optimizers that touch only a step's rows."""

from collections.abc import Iterable
from typing import Any

import torch

from .base import SparseRowOptimizer


class SparseSGD(SparseRowOptimizer):
    """weight[r] -= lr * g_r for the rows of the step; no momentum.

    Args:
        params: tables [num_rows, dim] whose gradients are sparse, or param groups of such.
        lr: learning rate, >= 0 (float or 0-d tensor; a tensor on the table's device is read there).
        weight_decay: >= 0, decoupled: a touched row is first multiplied by 1 - lr * weight_decay.
        decay_untouched: multiply it by (1 - lr * weight_decay)^k, k the steps since it was touched last, as if every
            step had touched it (with the learning rate of now); an int32 a row of state.
        seed: of the stochastic rounding of a bf16 table; None draws one at the first step.
        kernels: "auto", "eager", "native" or "triton".

    State: none; "step" and "last_step" (int32 [num_rows]) with decay_untouched, "step" and "seed" for a bf16 table.

    >>> table = torch.nn.Embedding(10, 4, sparse=True)
    >>> optimizer = SparseSGD(table.parameters(), lr=0.1)
    >>> table(torch.tensor([3, 3])).sum().backward(); optimizer.step()
    """

    rule = "sgd"

    def __init__(self, params: Iterable[Any], lr: float | torch.Tensor = 0.01, *, weight_decay: float = 0.0,
                 decay_untouched: bool = False, seed: int | None = None, kernels: str = "auto") -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, decay_untouched=decay_untouched, seed=seed,
                         kernels=kernels)


class SparseRowwiseAdagrad(SparseRowOptimizer):
    """Adagrad (Duchi et al. 2011) with one fp32 accumulator a row: s += mean(g^2), w -= lr g / (sqrt(s) + eps).

    Args:
        eps: added to the root, > 0.
        params, lr, weight_decay, decay_untouched, seed, kernels: as SparseSGD has them.

    State: "sum", fp32 [num_rows], made at the first step of a table (4 bytes a row), and what SparseSGD has.

    >>> table = torch.nn.Embedding(10, 4, sparse=True)
    >>> optimizer = SparseRowwiseAdagrad(table.parameters(), lr=0.1)
    """

    rule = "rowwise-adagrad"
    options = {**SparseRowOptimizer.options, "eps": 1e-8}

    def __init__(self, params: Iterable[Any], lr: float | torch.Tensor = 0.01, eps: float = 1e-8, *,
                 weight_decay: float = 0.0, decay_untouched: bool = False, seed: int | None = None,
                 kernels: str = "auto") -> None:
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay, decay_untouched=decay_untouched,
                         seed=seed, kernels=kernels)


class SparseAdagrad(SparseRowwiseAdagrad):
    """Adagrad with an accumulator for each element: s += g^2, w -= lr g / (sqrt(s) + eps), as torch.optim.Adagrad.

    Args: as SparseRowwiseAdagrad has them.

    State: "sum", fp32 [num_rows, dim]: as large as an fp32 table.

    >>> table = torch.nn.Embedding(10, 4, sparse=True)
    >>> optimizer = SparseAdagrad(table.parameters(), lr=0.1)
    """

    rule = "adagrad"


class SparseLazyAdam(SparseRowOptimizer):
    """Adam (Kingma and Ba 2015) on the rows of the step only, as torch.optim.SparseAdam; see rule.py.

    The bias correction counts the steps of the table, not those of a row; rows that a step does not touch keep their
    moments.

    Args:
        betas: of the moments, each in [0, 1).
        eps: added to the root of the second moment before its bias is corrected, > 0.
        state_dtype: of both moments, when they are made: torch.float32, or torch.bfloat16, stochastically rounded.
        params, lr, weight_decay, decay_untouched, seed, kernels: as SparseSGD has them.

    State: "exp_avg" and "exp_avg_sq" [num_rows, dim], "step", and what SparseSGD has.

    >>> table = torch.nn.Embedding(10, 4, sparse=True)
    >>> optimizer = SparseLazyAdam(table.parameters(), lr=0.001)
    """

    rule = "lazy-adam"
    options = {**SparseRowOptimizer.options, "betas": (0.9, 0.999), "eps": 1e-8, "state_dtype": torch.float32}

    def __init__(self, params: Iterable[Any], lr: float | torch.Tensor = 0.001,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, *,
                 state_dtype: torch.dtype = torch.float32, weight_decay: float = 0.0, decay_untouched: bool = False,
                 seed: int | None = None, kernels: str = "auto") -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, state_dtype=state_dtype,
                         weight_decay=weight_decay, decay_untouched=decay_untouched, seed=seed, kernels=kernels)
