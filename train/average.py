"""A moving average of the weights outside the tables: what a run with `--ema` is evaluated with, and gives."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ctr_models import CTRModel


class WeightAverage:
    """mean = decay * mean + (1 - decay) * weight for every weight but the tables', beginning with the weights now.

    Tables are left out: a row moves in few steps, and a second table would double the memory. A step costs one pass
    over the other weights.

    Args:
        model: on its device already.
        decay: in (0, 1); the average is over about the last 1 / (1 - decay) steps.
    """

    def __init__(self, model: CTRModel, decay: float) -> None:
        tables = {id(table) for table in model.embedding_parameters()}
        self._weights = {name: p.data for name, p in model.named_parameters() if id(p) not in tables}
        self._means = {name: weight.clone() for name, weight in self._weights.items()}
        self._average = get_ema_multi_avg_fn(decay)

    def restart(self) -> None:
        """Begin anew with the weights as they are now."""
        self.load_state_dict(self._weights)

    def update(self) -> None:
        """Take in the weights after a step."""
        self._average(list(self._means.values()), list(self._weights.values()), 0)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within: the model has the average for its weights; what is changed there is changed in the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for name, weight in self._weights.items():
                kept = weight.clone()
                weight.copy_(self._means[name])
                self._means[name].copy_(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average by the names of the weights in the model's state."""
        return dict(self._means)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a `state_dict()`."""
        for name, mean in self._means.items():
            mean.copy_(state[name])
