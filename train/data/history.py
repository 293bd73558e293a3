"""Features that depend on counts of values: rare ids and history, the same for prepared and for raw rows."""

import numpy as np

from .artifacts import Artifacts
from .folds import FoldCounts, folds_of
from .protocol import NUM_SPARSE
from .values import ValueCounts


class ValueFeatures:
    """Rows as a model gets them: rare values under one id of their field, history behind the numbers, if asked for.

    Args:
        settings: min_count, history, hash_bins.
        counts: of all training rows; None if `settings` asks for nothing that needs them.
        past: where the history of training rows comes from: counts by folds, or counts of the rows before the first
            one, to which each training row is then added; None if there are no training rows to come.

    Raises ValueError where counts are needed and not given.
    """

    def __init__(self, settings: Artifacts, counts: ValueCounts | None,
                 past: FoldCounts | ValueCounts | None = None) -> None:
        if settings.counts_values and counts is None:
            raise ValueError(f"min_count={settings.min_count}, history={settings.history} need counts of values")
        self._settings, self._counts, self._past = settings, counts, past
        self._rows, self._sums = 0, np.zeros((2, settings.num_statistics * NUM_SPARSE))  # of the history, and squared

    def of_training(self, label: np.ndarray, dense: np.ndarray, sparse: np.ndarray,
                    line_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dense, sparse) of the training rows that come next: their history is that of other folds or earlier rows."""
        history = None
        if isinstance(self._past, FoldCounts):
            history = self._past.history(sparse, label, folds_of(line_index, self._settings.folds))
        elif self._past is not None:
            history = self._past.ordered(sparse, label)
        if history is not None:
            self._rows += len(history)
            self._sums += history.sum(axis=0, dtype=np.float64), np.square(history, dtype=np.float64).sum(axis=0)
        return self._joined(dense, sparse, history)

    def of_others(self, dense: np.ndarray, sparse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dense, sparse) of any other rows: their history is all of the training rows'."""
        history = self._counts.frozen(sparse) if self._settings.history and self._counts else None
        return self._joined(dense, sparse, history)

    def moments(self) -> list[list[float]]:
        """The entry `Artifacts.history_moments`."""
        if not self._rows:
            return []
        mean, square = self._sums / self._rows
        deviation = np.sqrt(np.maximum(square - mean * mean, 0.0))
        # Rounded, because the last digits of sums depend on the blocks that the rows came in.
        return [[float(f"{x:.6g}") for x in row] for row in (mean, deviation)]

    def _joined(self, dense: np.ndarray, sparse: np.ndarray,
                history: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if history is not None:
            dense = np.concatenate([dense, history], axis=1)
        if self._settings.min_count > 1 and self._counts:
            sparse = self._counts.table_ids(sparse)
        return dense, sparse
