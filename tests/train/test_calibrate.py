"""The shift of logits that makes their mean prediction a given one."""

import pytest
import torch

from ctr_train.calibrate import shift_to_mean


@pytest.mark.parametrize("mean", [1e-6, 0.25, 0.999])
def test_the_mean_prediction_is_the_one_asked_for(mean):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    shifted = torch.sigmoid(logits.double() + shift_to_mean(logits, mean)).mean().item()
    assert shifted == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_labels_of_one_class_shift_nothing(mean):
    assert shift_to_mean(torch.zeros(3), mean) == 0.0
