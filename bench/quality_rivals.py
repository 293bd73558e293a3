"""The rivals of bench/quality.py that are not ours: LightGBM with ordered encodings, and logistic regression."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ctr_train.data.artifacts import Artifacts
from ctr_train.data.dataset import Rows, Split, open_split
from ctr_train.data.protocol import NUM_DENSE, NUM_SPARSE
from ctr_train.data.values import ValueCounts
from ctr_train.metrics import evaluate_logits, logloss

VALID_SHARE = 0.15  # the last share of the training rows chooses rounds and strength of regularisation
SMOOTHING = 30.0  # rows of the mean click rate that a value's encoding begins with
LIGHTGBM = {"objective": "binary", "learning_rate": 0.03, "num_leaves": 31, "min_data_in_leaf": 50,
            "feature_fraction": 0.3, "bagging_fraction": 0.8, "bagging_freq": 1, "lambda_l2": 5.0, "verbose": -1,
            "deterministic": True}
ROUNDS, PATIENCE = 3000, 100
INVERSE_STRENGTHS = (0.03, 0.1, 0.3)
STEPS = 200  # of L-BFGS, at most


def encoded(train: Rows, other: Rows, hash_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns for LightGBM of training and other rows: 13 numbers (NaN where missing), 26 click rates, 26 counts.

    The encodings are CatBoost's: a training row's click rate is that of the rows before it (Prokhorenkova et al. 2018).
    Counts are of all training rows but the row itself, so that they mean the same in both parts.
    """
    counts = ValueCounts(hash_bins)
    before = np.empty((len(train.label), NUM_SPARSE))
    first = np.arange(NUM_SPARSE) * hash_bins
    for i, (places, label) in enumerate(zip(train.sparse + first, train.label, strict=True)):
        before[i] = _rate(counts, places)
        counts.counts[places] += 1
        counts.clicks[places] += label
        counts.rows, counts.clicked = i + 1, counts.clicked + int(label)
    places = other.sparse + first
    rates = before, _rate(counts, places)
    numbers = counts.counts[train.sparse + first] - 1, counts.counts[places]
    return tuple(np.concatenate([_with_missing(rows.dense), rate, number], axis=1)
                 for rows, rate, number in zip((train, other), rates, numbers, strict=True))


def _rate(counts: ValueCounts, places: np.ndarray) -> np.ndarray:
    mean = (counts.clicked + 1.0) / (counts.rows + 4.0)
    return (counts.clicks[places] + SMOOTHING * mean) / (counts.counts[places] + SMOOTHING)


def _with_missing(dense: np.ndarray) -> np.ndarray:
    """13 numbers, NaN where the 13 indicators behind them say so."""
    return np.where(dense[:, NUM_DENSE:] == 1.0, np.nan, dense[:, :NUM_DENSE])


def lightgbm_logits(train: Rows, test: Rows, hash_bins: int, seed: int) -> np.ndarray:
    """Logits of the test rows; the rounds are those that were best on the last training rows."""
    import lightgbm

    head = len(train.label) - int(VALID_SHARE * len(train.label))
    fit, held = (Rows(*(column[part] for column in train)) for part in (slice(head), slice(head, None)))
    options = {**LIGHTGBM, "seed": seed}
    x, x_held = encoded(fit, held, hash_bins)
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    tried = lightgbm.train(options, lightgbm.Dataset(x, fit.label), ROUNDS, callbacks=[stop],
                           valid_sets=[lightgbm.Dataset(x_held, held.label)])
    x, x_test = encoded(train, test, hash_bins)
    booster = lightgbm.train(options, lightgbm.Dataset(x, train.label), tried.best_iteration)
    return booster.predict(x_test, raw_score=True)


def regression_logits(train: Rows, test: Rows, hash_bins: int, seed: int) -> np.ndarray:
    """Logits of the test rows: one-hot ids and standardised numbers, L2; its strength chosen on the last training rows.

    L-BFGS begins at zero: `seed` changes nothing, and bench/quality.py runs it once.
    """
    import scipy.sparse
    from sklearn.linear_model import LogisticRegression

    used = np.unique(train.sparse + np.arange(NUM_SPARSE) * hash_bins)
    mean, deviation = train.dense.mean(axis=0), np.maximum(train.dense.std(axis=0), 1e-6)

    def matrix(rows: Rows) -> Any:
        places = rows.sparse + np.arange(NUM_SPARSE) * hash_bins
        column = np.minimum(np.searchsorted(used, places), len(used) - 1)
        known = (used[column] == places).astype(np.float64)
        row = np.repeat(np.arange(len(places)), NUM_SPARSE)
        one_hot = scipy.sparse.csr_matrix((known.ravel(), (row, column.ravel())), (len(places), len(used)))
        return scipy.sparse.hstack([one_hot, scipy.sparse.csr_matrix((rows.dense - mean) / deviation)], format="csr")

    x, head = matrix(train), len(train.label) - int(VALID_SHARE * len(train.label))

    def fitted(rows: slice, strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=STEPS).fit(x[rows], train.label[rows])

    losses = {strength: logloss(fitted(slice(head), strength).decision_function(x[head:]), train.label[head:].copy())
              for strength in INVERSE_STRENGTHS}
    return fitted(slice(None), min(losses, key=losses.get)).decision_function(matrix(test))


RIVALS: dict[str, Callable[[Rows, Rows, int, int], np.ndarray]] = {
    "LightGBM": lightgbm_logits, "logistic regression": regression_logits}


def all_rows(split: Split) -> Rows:
    """A whole split in memory."""
    return split.slice(0, split.rows)


def main(rival: str, data: str, seed: str) -> None:
    """Print the metrics of a rival on the gold rows of data prepared with --missing-indicator, as JSON."""
    train, gold = (all_rows(open_split(Path(data), name)) for name in ("train", "gold"))
    started = time.perf_counter()
    logits = RIVALS[rival](train, gold, Artifacts.load(data).hash_bins, int(seed))
    seconds = time.perf_counter() - started
    found = evaluate_logits(logits.astype(np.float32), gold.label.copy())
    print(json.dumps({**found, "rows_per_s": len(train.label) / seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
