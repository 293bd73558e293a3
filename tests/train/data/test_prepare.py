"""Preparing raw rows: every feature and split as the protocol words them, and nothing half-written."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from raw_lines import features, raw_lines

from ctr_train.data import parse, raw
from ctr_train.data.artifacts import Artifacts
from ctr_train.data.dataset import open_split
from ctr_train.data.inspect import inspect
from ctr_train.data.prepare import prepare
from ctr_train.data.protocol import DENSE_NAMES, SPARSE_NAMES, is_validation
from ctr_train.data.raw import read_features
from ctr_train.data.synth import write_synthetic
from ctr_train.errors import UserError
from ctr_train.interrupt import Killed


def write(path: Path, lines: list[str], end: str = "\n") -> Path:
    text = "".join(line + end for line in lines)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(text.encode())
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few blocks without much text."""
    monkeypatch.setattr(raw, "BLOCK_BYTES", 5000)


def test_every_feature_of_every_split(tmp_path: Path) -> None:
    lines = raw_lines(700)
    inputs = [write(tmp_path / "a.tsv", lines[:200]), write(tmp_path / "b.tsv.gz", lines[200:])]
    found = prepare(inputs, tmp_path / "out", hash_bins=5000, valid_ratio=0.2, gold_rows=50)
    valid = is_validation(np.arange(700), 0.2)
    expected = {"train": np.flatnonzero(~valid), "valid": np.flatnonzero(valid), "gold": np.flatnonzero(valid)[:50]}
    for name, indices in expected.items():
        rows = open_split(tmp_path / "out", name).slice(0, 10_000)
        label, dense, sparse = zip(*(features(lines[i], 5000) for i in indices), strict=True)
        assert found.counts[name] == len(indices) == len(rows.label)
        assert rows.label.tolist() == list(label)
        assert rows.sparse.tolist() == list(sparse)
        np.testing.assert_array_equal(rows.dense, np.array(dense, dtype=np.float32))
        assert found.label_rate[name] == pytest.approx(np.mean(label))
    assert [source["rows"] for source in found.sources] == [200, 500]
    assert Artifacts.load(tmp_path / "out") == found
    assert inspect(tmp_path / "out")["counts"] == found.counts


def test_windows_line_ends_and_no_last_newline(tmp_path: Path) -> None:
    lines = raw_lines(50)
    prepare([write(tmp_path / "a.tsv", lines)], tmp_path / "unix", hash_bins=100, valid_ratio=0.5)
    (tmp_path / "b.tsv").write_bytes("\r\n".join(lines).encode())
    prepare([tmp_path / "b.tsv"], tmp_path / "windows", hash_bins=100, valid_ratio=0.5)
    for name in ("train.arrow", "valid.arrow", "gold.arrow"):
        assert (tmp_path / "unix" / name).read_bytes() == (tmp_path / "windows" / name).read_bytes()


def test_missing_indicators(tmp_path: Path) -> None:
    lines = raw_lines(100)
    found = prepare([write(tmp_path / "a.tsv", lines)], tmp_path / "out", missing_indicator=True, valid_ratio=0.0)
    rows = open_split(tmp_path / "out", "train").slice(0, 100)
    expected = np.array([[value == "" for value in line.split("\t")[1:14]] for line in lines])
    assert found.num_dense == rows.dense.shape[1] == 26
    np.testing.assert_array_equal(rows.dense[:, 13:], expected)
    for i, name in enumerate(DENSE_NAMES):
        assert found.fields[name]["missing"] == pytest.approx(expected[:, i].mean())


def test_counts_of_ids_and_values(tmp_path: Path) -> None:
    lines = raw_lines(2000)
    found = prepare([write(tmp_path / "a.tsv", lines)], tmp_path / "out", hash_bins=500)
    for field, name in enumerate(SPARSE_NAMES):
        strings = {line.split("\t")[14 + field] for line in lines}
        ids = {features("\t".join(["0"] + [""] * (13 + field) + [s] + [""] * (25 - field)), 500)[2][field]
               for s in strings}
        assert found.fields[name]["distinct_ids"] == len(ids)
        assert found.fields[name]["distinct_values"] == pytest.approx(len(strings), abs=3)
        assert found.fields[name]["collisions"] == found.fields[name]["distinct_values"] - len(ids)


def test_rows_are_scored_with_the_features_they_are_trained_with(tmp_path: Path) -> None:
    lines = raw_lines(300)
    found = prepare([write(tmp_path / "a.tsv", lines)], tmp_path / "out", hash_bins=900, valid_ratio=0.0)
    rows = open_split(tmp_path / "out", "train").slice(0, 300)
    unlabelled = write(tmp_path / "b.tsv", [line.split("\t", 1)[1] for line in lines])
    for path, labelled in ((tmp_path / "a.tsv", True), (unlabelled, False)):
        pieces = list(read_features([path], settings=found))
        np.testing.assert_array_equal(np.concatenate([p.dense for p in pieces]), rows.dense)
        np.testing.assert_array_equal(np.concatenate([p.sparse for p in pieces]), rows.sparse)
        np.testing.assert_array_equal(np.concatenate([p.line_index for p in pieces]), np.arange(300))
        assert all((p.label is not None) == labelled for p in pieces)


def test_skipped_lines_are_counted_and_still_count_for_the_split(tmp_path: Path) -> None:
    lines = raw_lines(300)
    clean = prepare([write(tmp_path / "a.tsv", lines)], tmp_path / "clean", valid_ratio=0.3)
    damaged = list(lines)
    damaged[17], damaged[250] = "not a row", damaged[250] + "0123456789"
    found = prepare([write(tmp_path / "b.tsv", damaged)], tmp_path / "out", valid_ratio=0.3, on_bad_line="skip")
    assert found.skipped_lines == 2
    assert sum(found.counts[name] for name in ("train", "valid")) == 298
    lost = is_validation(np.array([17, 250]), 0.3).sum()
    assert clean.counts["valid"] - found.counts["valid"] == lost


def test_an_older_directory_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    good = write(tmp_path / "a.tsv", raw_lines(50))
    prepare([good], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=r"b\.tsv, line 31: 1 columns instead of 40: 'broken'"):
        prepare([write(tmp_path / "b.tsv", raw_lines(30) + ["broken"])], tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    prepare([write(tmp_path / "c.tsv", raw_lines(70, seed=1))], tmp_path / "out")
    assert Artifacts.load(tmp_path / "out").sources[0]["rows"] == 70
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "b.tsv", "c.tsv", "out"]


@pytest.mark.parametrize("renamed", [1, 2])
def test_killed_between_the_renames_one_of_both_directories_stays(tmp_path: Path, monkeypatch, renamed: int) -> None:
    for name, rows in (("a.tsv", 50), ("b.tsv", 70)):
        write(tmp_path / name, raw_lines(rows))
    prepare([tmp_path / "a.tsv"], tmp_path / "out")
    replace, calls = os.replace, []

    def killed_after(old: Path, new: Path) -> None:
        replace(old, new)
        calls.extend([new] if Path(new).is_dir() else [])
        if len(calls) == renamed and Path(new).is_dir():
            raise Killed

    monkeypatch.setattr(os, "replace", killed_after)
    with pytest.raises(Killed):
        prepare([tmp_path / "b.tsv"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "b.tsv", "out"]
    assert Artifacts.load(tmp_path / "out").sources[0]["rows"] == (50 if renamed == 1 else 70)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else than prepared data"):
        prepare([write(tmp_path / "a.tsv", raw_lines(5))], tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    prepare([write(tmp_path / "a.tsv", raw_lines(50))], tmp_path / "out", valid_ratio=0.3)
    path = tmp_path / "out" / "gold.arrow"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="gold.arrow has the SHA-256"):
        inspect(tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match="gold.arrow does not exist"):
        inspect(tmp_path / "out")


@pytest.mark.parametrize("content", ["{}", "[]", '{"protocol": 3}', "nonsense"])
def test_damaged_artifacts(tmp_path: Path, content: str) -> None:
    (tmp_path / "artifacts.json").write_text(content)
    with pytest.raises(UserError, match=r"artifacts\.json"):
        Artifacts.load(tmp_path)


def test_artifacts_say_what_differs() -> None:
    ours = Artifacts()
    assert ours.differences(Artifacts(gold_rows=3, valid_ratio=0.5)) == []
    other = Artifacts.from_dict(json.loads(json.dumps(Artifacts(hash_bins=7, missing_indicator=True).to_dict())))
    assert ours.differences(other) == ["hash_bins is 2000000 there and 7 here",
                                       "missing_indicator is False there and True here"]


def test_best_possible_of_true_probabilities(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", raw_lines(400))
    probability = np.random.default_rng(0).uniform(0.1, 0.9, 400).astype(np.float32)
    np.save(tmp_path / "a.tsv.truth.npy", probability)
    found = prepare([path], tmp_path / "out", valid_ratio=0.5, gold_rows=100)
    valid = np.flatnonzero(is_validation(np.arange(400), 0.5))
    label = np.array([int(line[0]) for line in raw_lines(400)])
    for name, rows in (("valid", valid), ("gold", valid[:100])):
        p, y = probability[rows].astype(np.float64), label[rows]
        assert found.best_possible[name]["logloss"] == pytest.approx(-np.mean(np.log(np.where(y, p, 1 - p))), rel=1e-6)
    np.save(tmp_path / "a.tsv.truth.npy", probability[:-1])
    with pytest.raises(UserError, match="do not belong together"):
        prepare([path], tmp_path / "out")


def test_true_probabilities_of_other_rows_are_not_taken(tmp_path: Path) -> None:
    """Killed between the probabilities and the rows, which have as many lines as those before."""
    for name, seed in (("a.tsv", 1), ("b.tsv", 2)):
        write_synthetic(tmp_path / name, rows=300, seed=seed)
    prepare([tmp_path / "a.tsv"], tmp_path / "out")
    for ending in (".truth.npy", ".truth.json"):
        (tmp_path / f"b.tsv{ending}").rename(tmp_path / f"a.tsv{ending}")
    with pytest.raises(UserError, match=r"a\.tsv\.truth\.json is of another a\.tsv: remove it and a\.tsv\.truth\.npy"):
        prepare([tmp_path / "a.tsv"], tmp_path / "out")
    write_synthetic(tmp_path / "c.tsv", rows=300, seed=3)
    truth = np.load(tmp_path / "c.tsv.truth.npy")
    np.save(tmp_path / "c.tsv.truth.npy", truth[::-1])
    with pytest.raises(UserError, match=r"c\.tsv\.truth\.json is of another"):
        prepare([tmp_path / "c.tsv"], tmp_path / "out")
    for content in (b"PK\x03\x04", (tmp_path / "c.tsv.truth.npy").read_bytes().replace(b"descr", b"de{cr")):
        (tmp_path / "c.tsv.truth.json").unlink(missing_ok=True)
        (tmp_path / "c.tsv.truth.npy").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as probabilities"):
            prepare([tmp_path / "c.tsv"], tmp_path / "out")
    (tmp_path / "a.tsv.truth.json").write_text("[1]")
    with pytest.raises(UserError, match="is of another"):
        prepare([tmp_path / "a.tsv"], tmp_path / "out")


@pytest.mark.parametrize("column", range(40))
@pytest.mark.parametrize("value", ["2", "-", "1.5", "x", "--1", "1-", "+1", " 1", "0x1", "ABCDEF00", "123456789",
                                   "g0000000", "1234567890123456789", "/", ":", "`", "é"])
def test_the_fast_parser_refuses_what_the_strict_one_refuses(column: int, value: str) -> None:
    lines = raw_lines(3)
    columns = lines[1].split("\t")
    columns[column] = value
    text = "\n".join([lines[0], "\t".join(columns), lines[2], ""]).encode()
    reason = parse.why_bad("\t".join(columns).encode(), labelled=True)
    if not reason:
        assert len(parse.parse_block(text, labelled=True, hash_bins=10).sparse) == 3
        return
    with pytest.raises(parse.BadLine) as caught:
        parse.parse_block(text, labelled=True, hash_bins=10)
    assert (caught.value.line, caught.value.reason) == (1, reason)
    assert value in reason


def test_rows_of_many_record_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctr_train.data.prepare.BATCH_ROWS", 64)
    lines = raw_lines(500)
    prepare([write(tmp_path / "a.tsv", lines)], tmp_path / "out", hash_bins=5000, valid_ratio=0.0)
    split = open_split(tmp_path / "out", "train")
    assert split.slice(0, 500).sparse.tolist() == [features(line, 5000)[2] for line in lines]
    assert split.gather(np.array([499, 0, 64, 63])).sparse.tolist() == [features(lines[i], 5000)[2]
                                                                        for i in (499, 0, 64, 63)]
