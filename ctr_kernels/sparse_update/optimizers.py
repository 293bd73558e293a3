"""SparseSGD, SparseRowwiseAdagrad, SparseAdagrad, SparseLazyAdam: torch optimizers that touch only a step's rows."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..backend import CHOICES, resolve
from ..philox import as_seed
from .native import update_native
from .plan import take_plan
from .reference import update_reference
from .rule import RowState, Rule

_STATE_DTYPES = (torch.float32, torch.bfloat16)


class _SparseRowOptimizer(torch.optim.Optimizer):
    """What all share: param groups, checks, state, and the walk over (ids, rows) of every table."""

    rule: str  # one of rule.RULES

    def __init__(self, params: Iterable[Any], kernels: str, **defaults: Any) -> None:
        if kernels not in CHOICES:
            raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(CHOICES)}")
        self.kernels = kernels
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises ValueError or TypeError for a hyperparameter out of range."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor of the state keeps its dtype: torch gives it that of the table."""
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        tables = [table for group in self.param_groups for table in group["params"]]
        for key, table in zip(keys, tables, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[table][name] = value.to(table.device, copy=True)
        for group, options in zip(self.param_groups, before, strict=True):
            group.update({name: value for name, value in options.items() if name not in group})  # of older versions

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the sparse gradients of all tables; returns the closure's loss, if one is given.

        Raises ValueError for a dense gradient: use `EmbeddingTable` or `nn.Embedding(sparse=True)`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for table in group["params"]:
                number += 1
                if table.grad is not None:
                    self._update(table, number, group)
        return loss

    def _update(self, table: torch.Tensor, number: int, group: dict[str, Any]) -> None:
        grad = table.grad
        assert grad is not None
        if not grad.is_sparse or grad.sparse_dim() != 1:
            raise ValueError(f"the gradient of a table {tuple(table.shape)} is dense; sparse rows are "
                             "needed: use EmbeddingTable or nn.Embedding(sparse=True)")
        ids, rows = grad._indices()[0], grad._values()
        if rows.dtype not in (table.dtype, torch.float32):
            raise TypeError(f"the gradient of a table of {table.dtype} has dtype {rows.dtype}; that of the table or "
                            "torch.float32 is needed")
        backend = resolve(self.kernels, table.device, "sparse_update", table.dtype)
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        rule = Rule(self.rule, group["lr"], group["weight_decay"], group.get("eps", 0.0), beta1, beta2)
        state = self._state_of(table, number, group)
        if backend == "triton":
            from .triton import update_triton

            update_triton(table, ids, rows, rule, state, take_plan(table, ids))
        else:
            (update_native if backend == "native" else update_reference)(table, ids, rows, rule, state)

    def _state_of(self, table: torch.Tensor, number: int, group: dict[str, Any]) -> RowState:
        """The table's state, made where it is not there yet, with the step counted up where a rule needs it."""
        state = self.state[table]
        if not state.keys() & {"sum", "exp_avg"}:
            state |= self._new_state(table, group)
        if group["decay_untouched"] and "last_step" not in state:
            state["last_step"] = torch.zeros(table.shape[0], dtype=torch.int32, device=table.device)
        if torch.bfloat16 in (table.dtype, group.get("state_dtype")) and "seed" not in state:
            seed = group["seed"]
            state["seed"] = as_seed(None if seed is None else (seed + number) % 2**63, table.device)
        if state.keys() & {"exp_avg", "last_step", "seed"} and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.int64, device=table.device)
        if "step" in state:
            state["step"] += 1
        return RowState(state.get("sum", state.get("exp_avg")), state.get("exp_avg_sq"), state.get("last_step"),
                        state.get("step"), state.get("seed"))

    def _new_state(self, table: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the rule alone keeps of a table."""
        return {}


def _check(group: dict[str, Any]) -> None:
    """ValueError or TypeError for the first hyperparameter out of range."""
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements; one is needed")
    if not lr >= 0.0:
        raise ValueError(f"lr={float(lr)} is negative" if lr < 0.0 else f"lr={float(lr)} is no number")
    if not decay >= 0.0:
        raise ValueError(f"weight_decay={decay} is negative" if decay < 0.0 else f"weight_decay={decay} is no number")
    if lr * decay >= 1.0:
        raise ValueError(f"lr={float(lr)} times weight_decay={decay} is {float(lr * decay)}; below 1 is needed, or a "
                         "step leaves nothing of a row")
    if group["decay_untouched"] and not decay:
        raise ValueError("decay_untouched=True needs a weight_decay above 0")
    if not group.get("eps", 1.0) > 0.0:
        raise ValueError(f"eps={group['eps']} must be positive")
    for beta in group.get("betas", ()):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas={group['betas']}: each must be in [0, 1)")
    if group.get("state_dtype", torch.float32) not in _STATE_DTYPES:
        raise TypeError(f"state_dtype={group['state_dtype']}: choose torch.float32 or torch.bfloat16")


class SparseSGD(_SparseRowOptimizer):
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
        super().__init__(params, kernels, lr=lr, weight_decay=weight_decay, decay_untouched=decay_untouched, seed=seed)


class SparseRowwiseAdagrad(_SparseRowOptimizer):
    """Adagrad (Duchi et al. 2011) with one fp32 accumulator a row: s += mean(g^2), w -= lr g / (sqrt(s) + eps).

    Args:
        eps: added to the root, > 0.
        params, lr, weight_decay, decay_untouched, seed, kernels: as SparseSGD has them.

    State: "sum", fp32 [num_rows], made at the first step of a table (4 bytes a row), and what SparseSGD has.

    >>> table = torch.nn.Embedding(10, 4, sparse=True)
    >>> optimizer = SparseRowwiseAdagrad(table.parameters(), lr=0.1)
    """

    rule = "rowwise-adagrad"

    def __init__(self, params: Iterable[Any], lr: float | torch.Tensor = 0.01, eps: float = 1e-8, *,
                 weight_decay: float = 0.0, decay_untouched: bool = False, seed: int | None = None,
                 kernels: str = "auto") -> None:
        super().__init__(params, kernels, lr=lr, eps=eps, weight_decay=weight_decay, decay_untouched=decay_untouched,
                         seed=seed)

    def _new_state(self, table: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"sum": torch.zeros(table.shape[0], dtype=torch.float32, device=table.device)}


class SparseAdagrad(SparseRowwiseAdagrad):
    """Adagrad with an accumulator for each element: s += g^2, w -= lr g / (sqrt(s) + eps), as torch.optim.Adagrad.

    Args: as SparseRowwiseAdagrad has them.

    State: "sum", fp32 [num_rows, dim]: as large as an fp32 table.

    >>> table = torch.nn.Embedding(10, 4, sparse=True)
    >>> optimizer = SparseAdagrad(table.parameters(), lr=0.1)
    """

    rule = "adagrad"

    def _new_state(self, table: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"sum": torch.zeros(table.shape, dtype=torch.float32, device=table.device)}


class SparseLazyAdam(_SparseRowOptimizer):
    """Adam (Kingma and Ba 2015) on the rows of the step only, as torch.optim.SparseAdam; see rule.py.

    The bias correction counts the steps of the table, not those of a row; rows that a step does not touch keep their
    moments.

    Args:
        betas: of the moments, each in [0, 1).
        eps: added to the root of the second moment before its bias is corrected, > 0.
        state_dtype: of both moments: torch.float32, or torch.bfloat16, stochastically rounded.
        params, lr, weight_decay, decay_untouched, seed, kernels: as SparseSGD has them.

    State: "exp_avg" and "exp_avg_sq" [num_rows, dim], "step", and what SparseSGD has.

    >>> table = torch.nn.Embedding(10, 4, sparse=True)
    >>> optimizer = SparseLazyAdam(table.parameters(), lr=0.001)
    """

    rule = "lazy-adam"

    def __init__(self, params: Iterable[Any], lr: float | torch.Tensor = 0.001,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, *,
                 state_dtype: torch.dtype = torch.float32, weight_decay: float = 0.0, decay_untouched: bool = False,
                 seed: int | None = None, kernels: str = "auto") -> None:
        super().__init__(params, kernels, lr=lr, betas=betas, eps=eps, state_dtype=state_dtype,
                         weight_decay=weight_decay, decay_untouched=decay_untouched, seed=seed)

    def _new_state(self, table: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(table.shape, dtype=group["state_dtype"], device=table.device)
                for name in ("exp_avg", "exp_avg_sq")}
