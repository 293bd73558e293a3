"""What a step of the row optimizers refuses before it writes anything: hyperparameters, gradients, ids, backends."""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch

from ..backend import CHOICES, resolve
from .table import check_ids, native_refusal

STATE_DTYPES = (torch.float32, torch.bfloat16)
_FLOAT32 = torch.finfo(torch.float32)
# Options of torch's optimizers that would change a step and that no rule here has.
_FOREIGN = ("maximize", "momentum", "dampening", "nesterov", "amsgrad", "lr_decay", "initial_accumulator_value",
            "differentiable")


def check_options(group: Mapping[str, Any]) -> None:
    """ValueError or TypeError for the first hyperparameter of a param group that is out of range.

    A learning rate in the memory of a GPU is not read, since the host would wait for it.
    """
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr is a tensor of {lr.numel()} elements; one is needed")
        lr = lr.item() if lr.device.type == "cpu" else 0.0
    _check_number("lr", lr)
    _check_number("weight_decay", decay)
    if lr * decay >= 1.0:
        raise ValueError(f"lr={lr} times weight_decay={decay} is {lr * decay}; below 1 is needed, or a step leaves "
                         "nothing of a row")
    if group["decay_untouched"] not in (False, True):
        raise TypeError(f"decay_untouched={group['decay_untouched']!r}: choose True or False")
    if group["decay_untouched"] and not decay:
        raise ValueError(f"decay_untouched=True needs a weight_decay above 0, not {decay}")
    if "eps" in group:
        _check_eps(group["eps"])
    if "betas" in group:
        _check_betas(group["betas"])
    if group.get("state_dtype", torch.float32) not in STATE_DTYPES:
        raise TypeError(f"state_dtype={group['state_dtype']}: choose torch.float32 or torch.bfloat16")
    if not (group["seed"] is None or isinstance(group["seed"], Integral)):
        raise TypeError(f"seed={group['seed']!r} must be a whole number or None")
    if group["kernels"] not in CHOICES:
        raise ValueError(f"kernels={group['kernels']!r}: choose one of {', '.join(CHOICES)}")
    for name in _FOREIGN:
        if group.get(name):
            raise ValueError(f"{name}={group[name]!r}: the sparse-row optimizers have no such option")


def _is_number(value: Any) -> bool:
    return isinstance(value, (float, int, Real))  # the first two are Real as well, and found faster


def _check_number(name: str, value: Any) -> None:
    """`value` must be at least 0 and finite in fp32, in which rows are computed."""
    if not _is_number(value):
        raise TypeError(f"{name}={value!r} must be a number")
    if not 0.0 <= value <= _FLOAT32.max:
        what = "negative" if value < 0.0 else "not finite in float32" if value > 0.0 else "no number"
        raise ValueError(f"{name}={value} is {what}")


def _check_eps(eps: Any) -> None:
    if _is_number(eps) and not eps >= _FLOAT32.tiny:  # elements without a gradient would be 0 / 0
        raise ValueError(f"eps={eps} must be positive" + (f", {_FLOAT32.tiny} at least" if eps > 0.0 else ""))
    _check_number("eps", eps)


def _check_betas(betas: Any) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(map(_is_number, betas)):
        raise TypeError(f"betas={betas!r}: two numbers are needed")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={betas}: each must be in [0, 1)")


def check_gradient(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64 [n], rows [n, dim]) of the gradient of `table` [num_rows, dim], which must be sparse by rows.

    Rows of half precision of another dtype than the table's come in fp32. Raises ValueError for another layout, shape
    or device, TypeError for another dtype than the table's, fp32 or a narrower one.
    """
    grad, shape = table.grad, tuple(table.shape)
    assert grad is not None
    if not grad.is_sparse:
        raise ValueError(f"the gradient of a table {shape} is dense, and one of (ids, rows) is needed; it is dense "
                         "where the weight is tied to another layer, where a penalty such as L2 is taken of the whole "
                         "table, and of an nn.Embedding without sparse=True")
    if table.dim() != 2 or grad.sparse_dim() != 1:
        raise ValueError(f"the gradient of a table {shape} has {grad.sparse_dim()} sparse dimensions and "
                         f"{grad.dense_dim()} dense ones; one of each is needed")
    if grad.shape != table.shape:
        raise ValueError(f"the gradient of a table {shape} has shape {tuple(grad.shape)}: the table was changed after "
                         "the backward pass")
    ids, rows = grad._indices()[0], grad._values()
    if rows.shape != (len(ids), shape[1]):
        raise ValueError(f"the gradient of a table {shape} has {len(ids)} ids and rows {tuple(rows.shape)}; "
                         f"({len(ids)}, {shape[1]}) is needed")
    if rows.device != table.device:
        raise ValueError(f"the gradient of a table on {table.device} is on {rows.device}: the table was moved after "
                         "the backward pass")
    if rows.is_floating_point() and rows.dtype.itemsize < 4 and rows.dtype != table.dtype:
        rows = rows.float()  # of lookups that give a narrower dtype than the table's
    if not table.is_floating_point() or rows.dtype not in (table.dtype, torch.float32):
        raise TypeError(f"the gradient of a table of {table.dtype} has dtype {rows.dtype}; that of the table, "
                        "torch.float32 or a narrower one is needed")
    return ids, rows


def choose_backend(kernels: str, table: torch.Tensor, ids: torch.Tensor) -> str:
    """The backend that updates `table`: "eager", "native" or "triton".

    Raises as `backend.resolve`, ValueError for a table whose layout the chosen one does not take, and IndexError for
    an id outside the table, which the kernels of Triton leave out.
    """
    backend = resolve(kernels, table.device, "sparse_update", table.dtype)
    reason = None
    if backend == "triton":
        from .triton import refusal

        reason = refusal(table)
    elif backend == "native":
        reason = native_refusal(table)
    if reason is not None and kernels != "auto":
        raise ValueError(reason)
    backend = backend if reason is None else "eager"
    if backend != "triton":
        check_ids(ids, table.shape[0])
    return backend
