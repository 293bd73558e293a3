"""Rare ids, history and the split at the tail: worked out a row at a time, without leakage, the same for raw rows."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from raw_lines import features, history, raw_lines

from ctr_train.data import raw
from ctr_train.data.artifacts import Artifacts
from ctr_train.data.dataset import open_split
from ctr_train.data.edges import NumericEdges
from ctr_train.data.folds import folds_of
from ctr_train.data.inspect import inspect
from ctr_train.data.prepare import prepare
from ctr_train.data.protocol import is_validation
from ctr_train.data.raw import read_features
from ctr_train.data.values import MAX_BINS, ValueCounts
from ctr_train.errors import UserError
from ctr_train.files import sha256

BINS = 40  # so few that most ids come often
OPTIONS = {"hash_bins": BINS, "split": "tail", "valid_ratio": 0.25, "min_count": 12, "history": True}
CROSS_FITTED = {**OPTIONS, "folds": 4}


def table_rows_of(train: list, min_count: int) -> list[dict[int, int]]:
    """field -> id -> row of the table, as the counts of training rows give them: in the order of fields and ids."""
    totals = [Counter(row[2][field] for row in train) for field in range(26)]
    kept = [(field, id_) for field in range(26) for id_ in sorted(totals[field]) if totals[field][id_] >= min_count]
    rows: list[dict[int, int]] = [{} for _ in range(26)]
    for row, (field, id_) in enumerate(kept, start=26):
        rows[field][id_] = row
    return rows


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few blocks without much text."""
    monkeypatch.setattr(raw, "BLOCK_BYTES", 5000)


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def rows_of(directory: Path, name: str = "train"):
    return open_split(directory, name).slice(0, 10_000)


def test_history_and_rare_ids_of_every_row_as_one_row_at_a_time_gives_them(tmp_path: Path) -> None:
    lines = raw_lines(160)
    prepare([write(tmp_path / "a.tsv", lines)], tmp_path / "out", **OPTIONS)
    parsed = [features(line, BINS) for line in lines]
    train, valid = parsed[:120], parsed[120:]
    found = {name: rows_of(tmp_path / "out", name) for name in ("train", "valid", "gold")}
    assert found["train"].dense.shape == (120, 13 + 52) and found["gold"].label.tolist() == [row[0] for row in valid]
    table = table_rows_of(train, 12)
    assert Artifacts.load(tmp_path / "out").table_rows == 26 + sum(map(len, table))
    for field in (0, 7, 25):
        all_past = [(row[2][field], row[0]) for row in train]
        for rows, name in ((train, "train"), (valid, "valid")):
            for i, (_, dense, sparse) in enumerate(rows):
                past = all_past[:i] if name == "train" else all_past
                np.testing.assert_allclose(found[name].dense[i, [13 + field, 39 + field]],
                                           history(sparse[field], past), rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(found[name].dense[i, :13], dense, rtol=1e-6)
                assert found[name].sparse[i, field] == table[field].get(sparse[field], field)
    moments = Artifacts.load(tmp_path / "out").history_moments
    np.testing.assert_allclose(moments[0], found["train"].dense[:, 13:].mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments[1], found["train"].dense[:, 13:].std(axis=0), rtol=1e-4, atol=1e-5)
    assert {rare for field in (0, 7, 25) for rare in found["train"].sparse[:, field] == field} == {True, False}


def test_cross_fitted_history_of_every_training_row_is_that_of_the_other_folds(tmp_path: Path) -> None:
    lines = raw_lines(160)
    prepare([write(tmp_path / "a.tsv", lines)], tmp_path / "out", **CROSS_FITTED)
    parsed, fold = [features(line, BINS) for line in lines], folds_of(np.arange(160), 4)
    assert set(fold) == {0, 1, 2, 3}
    train, valid = rows_of(tmp_path / "out").dense, rows_of(tmp_path / "out", "valid").dense
    for field in (0, 7, 25):
        rows = [(row[2][field], row[0]) for row in parsed[:120]]
        for i, (id_, _) in enumerate(rows):
            others = [row for row, its in zip(rows, fold[:120], strict=True) if its != fold[i]]
            np.testing.assert_allclose(train[i, [13 + field, 39 + field]], history(id_, others), rtol=1e-5, atol=1e-6)
        for i, row in enumerate(parsed[120:]):
            np.testing.assert_allclose(valid[i, [13 + field, 39 + field]], history(row[2][field], rows), rtol=1e-5,
                                       atol=1e-6)
    moments = Artifacts.load(tmp_path / "out").history_moments
    np.testing.assert_allclose(moments[0], train[:, 13:].mean(axis=0), rtol=1e-4, atol=1e-5)


def test_labels_of_a_fold_reach_no_history_of_that_fold(tmp_path: Path) -> None:
    lines, fold = raw_lines(160), folds_of(np.arange(160), 4)
    turned = [line if its != 2 else str(1 - int(line[0])) + line[1:] for line, its in zip(lines, fold, strict=True)]
    for name, text in (("a", lines), ("b", turned)):
        prepare([write(tmp_path / f"{name}.tsv", text)], tmp_path / name, **CROSS_FITTED)
    before, after = rows_of(tmp_path / "a").dense, rows_of(tmp_path / "b").dense
    within = fold[:120] == 2
    np.testing.assert_array_equal(before[within], after[within])
    assert (before[~within] != after[~within]).any(axis=1).all()


def test_folds_are_equally_large_and_unlike_the_split() -> None:
    lines = np.arange(200_000)
    fold = folds_of(lines, 10)
    np.testing.assert_allclose(np.bincount(fold), 20_000, rtol=0.03)
    np.testing.assert_allclose(np.bincount(fold[is_validation(lines)]), is_validation(lines).sum() / 10, rtol=0.1)
    assert abs(np.corrcoef(fold[:-1], fold[1:])[0, 1]) < 0.01


def test_a_row_never_sees_its_own_label_nor_a_later_one(tmp_path: Path) -> None:
    """Labels from row 60 on are turned round: no feature of rows 0 to 60 may move, those of later rows must."""
    lines = raw_lines(160)
    turned = lines[:60] + [str(1 - int(line[0])) + line[1:] for line in lines[60:]]
    for name, text in (("a", lines), ("b", turned)):
        prepare([write(tmp_path / f"{name}.tsv", text)], tmp_path / name, **OPTIONS)
    before, after = rows_of(tmp_path / "a").dense, rows_of(tmp_path / "b").dense
    np.testing.assert_array_equal(before[:61], after[:61])
    assert (before[62:] != after[62:]).any(axis=1).all()


@pytest.mark.parametrize("options", [OPTIONS, CROSS_FITTED], ids=["ordered", "cross-fitted"])
def test_validation_labels_reach_no_feature(tmp_path: Path, options: dict) -> None:
    lines = raw_lines(160)
    turned = lines[:120] + [str(1 - int(line[0])) + line[1:] for line in lines[120:]]
    for name, text in (("a", lines), ("b", turned)):
        prepare([write(tmp_path / f"{name}.tsv", text)], tmp_path / name, **options)
    for split in ("train", "valid"):
        np.testing.assert_array_equal(rows_of(tmp_path / "a", split).dense, rows_of(tmp_path / "b", split).dense)
    assert Artifacts.load(tmp_path / "a").values == Artifacts.load(tmp_path / "b").values
    assert Artifacts.load(tmp_path / "a").numeric_edges == Artifacts.load(tmp_path / "b").numeric_edges


def test_raw_rows_get_the_features_of_prepared_ones(tmp_path: Path) -> None:
    lines = raw_lines(160)
    found = prepare([write(tmp_path / "a.tsv", lines)], tmp_path / "out", **OPTIONS)
    counts = ValueCounts.load(tmp_path / "out", found.values, BINS)
    unlabelled = write(tmp_path / "b.tsv", [line.split("\t", 1)[1] for line in lines[120:]])
    pieces = list(read_features([unlabelled], settings=found, counts=counts))
    gold = rows_of(tmp_path / "out", "gold")
    np.testing.assert_array_equal(np.concatenate([piece.dense for piece in pieces]), gold.dense)
    np.testing.assert_array_equal(np.concatenate([piece.sparse for piece in pieces]), gold.sparse)
    with pytest.raises(ValueError, match="min_count=12, history=True need counts of values"):
        next(read_features([unlabelled], settings=found))


@pytest.mark.parametrize("options", [OPTIONS, CROSS_FITTED], ids=["ordered", "cross-fitted"])
def test_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    source = write(tmp_path / "a.tsv", raw_lines(160))
    prepare([source], tmp_path / "small", **options)
    monkeypatch.setattr(raw, "BLOCK_BYTES", 1 << 19)
    prepare([source], tmp_path / "large", **options)
    for name in ("train.arrow", "valid.arrow", "values.arrow", "artifacts.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "large" / name).read_bytes(), name


def test_the_default_keeps_the_protocol_and_no_counts(tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", raw_lines(160))
    found = prepare([source], tmp_path / "out", hash_bins=BINS, valid_ratio=0.2)
    assert (found.min_count, found.history, found.split, found.values) == (1, False, "hash", {})
    assert not (tmp_path / "out" / "values.arrow").exists()
    assert found.num_dense == 13 and len(found.numeric_edges) == 13


def test_the_tail_is_the_last_share_over_all_files(tmp_path: Path) -> None:
    lines = raw_lines(101)
    inputs = [write(tmp_path / "a.tsv", lines[:70]), write(tmp_path / "b.tsv", lines[70:])]
    found = prepare(inputs, tmp_path / "out", split="tail", valid_ratio=0.2, gold_rows=7)
    assert found.counts == {"train": 81, "valid": 20, "gold": 7}
    expected = [features(line, 2_000_000)[0] for line in lines]
    assert rows_of(tmp_path / "out").label.tolist() == expected[:81]
    assert rows_of(tmp_path / "out", "valid").label.tolist() == expected[81:]


def test_other_counts_are_other_data(tmp_path: Path) -> None:
    a, b = (prepare([write(tmp_path / f"{seed}.tsv", raw_lines(160, seed=seed))], tmp_path / str(seed), **OPTIONS)
            for seed in (0, 1))
    assert a.differences(a) == []
    assert a.differences(b) == ["its counts of values (values.arrow) are those of other training rows"]
    plain = prepare([tmp_path / "0.tsv"], tmp_path / "plain", hash_bins=BINS)
    assert "history is True there and False here" in a.differences(plain)


def test_a_changed_file_of_counts_is_named(tmp_path: Path) -> None:
    found = prepare([write(tmp_path / "a.tsv", raw_lines(160))], tmp_path / "out", **OPTIONS)
    path = tmp_path / "out" / "values.arrow"
    assert inspect(tmp_path / "out")["values"]["sha256"] == sha256(path)
    shutil.copy(path, tmp_path / "kept")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for read in (lambda: ValueCounts.load(tmp_path / "out", found.values, BINS), lambda: inspect(tmp_path / "out")):
        with pytest.raises(UserError, match=r"values\.arrow has the SHA-256"):
            read()
    path.unlink()
    for read in (lambda: ValueCounts.load(tmp_path / "out", found.values, BINS), lambda: inspect(tmp_path / "out")):
        with pytest.raises(UserError, match=r"values\.arrow does not exist"):
            read()


@pytest.mark.parametrize(("options", "message"), [
    ({"min_count": 0}, "min_count=0: at least 1"), ({"split": "head"}, "split='head': choose hash or tail"),
    ({"history": True, "folds": 1}, "folds=1: 2 to 100, or 0"),
    ({"history": True, "folds": 101}, "folds=101: 2 to 100"),
    ({"history": True, "hash_bins": MAX_BINS + 1}, f"hash_bins={MAX_BINS + 1}: counts of values"),
])
def test_bad_settings_are_quoted(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare([write(tmp_path / "a.tsv", raw_lines(20))], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_edges_are_quantiles_of_the_training_rows() -> None:
    generator = np.random.default_rng(0)
    numbers = np.stack([generator.random(5000) * 10, generator.integers(0, 2, 5000), np.full(5000, 3.0)], axis=1)
    edges = NumericEdges(3)
    for part in np.array_split(numbers.astype(np.float32), 7):
        edges.add(part)
    first, second, third = edges.edges()
    np.testing.assert_allclose(first, np.quantile(numbers[:, 0], np.linspace(0, 1, 17)), atol=0.04)
    assert (second, third) == ([0.0, 1.0], [3.0])
    assert NumericEdges(1).edges() == [[]]
