"""The sorted ids of a lookup: found while the model runs, used by the row update that follows.

A sort depends on ids alone, so that on CUDA it runs on a stream of its own beside the forward pass: forked from the
current stream at the lookup, joined to it in the lookup's backward, both by events, so that a CUDA graph may hold it.
A graph that captures a forward pass without its backward must do so under `torch.no_grad`, where nothing is sorted.
"""

from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_STREAMS: dict[torch.device, torch.cuda.Stream] = {}
_PLANS = WeakTensorKeyDictionary()  # table -> the plan of its latest lookup


class Plan(NamedTuple):
    """The ids of a lookup in ascending order."""

    ids: torch.Tensor  # int64 [1, n], the indices of the gradient to come; held, so that their memory stays theirs
    version: int  # of ids when they were sorted
    sorted_ids: torch.Tensor  # int32 or int64 [n]
    order: torch.Tensor  # int64 [n]: sorted_ids[i] = ids[0, order[i]]
    done: torch.cuda.Event | None  # None: on a CPU

    def join(self) -> None:
        """Let the current stream wait for the sort, and the sort's memory for the current stream."""
        if self.done is not None:
            stream = torch.cuda.current_stream(self.ids.device)
            stream.wait_event(self.done)
            self.sorted_ids.record_stream(stream)
            self.order.record_stream(stream)


def sort_ids(ids: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sorted ids, their positions) of ids [n], stable; half the radix passes where int32 holds every row number."""
    keys = ids.to(torch.int32) if num_rows < 2**31 else ids.long()
    return torch.sort(keys, stable=True)


def start_plan(weight: torch.Tensor, ids: torch.Tensor) -> Plan:
    """Begin to sort ids int64 [1, n], which the gradient of `weight` [num_rows, dim] will have as its indices."""
    flat, num_rows, done = ids[0], weight.shape[0], None
    if ids.device.type == "cuda":
        stream = _STREAMS.setdefault(ids.device, torch.cuda.Stream(ids.device))
        stream.wait_stream(torch.cuda.current_stream(ids.device))
        with torch.cuda.stream(stream):
            sorted_ids, order = sort_ids(flat, num_rows)
            done = stream.record_event()
        ids.record_stream(stream)
    else:
        sorted_ids, order = sort_ids(flat, num_rows)
    _PLANS[weight] = Plan(ids, ids._version, sorted_ids, order, done)
    return _PLANS[weight]


def row_gradient(indices: torch.Tensor, plan: Plan | None, rows: torch.Tensor, table: torch.Size) -> torch.Tensor:
    """The gradient of a table of that shape: rows [n, dim] at indices int64 [1, n], neither coalesced nor checked.

    From here on the plan of these indices, if any, may be used.
    """
    if plan is not None:
        plan.join()
    return torch.sparse_coo_tensor(indices, rows, table, check_invariants=False)


def take_plan(weight: torch.Tensor, ids: torch.Tensor) -> Plan | None:
    """The plan of the latest lookup in `weight` if it is one of these very ids [n], unchanged since; else None.

    A gradient of other ids, of several lookups, or of ids that were overwritten has no plan.
    """
    plan = _PLANS.pop(weight, None)
    if plan is None or plan.ids.data_ptr() != ids.data_ptr() or plan.ids.numel() != ids.numel():
        return None
    return plan if plan.ids._version == plan.version and ids.is_contiguous() else None
