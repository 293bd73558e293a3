"""SparseSGD and SparseRowwiseAdagrad: torch optimizers that touch only the rows of the step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..backend import CHOICES, resolve
from .native import rowwise_adagrad_native, sgd_native
from .reference import rowwise_adagrad_reference, sgd_reference


class _SparseRowOptimizer(torch.optim.Optimizer):
    """What both share: param groups, checks, and the walk over (ids, rows) of every table."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], kernels: str) -> None:
        if kernels not in CHOICES:
            raise ValueError(f"kernels={kernels!r}: choose one of {', '.join(CHOICES)}")
        if defaults["lr"] < 0.0:
            raise ValueError(f"lr={defaults['lr']} is negative")
        self.kernels = kernels
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the sparse gradients of all tables; returns the closure's loss, if one is given.

        Raises ValueError for a dense gradient: use `EmbeddingTable` or `nn.Embedding(sparse=True)`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = param.grad
                if not grad.is_sparse or grad.sparse_dim() != 1:
                    raise ValueError(f"the gradient of a table {tuple(param.shape)} is dense; sparse rows are "
                                     "needed: use EmbeddingTable or nn.Embedding(sparse=True)")
                backend = resolve(self.kernels, param.device, "sparse_update", param.dtype)
                self._update(param, grad._indices()[0], grad._values(), group, backend)
        return loss

    def _update(self, weight: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, group: dict[str, Any],
                backend: str) -> None:
        raise TypeError("use SparseSGD or SparseRowwiseAdagrad")


class SparseSGD(_SparseRowOptimizer):
    """weight[r] -= lr * g_r for the rows of the step; no momentum, no decay, no state.

    Args:
        params: tables [num_rows, dim] whose gradients are sparse, or param groups of such.
        lr: learning rate, >= 0 (float or 0-d tensor).
        kernels: "auto", "eager", "native" or "triton".

    >>> table = torch.nn.Embedding(10, 4, sparse=True)
    >>> optimizer = SparseSGD(table.parameters(), lr=0.1)
    >>> table(torch.tensor([3, 3])).sum().backward(); optimizer.step()
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.01, *, kernels: str = "auto") -> None:
        super().__init__(params, {"lr": lr}, kernels)

    def _update(self, weight: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, group: dict[str, Any],
                backend: str) -> None:
        if backend == "triton":
            from .triton import sgd_triton as update
        else:
            update = sgd_native if backend == "native" else sgd_reference
        update(weight, ids, rows, group["lr"])


class SparseRowwiseAdagrad(_SparseRowOptimizer):
    """Adagrad (Duchi et al. 2011) with one fp32 accumulator a row: s += mean(g^2), w -= lr g / (sqrt(s) + eps).

    Args:
        params: tables [num_rows, dim] whose gradients are sparse, or param groups of such.
        lr: learning rate, >= 0 (float or 0-d tensor).
        eps: added to the root, > 0.
        kernels: "auto", "eager", "native" or "triton".

    State: "sum", fp32 [num_rows], made at the first step of a table (4 bytes a row).
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.01, eps: float = 1e-8, *, kernels: str = "auto") -> None:
        if eps <= 0.0:
            raise ValueError(f"eps={eps} must be positive")
        super().__init__(params, {"lr": lr, "eps": eps}, kernels)

    def _update(self, weight: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, group: dict[str, Any],
                backend: str) -> None:
        state = self.state[weight]
        if "sum" not in state:
            state["sum"] = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
        if backend == "triton":
            from .triton import rowwise_adagrad_triton as update
        else:
            update = rowwise_adagrad_native if backend == "native" else rowwise_adagrad_reference
        update(weight, state["sum"], ids, rows, group["lr"], group["eps"])
