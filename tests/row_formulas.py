"""The row updates as loops over rows in fp64, written from the papers' formulas and not from our own reference."""

import math
from dataclasses import dataclass, field

import torch

HYPERPARAMETERS = {"lr": 0.1, "weight_decay": 0.0, "decay_untouched": False, "eps": 1e-8, "betas": (0.9, 0.999)}


@dataclass
class ExactTable:
    """A table [num_rows][dim] of Python floats with its optimizer: `step` is what each class of optimizer should do."""

    weight: list[list[float]]
    kind: str
    options: dict = field(default_factory=dict)
    steps: int = 0

    def __post_init__(self) -> None:
        num_rows, dim = len(self.weight), len(self.weight[0])
        self.options = {**HYPERPARAMETERS, **self.options}
        self.row_sums = [0.0] * num_rows
        self.sums, self.means, self.squares = ([[0.0] * dim for _ in range(num_rows)] for _ in range(3))
        self.touched = [0] * num_rows

    def step(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        self.steps += 1
        lr, eps = float(self.options["lr"]), self.options["eps"]
        beta1, beta2 = self.options["betas"]
        summed: dict[int, list[float]] = {}
        for r, row in zip(ids.tolist(), rows.double().tolist(), strict=True):
            summed[r] = [a + b for a, b in zip(summed[r], row, strict=True)] if r in summed else row
        for r, grad in summed.items():
            times = self.steps - self.touched[r] if self.options["decay_untouched"] else 1
            self.touched[r] = self.steps
            for _ in range(times):
                self.weight[r] = [w * (1 - lr * self.options["weight_decay"]) for w in self.weight[r]]
            self.row_sums[r] += sum(g**2 for g in grad) / len(grad)
            for c, g in enumerate(grad):
                self.sums[r][c] += g**2
                self.means[r][c] = beta1 * self.means[r][c] + (1 - beta1) * g
                self.squares[r][c] = beta2 * self.squares[r][c] + (1 - beta2) * g**2
                if self.kind == "sgd":
                    move = g
                elif self.kind == "rowwise-adagrad":
                    move = g / (math.sqrt(self.row_sums[r]) + eps)
                elif self.kind == "adagrad":
                    move = g / (math.sqrt(self.sums[r][c]) + eps)
                else:
                    corrected = math.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
                    move = corrected * self.means[r][c] / (math.sqrt(self.squares[r][c]) + eps)
                self.weight[r][c] -= lr * move
