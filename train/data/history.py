"""Features that depend on counts of values: rare ids and history, the same for prepared and for raw rows."""

import numpy as np

from ..errors import UserError
from .artifacts import Artifacts
from .protocol import NUM_SPARSE
from .values import ValueCounts


class ValueFeatures:
    """Rows as a model gets them: rare values under one id, history behind the numeric features, if asked for.

    Args:
        settings: min_count, history, hash_bins.
        counts: of all training rows; None if `settings` asks for nothing that needs them.

    Raises ValueError where counts are needed and not given.
    """

    def __init__(self, settings: Artifacts, counts: ValueCounts | None) -> None:
        if settings.counts_values and counts is None:
            raise ValueError(f"min_count={settings.min_count}, history={settings.history} need counts of values")
        self._settings, self._counts = settings, counts
        self._before = ValueCounts(settings.hash_bins) if settings.history else None
        self._rows, self._sums = 0, np.zeros((2, settings.num_statistics * NUM_SPARSE))  # of the history, and squared

    def of_training(self, label: np.ndarray, dense: np.ndarray, sparse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dense, sparse) of the training rows that come next: their history is that of the ones before."""
        history = None
        if self._before is not None:
            history = self._before.ordered(sparse, label)
            self._rows += len(history)
            self._sums += history.sum(axis=0, dtype=np.float64), np.square(history, dtype=np.float64).sum(axis=0)
        return self._joined(dense, sparse, history)

    def of_others(self, dense: np.ndarray, sparse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dense, sparse) of any other rows: their history is all of the training rows'."""
        history = self._counts.frozen(sparse) if self._settings.history and self._counts else None
        return self._joined(dense, sparse, history)

    def moments(self) -> list[list[float]]:
        """The entry `Artifacts.history_moments`."""
        if self._before is None:
            return []
        mean, square = self._sums / self._rows
        deviation = np.sqrt(np.maximum(square - mean * mean, 0.0))
        # Rounded, because the last digits of sums depend on the blocks that the rows came in.
        return [[float(f"{x:.6g}") for x in row] for row in (mean, deviation)]

    def check_complete(self) -> None:
        """UserError unless the training rows were those that had been counted."""
        now, then = self._before, self._counts
        if now and then and not (np.array_equal(now.counts, then.counts) and np.array_equal(now.clicks, then.clicks)):
            raise UserError("the input changed while it was prepared: its training rows are others on the second pass")

    def _joined(self, dense: np.ndarray, sparse: np.ndarray,
                history: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if history is not None:
            dense = np.concatenate([dense, history], axis=1)
        if self._settings.min_count > 1 and self._counts:
            sparse = self._counts.without_rare(sparse, self._settings.min_count)
        return dense, sparse
