"""Metrics against scikit-learn, against brute force, and on the inputs that break naive ones."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from ctr_train import metrics
from ctr_train.errors import UserError


def draw(rows, seed=0, decimals=None):
    """Logits that carry some signal (rounded to make ties) and their labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.0, 1.5, rows).astype(np.float32)
    labels = (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
    return (logits if decimals is None else logits.round(decimals)), labels


@pytest.mark.parametrize("decimals", [None, 2, 1, 0])
def test_auc_and_logloss_equal_scikit_learn(decimals):
    logits, labels = draw(20_000, decimals=decimals)
    assert metrics.auc(logits, labels) == pytest.approx(sklearn_metrics.roc_auc_score(labels, logits), abs=1e-12)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert metrics.logloss(logits, labels) == pytest.approx(sklearn_metrics.log_loss(labels, probability), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_counts_a_tied_pair_as_half(rows):
    positive = [z for z, label in rows if label]
    negative = [z for z, label in rows if not label]
    logits = torch.tensor([float(z) for z, _ in rows])
    labels = torch.tensor([int(label) for _, label in rows])
    if not positive or not negative:
        with pytest.raises(UserError, match="AUC is undefined: all .* labels are"):
            metrics.auc(logits, labels)
        return
    pairs = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert metrics.auc(logits, labels) == pytest.approx(pairs / (len(positive) * len(negative)), abs=1e-15)


def test_auc_of_equal_logits_is_one_half_whatever_their_sign_of_zero():
    labels = np.array([0, 1, 1, 0, 1], np.uint8)
    assert metrics.auc(np.full(5, 0.3, np.float32), labels) == 0.5
    assert metrics.auc(np.array([0.0, -0.0, 0.0, -0.0, -0.0], np.float32), labels) == 0.5


def test_auc_of_millions_of_rows_does_not_overflow():
    labels = np.arange(4_500_000, dtype=np.int64) % 2
    assert metrics.auc(labels.astype(np.float32), labels) == 1.0
    assert metrics.auc(-labels.astype(np.float32), labels) == 0.0
    assert metrics.auc(np.zeros(4_500_000, np.float32), labels) == 0.5


def test_logloss_survives_extreme_logits():
    logits = torch.tensor([1e4, -1e4, 1e4, 50.0])
    assert metrics.logloss(logits, torch.tensor([1, 0, 1, 1])) == pytest.approx(math.exp(-50.0) / 4, rel=1e-9)
    assert metrics.logloss(logits, torch.tensor([0, 0, 1, 1])) == pytest.approx(2500.0)


def test_logloss_accumulates_in_float64():
    logits = torch.full((1_000_000,), 0.1)
    labels = torch.zeros(1_000_000, dtype=torch.uint8)
    expected = math.log1p(math.exp(torch.tensor(0.1).item()))
    assert metrics.logloss(logits, labels) == pytest.approx(expected, rel=1e-12)


def test_normalised_entropy_of_predicting_the_label_rate_is_one():
    labels = torch.tensor([1, 0, 0, 0])
    base_rate = torch.full((4,), math.log(0.25 / 0.75), dtype=torch.float64)
    assert metrics.normalised_entropy(base_rate, labels) == pytest.approx(1.0, abs=1e-12)
    assert metrics.normalised_entropy(torch.tensor([2.0, -2.0, -2.0, -2.0]), labels) < 0.3
    assert metrics.normalised_entropy(torch.zeros(4), labels) == pytest.approx(
        math.log(2) / (0.25 * math.log(4) + 0.75 * math.log(4 / 3)))


def test_calibration_is_mean_prediction_over_mean_label():
    labels = torch.tensor([1, 0, 0, 0])
    assert metrics.calibration(torch.zeros(4), labels) == pytest.approx(2.0)
    with pytest.raises(UserError, match="all 4 labels are 0"):
        metrics.calibration(torch.zeros(4), torch.zeros(4))


def test_reliability_bins_hold_every_row_once():
    logits, labels = draw(5_000)
    bins = metrics.reliability(logits, labels, bins=10)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert sum(b["count"] for b in bins) == 5_000
    for b in bins:
        inside = (probability >= b["lower"]) & (probability < b["upper"])
        assert b["count"] == inside.sum()
        assert b["mean_prediction"] == pytest.approx(probability[inside].mean())
        assert b["observed_rate"] == pytest.approx(labels[inside].mean())
    certain = metrics.reliability(torch.tensor([100.0, -100.0]), torch.tensor([1, 0]), bins=10)
    assert [(b["lower"], b["count"]) for b in certain] == [(0.0, 1), (0.9, 1)]


def test_evaluate_logits_names_all_metrics_and_what_is_undefined():
    logits, labels = draw(1_000)
    result = metrics.evaluate_logits(torch.from_numpy(logits), torch.from_numpy(labels))
    assert set(result) == {"logloss", "auc", "normalised_entropy", "calibration", "rows", "label_rate"}
    assert result["auc"] == metrics.auc(logits, labels)
    assert result["rows"] == 1_000 and result["label_rate"] == pytest.approx(labels.mean())
    one_class = metrics.evaluate_logits(torch.zeros(3), torch.zeros(3))
    assert one_class["auc"] is one_class["normalised_entropy"] is one_class["calibration"] is None
    assert one_class["logloss"] == pytest.approx(math.log(2))
    assert metrics.evaluate_logits(torch.zeros(3), torch.ones(3))["calibration"] == pytest.approx(0.5)


def test_nan_logits_are_counted_and_placed():
    logits = torch.zeros(10)
    logits[[3, 7]] = float("nan")
    logits[8] = float("-inf")
    with pytest.raises(UserError, match=r"3 of 10 logits are NaN or infinite, .* row 3 \(counted from 0\): nan"):
        metrics.evaluate_logits(logits, torch.ones(10))


@pytest.mark.parametrize("function", [metrics.logloss, metrics.auc, metrics.calibration, metrics.normalised_entropy,
                                      metrics.reliability, metrics.evaluate_logits])
def test_no_rows_is_a_clear_error(function):
    with pytest.raises(UserError, match="no rows"):
        function(torch.empty(0), torch.empty(0))


def test_wrong_arguments_are_quoted():
    with pytest.raises(TypeError, match=r"torch\.bfloat16.*ties"):
        metrics.auc(torch.zeros(2, dtype=torch.bfloat16), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"\[2, 1\] and labels \[2\]"):
        metrics.auc(torch.zeros(2, 1), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"label 0\.5 of row 1"):
        metrics.logloss(torch.zeros(2), torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match="label -1 of row 0"):
        metrics.logloss(torch.zeros(2), torch.tensor([-1, 1]))
