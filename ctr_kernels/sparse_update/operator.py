"""`ctr::embedding_lookup` and `ctr::sparse_update`: one operator each for all backends."""

from typing import Any

import torch
from torch.nn import functional as F

from ..library import INTERPRETED, LIBRARY, implement_in_triton
from .inductor import let_inductor_hold_sparse_tensors
from .plan import Plan
from .rule import RULES, RowState, Rule, mark_written


def lookup_in_graph(weight: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight[ids] in a graph of torch.compile; the gradient of weight is the sparse (ids, rows), not coalesced."""
    rows: torch.Tensor = torch.ops.ctr.embedding_lookup(weight, ids.contiguous(), False)
    return rows.to(dtype)


def lookup_native(weight: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight [num_rows, dim], contiguous; ids [...] -> [..., dim] in `dtype`; the operator widens bf16 to fp32."""
    widen = dtype == torch.float32 and weight.dtype == torch.bfloat16
    rows: torch.Tensor = torch.ops.ctr.embedding_lookup(weight, ids.contiguous(), widen)
    return rows.to(dtype)


def use_huge_pages_native(table: torch.Tensor) -> None:
    """Ask for 2 MB pages for a table that nothing was written to yet: a third off lookup and update on Linux."""
    torch.ops.ctr.use_huge_pages(table)


def first_bad_id_native(ids: torch.Tensor, num_rows: int) -> int:
    """Flat position of the first id outside [0, num_rows), or -1."""
    return torch.ops.ctr.first_bad_id(ids.contiguous(), num_rows)


def update(weight: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, rule: Rule, state: RowState,
           plan: Plan | None = None) -> None:
    """`update_reference`, in place, by the kernels of the table's device. The plan, if any, is of these ids.

    A learning rate on the table's device, a GPU, is read there: nothing waits for it.
    """
    native = weight.device.type == "cpu" and not INTERPRETED  # which takes rows without gaps
    lr, lr_on_device = 0.0, None
    if isinstance(rule.lr, torch.Tensor) and rule.lr.device == weight.device and not native:
        lr_on_device = rule.lr
    else:
        lr = float(rule.lr)
    first, second = state.first if rule.name != "sgd" else None, state.second if rule.name == "lazy-adam" else None
    rows = rows.contiguous() if native else rows
    torch.ops.ctr.sparse_update(weight, first, second, state.last, ids.contiguous(), rows,
                                None if plan is None else plan.sorted_ids, None if plan is None else plan.order,
                                RULES.index(rule.name), lr, lr_on_device, rule.weight_decay, rule.eps, rule.beta1,
                                rule.beta2, state.step, state.seed)


def _fake_lookup(weight: torch.Tensor, ids: torch.Tensor, widen: bool) -> torch.Tensor:
    dtype = torch.float32 if widen else weight.dtype
    return torch.empty(*ids.shape, weight.shape[1], dtype=dtype, device=weight.device)


def _lookup(weight: torch.Tensor, ids: torch.Tensor, widen: bool) -> torch.Tensor:
    rows = F.embedding(ids, weight)
    return rows.float() if widen else rows


def _save_lookup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    weight, ids, _ = inputs
    ctx.save_for_backward(ids)
    ctx.table = weight.shape


def _backward_lookup(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    let_inductor_hold_sparse_tensors()
    (ids,) = ctx.saved_tensors
    indices, rows = ids.reshape(1, -1).long(), grad.reshape(-1, ctx.table[1])
    return torch.sparse_coo_tensor(indices, rows, ctx.table, check_invariants=False), None, None


def _fake_update(*_: Any) -> None:
    return None


def _update_in_place(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
    """The operator writes its first four arguments (see its schema in operators.inc), whoever calls it."""
    mark_written(*args[:4])
    with torch._C._AutoDispatchBelowADInplaceOrView():
        torch.ops.ctr.sparse_update.default.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)


implement_in_triton("sparse_update", ".sparse_update.triton", "update")
LIBRARY.impl("sparse_update", _update_in_place, "ADInplaceOrView", with_keyset=True)
LIBRARY.impl("embedding_lookup", _lookup, "CompositeExplicitAutograd")  # where there is no kernel of its own
torch.library.register_fake("ctr::embedding_lookup", _fake_lookup, lib=LIBRARY)
torch.library.register_autograd("ctr::embedding_lookup", _backward_lookup, setup_context=_save_lookup, lib=LIBRARY)
torch.library.register_fake("ctr::sparse_update", _fake_update, lib=LIBRARY)
