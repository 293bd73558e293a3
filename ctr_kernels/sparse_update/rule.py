"""What an update does to the rows of a step: the rules, their hyperparameters and the state they keep.

With g the sum of a row's gradients, t the step of the table (1, 2, ...) and k = t - (step that touched the row last):

    keep   1 - lr * weight_decay, or (1 - lr * weight_decay)^k if `RowState.last` counts the steps between
    sgd                w = keep w - lr g
    rowwise-adagrad    s += mean(g^2);                              w = keep w - lr g / (sqrt(s) + eps)
    adagrad            s += g^2;                                    w = keep w - lr g / (sqrt(s) + eps)
    lazy-adam          m += (1 - beta1) (g - m);  v += (1 - beta2) (g^2 - v)
                       w = keep w - lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps)

Adagrad: Duchi et al. 2011. Adam: Kingma and Ba 2015, in the lazy form of torch.optim.SparseAdam: moments of rows that
a step does not touch stay as they are, and t counts the steps of the table, not those of a row. Decay is decoupled
(Loshchilov and Hutter 2019): no accumulator sees it. The steps between decay at the learning rate of now.

Arithmetic is fp32. Where a table or a moment is bf16, results are rounded stochastically: up with the probability of
the fraction that is cut off, so that the mean of many steps is right, where rounding to nearest would lose every step
that is below half a unit in the last place (2^-9 of the weight). With `groups = ceil(dim / 8)`, the element
(row, column) of tensor number `which` (0: table, 1: first moment, 2: second) takes the 16 bits

    key     = seed + t * 0x9E3779B97F4A7C15                                     modulo 2^64
    counter = (which * num_rows + row) * groups + column // 8
    half    = column % 8: of word (half // 2) the low 16 bits if half is even, else the high ones

of Philox 4x32-10 (see philox.py); they are added to the bits below those of bf16, which are then cut off.
"""

from typing import NamedTuple

import torch

RULES = ("sgd", "rowwise-adagrad", "adagrad", "lazy-adam")
KEY_STEP = 0x9E3779B97F4A7C15


class Rule(NamedTuple):
    """A rule and its hyperparameters; those that a rule does not use are not read."""

    name: str
    lr: float | torch.Tensor
    weight_decay: float = 0.0
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999


class RowState(NamedTuple):
    """What a table [num_rows, dim] keeps between steps, all on its device; None: the rule needs no such state."""

    first: torch.Tensor | None = None  # s: fp32 [num_rows] or [num_rows, dim]; m: fp32 or bf16 [num_rows, dim]
    second: torch.Tensor | None = None  # v: fp32 or bf16 [num_rows, dim]
    last: torch.Tensor | None = None  # int32 [num_rows]: step that touched the row last, 0 at the start
    step: torch.Tensor | None = None  # int64 []: t of this step; for lazy-adam, `last` and bf16
    seed: torch.Tensor | None = None  # int64 [1]; for bf16


def mark_written(*tensors: torch.Tensor | None) -> None:
    """Tell autograd that a kernel writes them in place: a backward pass that has saved one of them then raises."""
    torch.autograd.graph.increment_version(
        [tensor for tensor in tensors if tensor is not None and not tensor.is_inference()])  # those have no version
