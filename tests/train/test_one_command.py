"""`ctr-train --data FILE`: from raw rows to a model in one command, as the two commands would do it."""

import json
import shutil
from pathlib import Path

import pytest
from cli import assert_fails

from ctr_train.data.artifacts import Artifacts
from ctr_train.data.prepare import prepare
from ctr_train.data.synth import write_synthetic
from ctr_train.recipes import DEFAULT, preparation_of
from ctr_train.records import write_config

QUICK = ("--model", "dcnv2", "--epochs", "1", "--batch-size", "64", "--threads", "1")


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "rows.tsv.gz"
    write_synthetic(path, rows=3000, seed=5)
    return path


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_raw_rows_are_prepared_as_the_recipe_wants_and_trained_on(ctr_train, raw, tmp_path):
    done = ctr_train(*QUICK, "--data", raw, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "run/data: train 2," in done.stderr and "does better on rows prepared" not in done.stderr
    found = Artifacts.load(tmp_path / "run" / "data")
    assert preparation_of(DEFAULT).is_that_of(found) and found.recipe == DEFAULT
    config = read(tmp_path / "run" / "config.json")
    assert (config["data"], config["recipe"]) == (str(tmp_path / "run" / "data"), DEFAULT)
    assert config["table_rows"] == found.table_rows < 3000 < config["hash_bins"]

    prepare([raw], tmp_path / "by hand", recipe=DEFAULT, **preparation_of(DEFAULT).settings({}))
    assert ctr_train(*QUICK, "--data", "by hand", "--out", "second").returncode == 0
    first, second = (read(tmp_path / run / "gold.json") for run in ("run", "second"))
    assert (first["logloss"], first["sha256"]) == (second["logloss"], second["sha256"])


def test_what_is_prepared_is_used_again_and_never_overwritten(ctr_train, raw, tmp_path):
    shutil.copy(raw, tmp_path / "rows.gz")
    arguments = (*QUICK, "--data", "rows.gz", "--prepared", "rows")
    assert ctr_train(*arguments, "--out", "first").returncode == 0
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    again = ctr_train(*arguments, "--out", "second")
    assert again.returncode == 0 and "using the rows prepared in rows" in again.stderr
    assert read(tmp_path / "first" / "gold.json")["logloss"] == read(tmp_path / "second" / "gold.json")["logloss"]
    assert_fails(ctr_train(*arguments, "--out", "third", "--split", "tail"),
                 "rows holds data prepared otherwise (split is 'hash', not 'tail'); choose another --prepared")
    assert_fails(ctr_train(*arguments, "--out", "third", "--recipe", "baseline-v1"),
                 "rows holds data prepared otherwise (folds is 10, not 0)")
    (tmp_path / "rows.gz").unlink()
    write_synthetic(tmp_path / "rows.gz", rows=3000, seed=6)
    assert_fails(ctr_train(*arguments, "--out", "third"), "rows holds data prepared otherwise (from rows.gz as it was")
    assert made == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    assert not (tmp_path / "third").exists()


def test_files_are_taken_in_order_and_split_by_time_if_asked(ctr_train, raw, tmp_path):
    write_synthetic(tmp_path / "b.tsv", rows=1000, seed=7)
    done = ctr_train(*QUICK, "--split", "tail", "--valid-ratio", "0.25", "--out", "run", "--data", raw, "b.tsv")
    assert done.returncode == 0, done.stderr
    found = Artifacts.load(tmp_path / "run" / "data")
    assert [source["rows"] for source in found.sources] == [3000, 1000]
    assert found.counts == {"train": 3000, "valid": 1000, "gold": 1000}


def test_a_run_of_another_version_is_named(ctr_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model": "ft", "lr": 0.1}')
    for arguments in (("--resume",), ("--model", "ft", "--skip-if-done")):
        assert_fails(ctr_train(*arguments, "--out", "run"), "it does not name the format 'ctr-kernels run 1'")
    write_config(tmp_path / "run", {"model": "ft", "lr": 0.1})
    for arguments in (("--resume",), ("--model", "ft", "--skip-if-done")):
        assert_fails(ctr_train(*arguments, "--out", "run"), "run/config.json has no 'epochs': it is of another version")


@pytest.fixture(scope="module")
def study(raw, tmp_path_factory) -> Path:
    """Rows prepared for the baseline study's recipe."""
    out = tmp_path_factory.mktemp("study") / "rows"
    prepare([raw], out, recipe="baseline-v1", hash_bins=1000)
    return out


def test_the_recipe_is_that_of_the_data_unless_another_is_named(ctr_train, study, raw, tmp_path):
    done = ctr_train(*QUICK, "--data", study, "--out", "theirs")
    assert done.returncode == 0 and "does better" not in done.stderr
    config = read(tmp_path / "theirs" / "config.json")
    assert (config["recipe"], config["embedding_optimizer"], config["validation_share"]) == ("baseline-v1", "sgd", 0.0)
    done = ctr_train(*QUICK, "--data", study, "--out", "ours", "--recipe", "small")
    assert done.returncode == 0
    command = f"ctr-data prepare --recipe small --input {raw} --out {study}-small"
    assert (f"recipe small does better on rows prepared for it (--history --folds 10 --min-count 10): {command}\n"
            in done.stderr)


def test_a_day_of_one_class_leaves_nothing(ctr_train, raw, tmp_path):
    import gzip

    lines = [line for line in gzip.decompress(raw.read_bytes()).splitlines(keepends=True) if line[:1] == b"0"]
    (tmp_path / "zeros.tsv").write_bytes(b"".join(lines))
    done = ctr_train(*QUICK, "--data", "zeros.tsv", "--out", "runs/zeros")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("ctr-train: zeros.tsv: all 2,")
    assert "training labels are 0; rows with both labels are needed" in done.stderr
    assert not (tmp_path / "runs" / "zeros").exists()


@pytest.mark.parametrize(("arguments", "sentence"), [
    (("--data", "nowhere.tsv"), "nowhere.tsv does not exist: --data takes raw files, or a directory made by"),
    (("--data", "empty.tsv"), "empty.tsv is empty"),
    (("--data", "home"), "home holds no prepared data"),
    (("--data", "study", "--prepared", "x"), "--prepared x is for raw files: study is prepared already"),
    (("--data", "study", "--split", "tail"), "--split tail is for raw files: study is prepared already"),
    (("--prepared", "x"), "--prepared x is for raw files: give some with --data"),
    (("--data", "study", "--data", "rows.gz"), "one prepared directory, or raw files"),
    (("--data", "rows.gz", "--valid-ratio", "1.5"), "valid_ratio=1.5 is outside [0, 1)"),
    (("--data", "rows.gz", "--lr", "-1"), "--lr -1.0: at least 0.0"),
    (("--data", "rows.gz", "--prepared", "home"), "home holds something else than prepared data (thesis.txt)"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_mistakes_are_one_sentence_and_leave_nothing(ctr_train, study, raw, tmp_path, arguments, sentence):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "study").symlink_to(study)
    (tmp_path / "rows.gz").symlink_to(raw)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert_fails(ctr_train("--model", "dcnv2", "--out", "run", *arguments), sentence)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
