"""How good logits are: logloss, exact AUC, normalised entropy, calibration and the reliability diagram's bins."""

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .errors import UserError

Array = torch.Tensor | np.ndarray

RELIABILITY_BINS = 20


def logloss(logits: Array, labels: Array) -> float:
    """Mean binary cross-entropy in nats of logits [N] against labels [N] in {0, 1}.

    Computed from the logits, without a probability that could round to 0 or 1, and accumulated in float64.

    Raises UserError for no rows or logits that are not finite; TypeError, ValueError as `check_logits`.

    >>> round(logloss(torch.tensor([0.0, 100.0]), torch.tensor([1, 1])), 6)  # (ln 2 + 0) / 2
    0.346574
    """
    logits, labels = check_logits(logits, labels)
    return F.binary_cross_entropy_with_logits(logits.double(), labels.double()).item()


def auc(logits: Array, labels: Array) -> float:
    """Area under the ROC curve of logits [N] against labels [N]: P(a positive's logit > a negative's) + P(equal) / 2.

    Exact: pairs are counted in integers, ties as half a pair (the Mann-Whitney statistic; Fawcett 2006, algorithm 3).

    Raises UserError where it is undefined: no rows, labels of one class only; also for logits that are not finite.

    >>> auc(torch.tensor([0.1, 0.1, 0.9]), torch.tensor([0, 1, 1]))
    0.75
    """
    logits, labels = check_logits(logits, labels)
    rows, positives = len(labels), int(labels.sum())
    if positives in (0, rows):
        raise UserError(f"AUC is undefined: all {rows:,} labels are {int(positives > 0)}")
    values = logits.numpy()
    order = np.argsort(values)
    values, is_positive = values[order], labels.numpy()[order]
    last_of_tie = np.flatnonzero(np.append(values[1:] != values[:-1], True))  # [ties], index of each tie's last row
    positives_to = np.cumsum(is_positive, dtype=np.int64)[last_of_tie]  # positives with a logit <= that of the tie
    negatives_to = last_of_tie + 1 - positives_to
    positives_in = np.diff(positives_to, prepend=0)
    negatives_in = np.diff(negatives_to, prepend=0)
    # Twice the number of ordered pairs stays below 2^63 up to 3 G rows.
    twice_ordered = np.sum(positives_in * (2 * negatives_to - negatives_in))
    return float(twice_ordered / (2 * positives * (rows - positives)))


def normalised_entropy(logits: Array, labels: Array) -> float:
    """Logloss divided by that of always predicting the mean label (He et al. 2014, eq. 1); below 1 is useful.

    Raises UserError where it is undefined: no rows, labels of one class only; also for logits that are not finite.
    """
    logits, labels = check_logits(logits, labels)
    rate = labels.double().mean().item()
    if rate in (0.0, 1.0):
        raise UserError(f"normalised entropy is undefined: all {len(labels):,} labels are {int(rate)}")
    return logloss(logits, labels) / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)).item()


def calibration(logits: Array, labels: Array) -> float:
    """Mean predicted probability / mean label (He et al. 2014); 1 is calibrated, above 1 predicts too many clicks.

    Raises UserError where it is undefined: no rows, no positive label; also for logits that are not finite.
    """
    logits, labels = check_logits(logits, labels)
    rate = labels.double().mean().item()
    if rate == 0.0:
        raise UserError(f"calibration is undefined: all {len(labels):,} labels are 0")
    return logits.double().sigmoid().mean().item() / rate


def reliability(logits: Array, labels: Array, bins: int = RELIABILITY_BINS) -> list[dict[str, float]]:
    """What a reliability diagram draws: `bins` equal intervals of predicted probability, the empty ones left out.

    Returns one {"lower", "upper", "count", "mean_prediction", "observed_rate"} an interval [lower, upper), the
    last one closed. Raises as `logloss`.
    """
    logits, labels = check_logits(logits, labels)
    probability = logits.double().sigmoid()
    index = (probability * bins).long().clamp_(max=bins - 1)
    count = torch.bincount(index, minlength=bins)
    predicted = torch.bincount(index, weights=probability, minlength=bins)
    observed = torch.bincount(index, weights=labels.double(), minlength=bins)
    return [
        {
            "lower": i / bins,
            "upper": (i + 1) / bins,
            "count": int(count[i]),
            "mean_prediction": (predicted[i] / count[i]).item(),
            "observed_rate": (observed[i] / count[i]).item(),
        }
        for i in range(bins)
        if count[i]
    ]


def evaluate_logits(logits: Array, labels: Array) -> dict[str, Any]:
    """All metrics of logits [N] against labels [N].

    Returns {"logloss", "auc", "normalised_entropy", "calibration", "rows", "label_rate"}. With labels of one class
    `auc` and `normalised_entropy` are undefined and None (null in JSON), and so is `calibration` when all are 0.

    Raises UserError for no rows, and for NaN or infinite logits (how many, and the first one's row).
    """
    logits, labels = check_logits(logits, labels)
    rate = labels.double().mean().item()
    two_classes = 0.0 < rate < 1.0
    return {
        "logloss": logloss(logits, labels),
        "auc": auc(logits, labels) if two_classes else None,
        "normalised_entropy": normalised_entropy(logits, labels) if two_classes else None,
        "calibration": calibration(logits, labels) if rate > 0.0 else None,
        "rows": len(labels),
        "label_rate": rate,
    }


def check_logits(logits: Array, labels: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N] as float32 or float64 and labels [N] as uint8, both on the CPU, or an error that says why not.

    Raises:
        UserError: no rows; NaN or infinite logits.
        TypeError: logits in half precision, whose ties shift the AUC, or integers.
        ValueError: other shapes; labels other than 0 and 1.
    """
    logits, labels = torch.as_tensor(logits).detach().cpu(), torch.as_tensor(labels).detach().cpu()
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits are {logits.dtype}: metrics need float32 or float64, rounding makes ties")
    if logits.ndim != 1 or logits.shape != labels.shape:
        raise ValueError(f"logits {list(logits.shape)} and labels {list(labels.shape)}: both must be [N]")
    if not len(logits):
        raise UserError("there are no rows to compute metrics of")
    finite = logits.isfinite()
    if not finite.all():
        rows = (~finite).nonzero().squeeze(1)
        first = int(rows[0])
        raise UserError(f"{len(rows):,} of {len(logits):,} logits are NaN or infinite, the first one is that of row "
                        f"{first} (counted from 0): {logits[first].item()}")
    bits = labels.to(torch.uint8)
    wrong = (labels != bits) | (bits > 1)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(f"label {labels[first].item()} of row {first} is neither 0 nor 1")
    return logits, bits
