"""What the optimizers keep of a table between steps: names, shapes and dtypes, how it is made and what is refused."""

from collections.abc import Mapping
from typing import Any

import torch

from ..philox import as_seed
from .rule import RowState

MOMENTS = {"sgd": (), "rowwise-adagrad": ("sum",), "adagrad": ("sum",), "lazy-adam": ("exp_avg", "exp_avg_sq")}
# "last_step" with decay_untouched, "seed" for bf16; "step" with either, and for lazy-adam.
KEPT = {rule: (*moments, "last_step", "step", "seed") for rule, moments in MOMENTS.items()}
_FLOATS = (torch.float32, torch.bfloat16)
_DTYPES = {"sum": (torch.float32,), "exp_avg": _FLOATS, "exp_avg_sq": _FLOATS, "last_step": (torch.int32,),
           "step": (torch.int64,), "seed": (torch.int64,)}


def _shape(name: str, rule: str, table: torch.Tensor) -> tuple[int, ...]:
    """The shape of a state entry of `table` [num_rows, dim]."""
    if name == "step":
        return ()
    if name == "seed":
        return (1,)
    rowwise = name == "last_step" or (name == "sum" and rule == "rowwise-adagrad")
    return tuple(table.shape[:1] if rowwise else table.shape)


def check_state(state: Mapping[str, Any], rule: str, table: torch.Tensor, index: int, in_use: bool = True) -> None:
    """Look at what a rule would read of the state of `table`, the optimizer's table number `index`.

    Args:
        in_use: the state must lie where its table does, and without gaps.

    Raises ValueError for an entry of another shape, for one that is missing beside others and for a wrong place;
    TypeError for one that is no tensor or of a dtype that the rule does not keep.
    """
    names = [name for name in KEPT[rule] if name in state]
    error: type[Exception] = ValueError
    for name in names:
        value, shape = state[name], _shape(name, rule, table)
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            wrong, error = f"is {value!r}; a dense tensor is needed", TypeError
        elif value.shape != shape:
            wrong = f"has shape {tuple(value.shape)}; {shape} is needed"
        elif value.dtype not in _DTYPES[name]:
            wrong, error = f"has dtype {value.dtype}; {' or '.join(map(str, _DTYPES[name]))} is needed", TypeError
        elif in_use and value.device != table.device:
            wrong = (f"is on {value.device} and the table on {table.device}: load the optimizer's state_dict again "
                     "after moving the table")
        elif in_use and not value.is_contiguous():
            wrong = f"has strides {value.stride()}; a contiguous tensor is needed"
        else:
            continue
        raise error(f"state {name!r} of table {index} {tuple(table.shape)} {wrong}")
    counted = rule == "lazy-adam" or "last_step" in names or "seed" in names
    for name in (*MOMENTS[rule], "step") if counted else MOMENTS[rule]:
        if names and name not in names:
            raise ValueError(f"the state of table {index} {tuple(table.shape)} has {', '.join(names)} and lacks "
                             f"{name!r}")
    if "exp_avg" in names and state["exp_avg"].dtype != state["exp_avg_sq"].dtype:
        raise TypeError(f"the moments of table {index} {tuple(table.shape)} have dtypes {state['exp_avg'].dtype} and "
                        f"{state['exp_avg_sq'].dtype}; one is needed")


def loaded_state(saved: Any, rule: str, table: torch.Tensor, index: int) -> dict[str, torch.Tensor]:
    """A copy of a table's part of a state_dict: contiguous, on the table's device, dtypes as saved or else fp32.

    Raises as `check_state`, and ValueError for an entry that the rule does not keep.
    """
    where = f"of table {index} {tuple(table.shape)}"
    if not isinstance(saved, Mapping):
        raise TypeError(f"the state {where} is {saved!r}; a dict is needed")
    for name in saved:
        if name not in KEPT[rule]:
            raise ValueError(f"the state {where} has the entry {name!r}, which {rule} does not keep; it keeps "
                             f"{', '.join(KEPT[rule])}")
    state = dict(saved)
    if "step" in state:
        state["step"] = _whole(state["step"], where)
    for name in MOMENTS[rule]:  # torch's optimizers keep them in the dtype of the table
        value = state.get(name)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype not in _DTYPES[name]:
            state[name] = value.float()
    check_state(state, rule, table, index, in_use=False)
    return {name: value.detach().to(table.device, copy=True, memory_format=torch.contiguous_format)
            for name, value in state.items()}


def _whole(step: Any, where: str) -> Any:
    """The number of steps as int64 []; torch's own optimizers have it as a number or as a float tensor []."""
    if not isinstance(step, (int, float)) and not (isinstance(step, torch.Tensor) and step.numel() == 1):
        return step  # for `check_state` to refuse
    number = float(step)
    if not (number >= 0 and number.is_integer()):
        raise ValueError(f"state 'step' {where} is {number}; a whole number from 0 on is needed")
    return torch.tensor(int(step), dtype=torch.int64)


def missing_state(state: Mapping[str, torch.Tensor], rule: str, table: torch.Tensor, index: int,
                  group: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a step of `table` needs beside `state`: zeros, and the seed of a table or moments in bf16."""
    dtype = group.get("state_dtype", torch.float32)
    made = {name: torch.zeros(_shape(name, rule, table), dtype=dtype, device=table.device)
            for name in MOMENTS[rule] if name not in state}
    both = {**state, **made}
    if group["decay_untouched"] and "last_step" not in state:
        made["last_step"] = torch.zeros(table.shape[0], dtype=torch.int32, device=table.device)
        if "step" in state:  # decay of untouched rows was switched on just now: the steps before do not count
            made["last_step"] += state["step"]
    if "seed" not in state and torch.bfloat16 in (table.dtype, *(both[name].dtype for name in MOMENTS[rule])):
        seed = group["seed"]
        made["seed"] = as_seed(None if seed is None else (int(seed) + index + 1) % 2**63, table.device)
    if "step" not in state and (rule == "lazy-adam" or {*state, *made} & {"last_step", "seed"}):
        made["step"] = torch.zeros((), dtype=torch.int64, device=table.device)
    return made


def row_state(state: Mapping[str, torch.Tensor]) -> RowState:
    """The state as the backends take it."""
    return RowState(state.get("sum", state.get("exp_avg")), state.get("exp_avg_sq"), state.get("last_step"),
                    state.get("step"), state.get("seed"))
