"""Calibration of a trained model: its mean prediction on training rows becomes their click rate."""

from typing import Any

import torch

from ctr_models import CTRModel

from .data.dataset import Part, Split
from .evaluate import labels_of, predict

LIMIT = 30.0  # of a shift; sigmoid(30) is 1 - 1e-13


def calibrating_shift(model: CTRModel, rows: Split | Part, **options: Any) -> float:
    """What is to be added to the model's logits so that the mean prediction on `rows` is their click rate.

    The last steps leave the bias of a logit a few hundredths from where the mean is right, by chance and by dropout,
    which only training has. One number is fitted, so that rows which were trained on will do.

    Args:
        rows: labelled; with labels of one class only nothing is shifted.
        options: as for `evaluate.predict`.

    Raises UserError for NaN or infinite logits.
    """
    return shift_to_mean(torch.from_numpy(predict(model, rows, **options)), float(labels_of(rows).mean()))


def shift_to_mean(logits: torch.Tensor, mean: float) -> float:
    """The x, within 30 of 0, for which sigmoid(logits + x) has that mean, by bisection; 0.0 for a mean of 0 or 1.

    >>> round(shift_to_mean(torch.zeros(5), 0.75), 6)  # ln 3
    1.098612
    """
    if not 0.0 < mean < 1.0:
        return 0.0
    wide, low, high = logits.double(), -LIMIT, LIMIT
    for _ in range(50):
        middle = (low + high) / 2
        if torch.sigmoid(wide + middle).mean().item() < mean:
            low = middle
        else:
            high = middle
    return (low + high) / 2
