"""The native lookup with its (ids, rows) gradient, and the native row updates."""

from typing import Any

import torch

from ..library import LIBRARY


class _Lookup(torch.autograd.Function):
    """weight[ids]; the gradient is a sparse COO tensor of (ids, rows), neither coalesced nor checked again."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.table = weight.shape
        return torch.ops.ctr.embedding_lookup(weight, ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (ids,) = ctx.saved_tensors
        rows = grad.reshape(-1, ctx.table[1])
        return torch.sparse_coo_tensor(ids.reshape(1, -1).long(), rows, ctx.table, check_invariants=False), None


def embedding_lookup_native(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """weight [num_rows, dim], ids [...] already checked -> [..., dim]."""
    return _Lookup.apply(weight, ids.contiguous())


def use_huge_pages_native(table: torch.Tensor) -> None:
    """Ask for 2 MB pages for a table that nothing was written to yet: a third off lookup and update on Linux."""
    torch.ops.ctr.use_huge_pages(table)


def first_bad_id_native(ids: torch.Tensor, num_rows: int) -> int:
    """Flat position of the first id outside [0, num_rows), or -1."""
    return torch.ops.ctr.first_bad_id(ids.contiguous(), num_rows)


def sgd_native(weight: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, lr: float) -> None:
    """`sgd_reference`, in place."""
    torch.ops.ctr.sparse_sgd(weight, ids.contiguous(), rows.contiguous(), float(lr))


def rowwise_adagrad_native(weight: torch.Tensor, state: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor,
                           lr: float, eps: float) -> None:
    """`rowwise_adagrad_reference`, in place."""
    torch.ops.ctr.sparse_rowwise_adagrad(weight, state, ids.contiguous(), rows.contiguous(), float(lr), eps)


def _fake_lookup(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.empty(*ids.shape, weight.shape[1], dtype=weight.dtype, device=weight.device)


def _fake_update(*_: Any) -> None:
    return None


torch.library.register_fake("ctr::embedding_lookup", _fake_lookup, lib=LIBRARY)
torch.library.register_fake("ctr::sparse_sgd", _fake_update, lib=LIBRARY)
torch.library.register_fake("ctr::sparse_rowwise_adagrad", _fake_update, lib=LIBRARY)
