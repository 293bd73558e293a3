"""Files that were damaged after they were written: one sentence each, never a result."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import assert_fails
from raw_lines import raw_lines

from ctr_train import cli_eval, cli_report
from ctr_train.checkpoint import CONTENT
from ctr_train.data.artifacts import KIND
from ctr_train.data.dataset import open_split
from ctr_train.data.prepare import prepare
from ctr_train.files import read_record, write_record
from ctr_train.records import RESULT_KEYS, read_config, read_result, write_config, write_result

QUICK = ("--model", "dcnv2", "--recipe", "small", "--epochs", "1", "--batch-size", "64")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """`rows`, prepared with history, and `run`, trained on them."""
    directory = tmp_path_factory.mktemp("damage")
    (directory / "rows.tsv").write_text("".join(line + "\n" for line in raw_lines(600)))
    prepare([directory / "rows.tsv"], directory / "rows", hash_bins=100, min_count=2, history=True, folds=5)
    done = subprocess.run([sys.executable, "-m", "ctr_train.cli_train", *QUICK, "--data", directory / "rows", "--out",
                           directory / "run"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def copy(trained, tmp_path):
    """Both under tmp_path, the run without its result, to be resumed."""
    for name in ("rows", "run"):
        shutil.copytree(trained / name, tmp_path / name)
    (tmp_path / "run" / "gold.json").rename(tmp_path / "gold.json")
    return tmp_path


def one_sentence(done: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert sentence in done.stderr, done.stderr


def flip(path: Path, at: int, count: int = 1) -> None:
    content = bytearray(path.read_bytes())
    for i in range(at, at + count):
        content[i] ^= 0x10
    path.write_bytes(content)


def test_flipped_bytes_of_a_checkpoint_are_neither_evaluated_nor_resumed(copy, ctr_train, command):
    for name in ("best.pt", "last.pt"):
        with zipfile.ZipFile(copy / "run" / name) as parts:
            largest = max(parts.infolist(), key=lambda part: part.file_size)
        flip(copy / "run" / name, largest.header_offset + 3000, 8)
    damaged = "is no checkpoint or a damaged one (the checksum of its part "
    assert_fails(ctr_train("--resume", "--out", "run"), damaged)
    one_sentence(command(cli_eval, "run", "--data", "rows"), damaged)


def test_a_flipped_entry_of_a_checkpoints_directory_is_found(copy, command):
    """Where an entry says that its part is a directory, torch reads nothing, and its tensor is what memory holds."""
    path = copy / "run" / "best.pt"
    with zipfile.ZipFile(path) as archive:
        last = archive.infolist()[-4]
    content = path.read_bytes()
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(last.filename.encode()))
    flip(path, entry + 38)
    one_sentence(command(cli_eval, "run", "--data", "rows"), f"the entry of its part {last.filename} is damaged")


def test_a_resumed_run_keeps_its_gold_rows(copy, ctr_train, trained):
    prepare([trained / "rows.tsv"], copy / "few", hash_bins=100, min_count=2, history=True, folds=5, gold_rows=10)
    assert_fails(ctr_train("--resume", "--out", "run", "--data", "few"), "the gold rows are others")


def test_a_finished_run_is_that_of_its_own_rows_only(copy, ctr_train, trained):
    shutil.move(copy / "gold.json", copy / "run" / "gold.json")
    (copy / "other.tsv").write_text("".join(line + "\n" for line in raw_lines(600, seed=5)))
    prepare([copy / "other.tsv"], copy / "other", hash_bins=100, min_count=2, history=True, folds=5)
    resume = ("--resume", "--out", "run")
    assert ctr_train(*resume, "--data", trained / "rows.tsv").returncode == 0
    assert ctr_train(*resume, "--data", "rows").returncode == 0
    assert_fails(ctr_train(*resume, "--data", "other.tsv"), "as it was then, not from other.tsv as it is")
    assert_fails(ctr_train(*resume, "--data", "other"), "its counts of values (values.arrow) are those of other")
    assert_fails(ctr_train(*resume, "--data", trained / "rows.tsv", "--valid-ratio", "0.3"), "with valid_ratio 0.05")
    assert_fails(ctr_train(*resume, "--split", "tail"), "--split tail is for raw files")
    assert_fails(ctr_train(*resume, "--prepared", "x"), "--prepared x is for raw files")
    assert_fails(ctr_train(*resume, "--from", trained / "run"), "began anew; it does not go on from")


def test_rows_of_a_run_are_never_prepared_anew_on_resume(tmp_path, ctr_train):
    for name, seed in (("a.tsv", 1), ("b.tsv", 2)):
        (tmp_path / name).write_text("".join(line + "\n" for line in raw_lines(600, seed=seed)))
    assert ctr_train(*QUICK, "--data", "a.tsv", "--out", "run").returncode == 0
    (tmp_path / "run" / "gold.json").unlink()
    before = (tmp_path / "run" / "data" / "train.arrow").read_bytes()
    assert_fails(ctr_train("--resume", "--out", "run", "--data", "b.tsv"), "the rows that the run was begun with")
    assert (tmp_path / "run" / "data" / "train.arrow").read_bytes() == before
    assert ctr_train("--resume", "--out", "run", "--data", "a.tsv").returncode == 0


def test_the_last_checkpoint_stays_uncalibrated_where_the_end_is_made_up_for(copy, ctr_train):
    before = torch.load(copy / "run" / "last.pt", weights_only=True)
    assert ctr_train("--resume", "--out", "run", "--data", "rows").returncode == 0
    after = torch.load(copy / "run" / "last.pt", weights_only=True)
    assert after["calibration"] == before["calibration"] == {"scale": 1.0, "shift": 0.0}


def test_a_lost_or_damaged_checkpoint_is_found_before_the_training(copy, ctr_train):
    whole = (copy / "run" / "last.pt").read_bytes()
    (copy / "run" / "last.pt").write_bytes(whole[:2000])
    assert_fails(ctr_train("--resume", "--out", "run", "--data", "rows"), "; without it the run goes on from best.pt")
    (copy / "run" / "last.pt").write_bytes(whole)
    (copy / "run" / "best.pt").unlink()
    assert_fails(ctr_train("--resume", "--out", "run", "--data", "rows"), "best.pt is missing, though the run has eval")


def test_damaged_rows_in_the_place_of_raw_ones_are_prepared_again(tmp_path, ctr_train):
    (tmp_path / "a.tsv").write_text("".join(line + "\n" for line in raw_lines(600)))
    for i in range(2):
        done = ctr_train(*QUICK, "--data", "a.tsv", "--prepared", "p", "--out", f"run{i}")
        assert done.returncode == 0, done.stderr
        (tmp_path / "p" / "artifacts.json").write_text("{}")
    assert "preparing the rows again: p/artifacts.json" in done.stderr


@pytest.mark.parametrize("column", ["label", "dense", "sparse"])
def test_flipped_rows_are_not_trained_on(copy, ctr_train, column):
    path = copy / "rows" / "train.arrow"
    split = open_split(copy / "rows", "train")
    at = {"label": split._label_at[0], "dense": split._dense_at[0] * 4, "sparse": split._sparse_at[0] * 4 + 3}[column]
    del split
    flip(path, int(at) + 40)
    for arguments in ((*QUICK, "--out", "new"), ("--resume", "--out", "run")):
        assert_fails(ctr_train(*arguments, "--data", "rows"), "train.arrow has the SHA-256")
    assert not (copy / "new").exists()


def test_flipped_gold_rows_are_found_before_the_training(copy, ctr_train):
    flip(copy / "rows" / "gold.arrow", 2000)
    assert_fails(ctr_train(*QUICK, "--data", "rows", "--out", "new"), "gold.arrow has the SHA-256")


def test_flipped_counts_of_values_are_found(copy, command):
    flip(copy / "run" / "values.arrow", 700)
    shutil.move(copy / "gold.json", copy / "run" / "gold.json")
    (copy / "raw.tsv").write_text("".join(line + "\n" for line in raw_lines(5)))
    one_sentence(command(cli_eval, "run", "--input", "raw.tsv"), "values.arrow has the SHA-256")


@pytest.mark.parametrize("name", ["run/config.json", "rows/artifacts.json"])
@pytest.mark.parametrize("damage", ["digit", "cut", "empty", "binary", "list"])
def test_damaged_records_are_not_gone_on_with(copy, ctr_train, name, damage):
    path = copy / name
    content = path.read_text()
    digit = content.index('"hash_bins": 100')
    path.write_bytes({"digit": (content[:digit] + '"hash_bins": 101' + content[digit + 16:]).encode(),
                      "cut": content[:len(content) // 2].encode(), "empty": b"", "binary": b"\xff\xfe\x00\x80",
                      "list": b"[1, 2]"}[damage])
    assert_fails(ctr_train("--resume", "--out", "run", "--data", "rows"), name.split("/")[1])


def test_settings_and_checkpoint_of_two_runs_do_not_go_together(copy, ctr_train):
    write_config(copy / "run", {**read_config(copy / "run"), "lr": 0.5})
    assert_fails(ctr_train("--resume", "--out", "run", "--data", "rows"), "config.json says 0.5: one of them belongs")


@pytest.mark.parametrize("key", CONTENT)
def test_a_checkpoint_without_one_of_its_parts(copy, command, key):
    path = copy / "run" / "best.pt"
    content = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in content.items() if name != key}, path)
    one_sentence(command(cli_eval, "run", "--data", "rows"), f"best.pt is damaged: its '{key}' is missing")
    torch.save({**content, key: "text"}, path)
    one_sentence(command(cli_eval, "run", "--data", "rows"), f"best.pt is damaged: its '{key}' is str")


@pytest.mark.parametrize("part", ["weights", "optimizer", "scheduler", "loader", "rng"])
def test_a_checkpoint_that_does_not_fit_is_not_resumed(copy, ctr_train, part):
    for name in ("best.pt", "last.pt"):
        content = torch.load(copy / "run" / name, weights_only=True)
        if part == "weights":
            key = next(iter(content["model"]))
            content["model"][key] = content["model"][key][:-1]
        elif part == "optimizer":
            state = content["optimizers"][1]["state"]
            state[0]["exp_avg"] = state[0]["exp_avg"].flatten()[:-1]
            content["optimizers"][1]["param_groups"].pop()
        elif part == "scheduler":
            content["schedulers"].pop()
        elif part == "loader":
            del content["loader"]["rows"]
        else:
            content["rng"]["cpu"] = content["rng"]["cpu"][:-5]
        torch.save(content, copy / "run" / name)
    assert_fails(ctr_train("--resume", "--out", "run", "--data", "rows"), "the checkpoint in run does not fit")


def test_a_run_is_not_resumed_with_a_numpy_that_shuffles_otherwise(copy, ctr_train):
    for name in ("best.pt", "last.pt"):
        content = torch.load(copy / "run" / name, weights_only=True)
        content["loader"]["shuffling"] += 1
        torch.save(content, copy / "run" / name)
    assert_fails(ctr_train("--resume", "--out", "run", "--data", "rows"),
                 f"numpy {np.__version__} shuffles in another order than the numpy that the run began with")


def test_other_versions_than_those_of_the_beginning_are_told(copy, ctr_train):
    config = read_config(copy / "run")
    write_config(copy / "run", {**config, "versions": {**config["versions"], "torch": "1.0"}})
    done = ctr_train("--resume", "--out", "run", "--data", "rows")
    assert done.returncode == 0
    assert f"the run began with torch 1.0, now {torch.__version__}: it goes on, but not bit for bit" in done.stderr
    assert read_config(copy / "run")["versions"] == config["versions"]


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"step": "one"}', b'{"step": 1}', b"\xff", b'{"event": "eval"}', b"7",
                                  b"[" * 100_000])
def test_a_damaged_line_of_the_log_is_named(copy, ctr_train, command, line):
    path = copy / "run" / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[1:]]))
    one_sentence(command(cli_report, "run"), "metrics.jsonl, line 2 is damaged, or does")
    done = ctr_train("--resume", "--out", "run", "--data", "rows")
    assert done.returncode == 1 and "metrics.jsonl, line 2 is damaged, or does" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("key", RESULT_KEYS)
def test_a_result_of_another_version(copy, command, ctr_train, key):
    shutil.move(copy / "gold.json", copy / "run" / "gold.json")
    result = read_result(copy / "run")
    write_result(copy / "run", {name: value for name, value in result.items() if name != key})
    for done in (command(cli_report, "run"), ctr_train("--resume", "--out", "run")):
        one_sentence(done, f"gold.json has no '{key}': it is of another version")


def test_artifacts_of_another_version(copy, ctr_train):
    path = copy / "rows" / "artifacts.json"
    content = read_record(path, KIND)
    write_record(path, "artifacts 99", content)
    assert_fails(ctr_train("--resume", "--out", "run", "--data", "rows"),
                 f"is of the format 'ctr-kernels artifacts 99', not 'ctr-kernels {KIND}'; prepare the rows again")
    path.write_text(json.dumps(content))  # as before there were formats
    assert_fails(ctr_train("--resume", "--out", "run", "--data", "rows"), "it does not name the format")


def test_a_run_whose_data_have_moved_asks_for_them(copy, ctr_train):
    shutil.move(copy / "rows", copy / "elsewhere")
    write_config(copy / "run", {**read_config(copy / "run"), "data": str(copy / "rows")})
    assert_fails(ctr_train("--resume", "--out", "run"), "is gone; say with --data where its rows are now")
    assert ctr_train("--resume", "--out", "run", "--data", "elsewhere").returncode == 0


def test_rows_that_are_prepared_anew_while_a_run_trains_on_them_are_not_mixed(copy, trained, tmp_path, monkeypatch):
    """The run has its own rows open until its end."""
    from ctr_train import execute

    expected, train = read_result(trained / "run"), execute.Trainer.train

    def prepared_meanwhile(trainer, interrupt):
        prepare([trained / "rows.tsv"], tmp_path / "rows", hash_bins=100, min_count=2, history=True, folds=5,
                gold_rows=5)
        return train(trainer, interrupt)

    monkeypatch.setattr(execute.Trainer, "train", prepared_meanwhile)
    config = {**read_config(trained / "run"), "kernels": "auto"}
    assert execute.execute(tmp_path / "new", config, tmp_path / "rows") == 0
    assert {k: v for k, v in read_result(tmp_path / "new").items() if k not in ("rows_per_s", "log")} \
        == {k: v for k, v in expected.items() if k not in ("rows_per_s", "log")}
