"""Predictions on splits: order, modes, precision, and the report that says which file was evaluated."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ctr_models import DCNv2
from ctr_train.data.artifacts import Artifacts
from ctr_train.data.dataset import Split, open_split
from ctr_train.errors import UserError
from ctr_train.evaluate import evaluate, gold_report, predict, split_report
from ctr_train.metrics import evaluate_logits

OPTIONS = {"batch_size": 64, "device": "cpu", "precision": "fp32"}


class Toy(nn.Module):
    """A logit of each row that a test can compute by itself; dropout shows a wrong mode, Linear shows autocast."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(13, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, dense, sparse):
        hidden = self.dropout(self.linear(dense)).squeeze(1)
        return hidden + ((sparse % 5).sum(dim=1) / 26).to(hidden.dtype)


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy()


@pytest.mark.parametrize("batch_size", [1, 7, 100, 1000])
def test_logits_come_in_the_order_of_the_rows_across_record_batches(tmp_path, write_split, toy, batch_size):
    arrays = write_split(tmp_path / "s.arrow", 250, batch_rows=60)
    logits = predict(toy, Split(tmp_path / "s.arrow"), batch_size=batch_size, device="cpu", precision="fp32")
    weight, bias = (x.detach().numpy().astype(np.float64) for x in (toy.linear.weight[0], toy.linear.bias))
    expected = arrays["dense"] @ weight + bias + (arrays["sparse"] % 5).sum(axis=1) / 26
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_scores_in_eval_mode_and_leaves_the_mode_as_it_was(tmp_path, write_split, toy, training):
    write_split(tmp_path / "s.arrow", 100)
    split = Split(tmp_path / "s.arrow")
    toy.train(training)
    first, second = predict(toy, split, **OPTIONS), predict(toy, split, **OPTIONS)
    assert toy.training is toy.dropout.training is training
    np.testing.assert_array_equal(first, second)  # dropout would have drawn twice


def test_the_mode_is_restored_after_an_error(tmp_path, write_split, toy):
    write_split(tmp_path / "s.arrow", 10, num_dense=12)
    with pytest.raises(RuntimeError):
        predict(toy, Split(tmp_path / "s.arrow"), **OPTIONS)
    assert toy.training


def test_bf16_computes_in_half_precision_and_returns_float32(tmp_path, write_split, toy):
    write_split(tmp_path / "s.arrow", 100)
    split = Split(tmp_path / "s.arrow")
    full, half = predict(toy, split, **OPTIONS), predict(toy, split, **{**OPTIONS, "precision": "bf16"})
    assert half.dtype == np.float32
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(full, half, atol=0.05)


def test_bf16_logits_of_a_model_are_not_rounded_to_bf16(prepared):
    torch.manual_seed(0)
    logits = predict(DCNv2(num_embeddings=1000), open_split(prepared, "gold"), **{**OPTIONS, "precision": "bf16"})
    assert (torch.from_numpy(logits).bfloat16().float().numpy() != logits).any()


def test_evaluate_takes_every_row_of_a_part_with_its_own_label(tmp_path, write_split, toy, monkeypatch):
    monkeypatch.setattr("ctr_train.evaluate.LABEL_ROWS", 50)
    arrays = write_split(tmp_path / "s.arrow", 250, batch_rows=60)
    split = Split(tmp_path / "s.arrow")
    logits = predict(toy, split, **OPTIONS)
    # The same batches as the part's, whose first row is row 64.
    assert evaluate(toy, split.part(64, 250), **OPTIONS) == evaluate_logits(logits[64:], arrays["label"][64:])


def test_progress_counts_every_row(tmp_path, write_split, toy):
    write_split(tmp_path / "s.arrow", 250)
    seen = []
    predict(toy, Split(tmp_path / "s.arrow"), progress=seen.append, **OPTIONS)
    assert seen == [64, 64, 64, 58]


def test_weights_that_are_nan_are_the_users_to_know(tmp_path, write_split, toy):
    write_split(tmp_path / "s.arrow", 100)
    nn.init.constant_(toy.linear.bias, float("nan"))
    with pytest.raises(UserError, match="100 of 100 logits are NaN"):
        evaluate(toy, Split(tmp_path / "s.arrow"), **OPTIONS)


def test_the_gold_report_says_which_file_and_how_good(prepared, toy):
    artifacts = Artifacts.load(prepared)
    report = gold_report(toy, prepared, artifacts, **OPTIONS)
    split = open_split(prepared, "gold")
    labels = np.array(split.slice(0, split.rows).label)
    assert report["split"] == "gold"
    assert report["file"] == "gold.arrow"
    assert report["sha256"] == hashlib.sha256((prepared / "gold.arrow").read_bytes()).hexdigest()
    for name, value in evaluate_logits(predict(toy, split, **OPTIONS), labels).items():
        assert report[name] == value
    assert report["rows"] == split.rows == sum(entry["count"] for entry in report["reliability"])
    assert set(report["best_possible"]) == {"logloss", "auc"}
    assert report["best_possible"]["logloss"] < report["logloss"]


def test_best_possible_is_none_where_it_is_unknown(tmp_path, write_split, toy):
    write_split(tmp_path / "valid.arrow", 100)
    checksum = hashlib.sha256((tmp_path / "valid.arrow").read_bytes()).hexdigest()
    artifacts = SimpleNamespace(outputs={"valid": {"sha256": checksum}}, best_possible=None, counts={"valid": 100},
                                num_dense=13)
    assert split_report(toy, tmp_path, artifacts, "valid", **OPTIONS)["best_possible"] is None


def test_a_file_that_was_changed_after_its_preparation_is_refused(tmp_path, write_split, toy):
    write_split(tmp_path / "gold.arrow", 100)
    artifacts = SimpleNamespace(outputs={"gold": {"sha256": "0" * 64}}, best_possible=None)
    with pytest.raises(UserError, match=r"gold\.arrow has the SHA-256 [0-9a-f]{64}, its artifacts\.json says 0{64}"):
        gold_report(toy, tmp_path, artifacts, **OPTIONS)
