"""Bins of the numeric features, fitted while rows stream by: edges at quantiles, for piecewise-linear embeddings."""

import numpy as np

BINS = 16
_CELLS = 64  # a unit of the transformed value: integers up to about 60 have a cell of their own
_LAST = 42 * _CELLS  # log1p of the largest number of 18 digits is below 42


class NumericEdges:
    """A histogram of the transformed values of each feature, 8 bytes a cell; edges are exact to 1 / 64.

    Args:
        num_features: columns.
    """

    def __init__(self, num_features: int) -> None:
        self._counts = np.zeros((num_features, _LAST + 1), dtype=np.int64)
        self._lowest = np.full((num_features, _LAST + 1), np.inf, dtype=np.float32)  # value seen in each cell

    def add(self, numbers: np.ndarray) -> None:
        """Count rows: float32 [n, num_features], each in [0, 42)."""
        cells = (numbers * np.float32(_CELLS)).astype(np.int64)
        for feature, column in enumerate(cells.T):
            self._counts[feature] += np.bincount(column, minlength=_LAST + 1)
            np.minimum.at(self._lowest[feature], column, numbers[:, feature])

    def edges(self) -> list[list[float]]:
        """Increasing edges of each feature, at most BINS + 1: quantiles k / BINS, equal ones once.

        A feature that never varied has one edge, and one without any row has none.
        """
        found: list[list[float]] = []
        for counts, lowest in zip(self._counts, self._lowest, strict=True):
            seen = np.flatnonzero(counts)
            below = np.cumsum(counts[seen])
            if not len(seen):
                found.append([])
                continue
            ranks = np.linspace(0.0, 1.0, BINS + 1) * (below[-1] - 1)
            cells = seen[np.searchsorted(below, ranks, side="right")]
            found.append(np.unique(lowest[cells]).astype(float).tolist())
        return found
