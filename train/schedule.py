"""Learning-rate schedules: a warm-up, then constant, cosine or linear; one factor for all optimizers."""

import math
from collections.abc import Callable

import torch

SCHEDULES = ("constant", "cosine", "linear")


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Steps of warm-up: `warmup` itself, or that share of all steps if it is below 1.

    >>> warmup_steps(0.1, 2000), warmup_steps(50, 2000)
    (200, 50)
    """
    return round(warmup * total_steps) if warmup < 1 else round(warmup)


def factor_at(schedule: str, warmup: int, total_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate as a function of the steps done: 0 to 1 over the warm-up, then the schedule.

    "cosine" (Loshchilov and Hutter 2017, eq. 5, no restarts) and "linear" reach 0 after the last step. The first step
    of a warm-up of n takes 1/n, the n-th takes 1. Raises ValueError for an unknown schedule.

    >>> [factor_at("linear", 2, 6)(step) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: choose one of {', '.join(SCHEDULES)}")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0 - done if schedule == "linear" else 1.0

    return factor


def make_schedulers(
    optimizers: list[torch.optim.Optimizer], schedule: str, warmup: float, total_steps: int
) -> list[torch.optim.lr_scheduler.LambdaLR]:
    """One scheduler an optimizer, all with the same factor; `step()` them after every training step."""
    factor = factor_at(schedule, warmup_steps(warmup, total_steps), total_steps)
    return [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
