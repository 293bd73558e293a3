"""Sparse-row updates of an embedding table in plain PyTorch: the specification of the optimizers.

The gradient of a step is (ids [N], rows [N, dim]) with repeated ids. Duplicates are summed first, then each
touched row is read and written once; untouched rows are not read at all.
"""

import torch


def sum_duplicates(ids: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(distinct ids ascending [U], summed rows [U, dim] in fp32 or wider) of ids [N], rows [N, dim]."""
    distinct, inverse = torch.unique(ids, sorted=True, return_inverse=True)
    wide = torch.promote_types(rows.dtype, torch.float32)
    summed = torch.zeros(distinct.numel(), rows.shape[1], dtype=wide, device=rows.device)
    return distinct, summed.index_add_(0, inverse, rows.to(wide))


def sgd_reference(weight: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, lr: float | torch.Tensor) -> None:
    """weight[r] -= lr * g_r, in place, for every distinct row r of ids; g_r is the sum over duplicates."""
    distinct, grad = sum_duplicates(ids, rows)
    weight[distinct] = (weight[distinct].to(grad.dtype) - lr * grad).to(weight.dtype)


def rowwise_adagrad_reference(
    weight: torch.Tensor,
    state: torch.Tensor,
    ids: torch.Tensor,
    rows: torch.Tensor,
    lr: float | torch.Tensor,
    eps: float,
) -> None:
    """s_r += mean(g_r^2); weight[r] -= lr * g_r / (sqrt(s_r) + eps), in place; state is fp32 [num_rows].

    Adagrad (Duchi et al. 2011) with one accumulator a row, the mean over the row's elements.
    """
    distinct, grad = sum_duplicates(ids, rows)
    accumulated = state[distinct].to(grad.dtype) + grad.square().mean(dim=1)
    state[distinct] = accumulated.to(state.dtype)
    step = lr * grad / (accumulated.sqrt() + eps).unsqueeze(1)
    weight[distinct] = (weight[distinct].to(grad.dtype) - step).to(weight.dtype)
