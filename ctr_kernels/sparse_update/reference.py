"""Sparse-row updates of an embedding table in plain PyTorch: the specification of the optimizers.

The gradient of a step is (ids [N], rows [N, dim]) with repeated ids. Duplicates are summed first, then each
touched row is read and written once; untouched rows are not read at all.
"""

import torch

from ..philox import philox
from .rule import KEY_STEP, RowState, Rule


def sum_duplicates(ids: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(distinct ids ascending [U], summed rows [U, dim] in fp32 or wider) of ids [N], rows [N, dim]."""
    distinct, inverse = torch.unique(ids, sorted=True, return_inverse=True)
    wide = torch.promote_types(rows.dtype, torch.float32)
    summed = torch.zeros(distinct.numel(), rows.shape[1], dtype=wide, device=rows.device)
    return distinct, summed.index_add_(0, inverse, rows.to(wide))


def update_reference(weight: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, rule: Rule, state: RowState) -> None:
    """One step of `rule` (see rule.py), in place, for every distinct row of ids [N] with gradients rows [N, dim].

    Raises IndexError for an id outside the table, before anything is written.
    """
    distinct, grad = sum_duplicates(ids, rows)
    if len(distinct) and not 0 <= distinct[0] <= distinct[-1] < len(weight):
        raise IndexError(f"ids from {distinct[0]} to {distinct[-1]} for a table of {len(weight)} rows")
    lr = torch.as_tensor(rule.lr, dtype=torch.float64, device=weight.device)
    direction, rate = grad, lr
    if rule.name == "lazy-adam":
        step = state.step.double()
        rate = lr * (1 - rule.beta2**step).sqrt() / (1 - rule.beta1**step)
        mean, square = state.first[distinct].to(grad.dtype), state.second[distinct].to(grad.dtype)
        mean = mean + (1 - rule.beta1) * (grad - mean)
        square = square + (1 - rule.beta2) * (grad.square() - square)
        direction = mean / (square.sqrt() + rule.eps)
        _write(state.first, distinct, mean, 1, state)
        _write(state.second, distinct, square, 2, state)
    elif rule.name != "sgd":
        squares = grad.square()
        if rule.name == "rowwise-adagrad":
            squares = squares.mean(dim=1, keepdim=True)
        total = state.first[distinct].to(grad.dtype).view_as(squares) + squares
        direction = grad / (total.sqrt() + rule.eps)
        _write(state.first, distinct, total.view(len(distinct), *state.first.shape[1:]), 1, state)
    row = weight[distinct].to(grad.dtype)
    if rule.weight_decay or state.last is not None:
        row = row * _keep(distinct, lr * rule.weight_decay, state).to(row.dtype)
    _write(weight, distinct, row - rate * direction, 0, state)


def _keep(distinct: torch.Tensor, decay: torch.Tensor, state: RowState) -> torch.Tensor:
    """What is left of each row after decay, fp64 [U, 1] or []; `state.last` is brought up to date."""
    if state.last is None:
        return 1 - decay
    steps = state.step - state.last[distinct]
    state.last[distinct] = state.step.to(torch.int32)
    return ((1 - decay) ** steps)[:, None]


def _write(tensor: torch.Tensor, distinct: torch.Tensor, values: torch.Tensor, which: int, state: RowState) -> None:
    """tensor[distinct] = values, rounded stochastically where the tensor is bf16."""
    if tensor.dtype == torch.bfloat16:
        values = round_stochastically(values.float(), rounding_bits(tensor, distinct, which, state))
    tensor[distinct] = values.to(tensor.dtype)


def rounding_bits(tensor: torch.Tensor, distinct: torch.Tensor, which: int, state: RowState) -> torch.Tensor:
    """The 16 random bits of each element of the rows distinct [U], as int32 [U, dim]; see rule.py."""
    num_rows, dim = tensor.shape
    groups = -(-dim // 8)
    counter = (which * num_rows + distinct)[:, None] * groups + torch.arange(groups, device=tensor.device)
    key = state.seed + state.step * (KEY_STEP - 2**64)  # int64 wraps modulo 2^64
    words = philox(key, counter.flatten()).view(-1, groups, 4, 1)
    halves = (words >> torch.tensor([0, 16], device=tensor.device)) & 0xFFFF
    return halves.reshape(-1, groups * 8)[:, :dim].int()


def round_stochastically(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """fp32 values to bf16, up with the probability of what is cut off; bits int32 in [0, 2^16) of the same shape."""
    rounded = (values.view(torch.int32) + bits) & -0x10000
    return torch.where(values.isfinite(), rounded.view(torch.float32), values).to(torch.bfloat16)
