"""Cross-fitted target statistics: a training row's history comes from the rows of the other folds.

Rows are dealt into folds at random, by the index of their line. Each row sees the clicks and counts of all training
rows but those of its own fold, so never its own label (target statistics: Micci-Barreca 2001; out of folds as in
scikit-learn's TargetEncoder). Unlike ordered statistics (`values.py`), those of the first rows are as rich as those of
the last, and look like those of later rows, which see all training rows.
"""

import numpy as np

from .values import ValueCounts, history_features

FOLDS = 10


def folds_of(line_index: np.ndarray, folds: int) -> np.ndarray:
    """The fold of each line (index from 0 over all lines, int64 [n]), in [0, folds); the same for the same line always.

    The bits are mixed by the finaliser of SplitMix64 (Steele, Lea, Flood 2014), which owes nothing to the rule of the
    split.

    >>> folds_of(np.arange(8), 10).tolist()
    [0, 5, 2, 0, 5, 2, 8, 3]
    """
    mixed = (line_index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(folds)).astype(np.int64)


class FoldCounts:
    """Rows and clicks of each id in each fold of the training rows, taken off the counts of all rows.

    Memory: 4 bytes an id of each field (26 hash_bins), and 8 bytes a fold for each id that comes twice or more.

    Args:
        totals: counts of all rows that statistics may come from, the training rows among them.
        folds: number of folds.
    """

    def __init__(self, totals: ValueCounts, folds: int) -> None:
        self._totals, self._folds = totals, folds
        seen = totals.seen()
        repeated = seen[totals.counts[seen] > 1]
        self._place = np.zeros(len(totals.counts), dtype=np.int32)  # of an id among the repeated ones, from 1; 0: none
        self._place[repeated] = np.arange(1, len(repeated) + 1, dtype=np.int32)
        self._counts, self._clicks = (np.zeros((len(repeated) + 1) * folds, dtype=np.uint32) for _ in range(2))
        self._rows, self._clicked = (np.zeros(folds, dtype=np.int64) for _ in range(2))

    def add(self, sparse: np.ndarray, label: np.ndarray, fold: np.ndarray) -> None:
        """Count training rows: ids int32 [n, 26], label uint8 [n], fold int64 [n]."""
        cells, repeated = self._cells(sparse, fold)
        np.add.at(self._counts, cells[repeated], np.uint32(1))
        np.add.at(self._clicks, cells[repeated & (label == 1)[:, None]], np.uint32(1))
        self._rows += np.bincount(fold, minlength=self._folds)
        self._clicked += np.bincount(fold[label == 1], minlength=self._folds)

    def history(self, sparse: np.ndarray, label: np.ndarray, fold: np.ndarray) -> np.ndarray:
        """History float32 [n, 52] of training rows that were counted: from all rows of `totals` outside their fold."""
        cells, repeated = self._cells(sparse, fold)
        # An id that comes once is in its row's own fold: it, and its label, are all that there is to take off.
        own_counts = np.where(repeated, self._counts[cells], 1).astype(np.int64)
        own_clicks = np.where(repeated, self._clicks[cells], label[:, None]).astype(np.int64)
        counts, clicks = self._totals.of(sparse)
        return history_features(counts - own_counts, clicks - own_clicks, self._totals.rows - self._rows[fold],
                                self._totals.clicked - self._clicked[fold])

    def _cells(self, sparse: np.ndarray, fold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where (id, fold) is counted, int64 [n, 26], and whether the id is counted by folds at all."""
        place = self._place[self._totals.places(sparse)]
        return place * np.int64(self._folds) + fold[:, None], place > 0


