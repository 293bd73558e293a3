"""Streaming scores: batches cut anew, the Parquet file whole or not there, rows without label."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ctr_train import score as score_module
from ctr_train.data.raw import RawFeatures
from ctr_train.errors import UserError
from ctr_train.metrics import evaluate_logits
from ctr_train.score import rebatch, score

OPTIONS = {"batch_size": 7, "device": "cpu", "precision": "fp32"}


class FirstFeature(nn.Module):
    """The logit is the first numeric feature."""

    def forward(self, dense, sparse):
        return dense[:, 0]


def make_rows(count, *, labelled=True, seed=0):
    rng = np.random.default_rng(seed)
    return RawFeatures(dense=rng.normal(size=(count, 13)).astype(np.float32),
                       sparse=rng.integers(0, 50, (count, 26)).astype(np.int32),
                       label=rng.integers(0, 2, count).astype(np.uint8) if labelled else None,
                       line_index=np.arange(count, dtype=np.int64) * 3)


def cut(rows, sizes):
    """`rows` in pieces of these sizes."""
    ends = np.cumsum(sizes)
    return [RawFeatures(dense=rows.dense[end - size:end], sparse=rows.sparse[end - size:end],
                        label=None if rows.label is None else rows.label[end - size:end],
                        line_index=rows.line_index[end - size:end]) for size, end in zip(sizes, ends, strict=True)]


@given(st.lists(st.integers(0, 20), max_size=8), st.integers(1, 9), st.booleans())
def test_batches_do_not_depend_on_the_pieces(sizes, batch_size, labelled):
    rows = make_rows(sum(sizes), labelled=labelled)
    batches = list(rebatch(cut(rows, sizes), batch_size))
    assert [len(batch.dense) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert len(batches) == -(-sum(sizes) // batch_size)
    for name in ("dense", "sparse", "line_index") + ("label",) * labelled:
        if batches:
            np.testing.assert_array_equal(np.concatenate([getattr(b, name) for b in batches]), getattr(rows, name))


def test_labelled_rows_give_metrics_and_a_file_with_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(score_module, "GROUP_ROWS", 20)
    rows, out, seen = make_rows(50), tmp_path / "new" / "p.parquet", []
    metrics = score(FirstFeature(), cut(rows, [30, 20]), labelled=True, predictions=out, progress=seen.append,
                    **OPTIONS)
    assert metrics == evaluate_logits(rows.dense[:, 0], rows.label)
    assert sum(seen) == 50
    table = pq.read_table(out)
    assert {field.name: str(field.type) for field in table.schema} == {
        "line": "int64", "probability": "float", "logit": "float", "label": "uint8"}
    np.testing.assert_array_equal(table["line"], rows.line_index)
    np.testing.assert_array_equal(table["logit"], rows.dense[:, 0])
    np.testing.assert_array_equal(table["label"], rows.label)
    np.testing.assert_allclose(table["probability"], 1 / (1 + np.exp(-rows.dense[:, 0].astype(np.float64))), rtol=1e-6)
    assert pq.ParquetFile(out).num_row_groups == 3  # 21 + 21 + 8 rows: not one a batch
    assert [path.name for path in out.parent.iterdir()] == ["p.parquet"]


def test_unlabelled_rows_give_predictions_only(tmp_path):
    rows, out = make_rows(50, labelled=False), tmp_path / "p.parquet"
    assert score(FirstFeature(), [rows], labelled=False, predictions=out, **OPTIONS) == {"rows": 50}
    assert pq.read_table(out).column_names == ["line", "probability", "logit"]


def test_rows_of_one_class_leave_auc_undefined():
    rows = make_rows(10)
    rows.label[:] = 1
    metrics = score(FirstFeature(), [rows], labelled=True, **OPTIONS)
    assert metrics["auc"] is None
    assert metrics["logloss"] > 0


@pytest.mark.parametrize("labelled", [True, False])
def test_a_logit_that_is_nan_is_an_error_with_its_line(tmp_path, labelled):
    rows = make_rows(50, labelled=labelled)
    rows.dense[12, 0] = float("nan")
    with pytest.raises(UserError, match="the logit of line 37 is nan"):  # index 12 * 3, counted from 1 as files are
        score(FirstFeature(), [rows], labelled=labelled, predictions=tmp_path / "p.parquet", **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_an_error_on_the_way_leaves_the_earlier_predictions(tmp_path):
    def pieces():
        yield make_rows(30)
        raise UserError("line 31 is bad")

    out = tmp_path / "p.parquet"
    out.write_text("earlier")
    model = FirstFeature()
    with pytest.raises(UserError, match="line 31 is bad"):
        score(model, pieces(), labelled=True, predictions=out, **OPTIONS)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]
    assert model.training


def test_no_rows_are_an_error(tmp_path):
    with pytest.raises(UserError, match="no rows to score"):
        score(FirstFeature(), [make_rows(0)], labelled=True, predictions=tmp_path / "p.parquet", **OPTIONS)
    assert not list(tmp_path.iterdir())
