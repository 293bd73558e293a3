"""Going on with a trained model on the rows of later days: `ctr-train --from RUN --data NEXT`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import assert_fails
from raw_lines import features, history, raw_lines

from ctr_train.checkpoint import build_model, kept_path, load_checkpoint
from ctr_train.continued import Continued
from ctr_train.data.artifacts import Artifacts
from ctr_train.data.base import Base
from ctr_train.data.dataset import open_split
from ctr_train.data.folds import folds_of
from ctr_train.data.prepare import prepare
from ctr_train.data.synth import write_days
from ctr_train.data.values import ValueCounts
from ctr_train.runlog import read_log

QUICK = ("--device", "cpu", "--threads", "1")
BINS = 40
CROSS_FITTED = {"hash_bins": BINS, "split": "tail", "valid_ratio": 0.25, "min_count": 12, "history": True, "folds": 4}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> list[Path]:
    """Three days of 12,000 synthetic rows, with drift."""
    out = tmp_path_factory.mktemp("days") / "day.tsv"
    return [truth.file for truth in write_days(out, rows=12_000, days=3, seed=1)]


@pytest.fixture(scope="module")
def first_day(days, tmp_path_factory) -> Path:
    """A model trained on day 1."""
    from ctr_train.run import Request, run

    directory = tmp_path_factory.mktemp("first") / "run"
    machine = {"device": "cpu", "threads": 1, "kernels": None, "cuda_graph": None}
    assert run(Request("dcnv2", out=directory, data=(days[0],), machine=machine)) == 0
    return directory


def test_day_two_after_day_one_beats_day_one_alone_on_day_three(ctr_train, days, first_day, tmp_path):
    done = ctr_train("--from", first_day, "--data", days[1], "--out", "second", *QUICK)
    assert done.returncode == 0, done.stderr
    logloss = {"day 1": scored(first_day, days[2]), "days 1, 2": scored(tmp_path / "second", days[2])}
    assert logloss["days 1, 2"] < logloss["day 1"] - 0.003, logloss
    config = read(tmp_path / "second" / "config.json")
    assert (config["from"], config["model"], config["epochs"]) == (str(first_day), "dcnv2", 1)
    assert config["lr"] == read(first_day / "config.json")["lr"]
    found, before = Artifacts.load(tmp_path / "second"), Artifacts.load(first_day)
    assert found.values["rows"] == before.counts["train"] + found.counts["train"]
    assert (found.numeric_edges, found.history_moments) == (before.numeric_edges, before.history_moments)
    assert found.table_rows > before.table_rows  # values of day 2 have come often enough by now


def scored(run: Path, raw: Path) -> float:
    from ctr_train.cli_eval import Trained, score_raw

    trained = Trained.load(run, checkpoint=None, kernels="auto", device="cpu", threads=1)
    return score_raw(trained, raw, None, None)["logloss"]


@pytest.mark.parametrize("folds", [4, 0], ids=["cross-fitted", "ordered"])
def test_the_history_of_day_two_goes_on_from_day_one(tmp_path, folds):
    options = {**CROSS_FITTED, "folds": folds}
    one, two = raw_lines(120, seed=0), raw_lines(160, seed=1)
    prepare([write(tmp_path / "1.tsv", one)], tmp_path / "one", **{**options, "valid_ratio": 0.0})
    base = Base.load(tmp_path / "one")
    found = prepare([write(tmp_path / "2.tsv", two)], tmp_path / "two", base=base, split="tail", valid_ratio=0.25)
    assert found.differences(base.artifacts, values=False) == []
    assert found.continued == base.artifacts.values["sha256"]
    yesterday, today = ([features(line, BINS) for line in lines] for lines in (one, two))
    fold = folds_of(np.arange(160), 4)
    train, valid = (open_split(tmp_path / "two", name).slice(0, 1000) for name in ("train", "valid"))
    for field in (0, 7, 25):
        before, rows = ([(row[2][field], row[0]) for row in part] for part in (yesterday, today[:120]))
        for i, (id_, _) in enumerate(rows):
            seen = rows[:i] if not folds else [row for row, its in zip(rows, fold, strict=False) if its != fold[i]]
            np.testing.assert_allclose(train.dense[i, [13 + field, 39 + field]], history(id_, before + seen), rtol=1e-5,
                                       atol=1e-6)
        for i, row in enumerate(today[120:]):
            np.testing.assert_allclose(valid.dense[i, [13 + field, 39 + field]],
                                       history(row[2][field], before + rows), rtol=1e-5, atol=1e-6)


def test_labels_of_day_two_reach_no_feature_of_their_own_row(tmp_path):
    prepare([write(tmp_path / "1.tsv", raw_lines(120, seed=0))], tmp_path / "one", **CROSS_FITTED)
    base, lines, fold = Base.load(tmp_path / "one"), raw_lines(160, seed=1), folds_of(np.arange(160), 4)
    turned = [line if its != 2 else str(1 - int(line[0])) + line[1:] for line, its in zip(lines, fold, strict=True)]
    for name, text in (("a", lines), ("b", turned)):
        prepare([write(tmp_path / f"{name}.tsv", text)], tmp_path / name, base=base, valid_ratio=0.2)
    a, b = (open_split(tmp_path / name, "train").slice(0, 1000) for name in ("a", "b"))
    same = (a.label == b.label)
    np.testing.assert_array_equal(a.dense[~same], b.dense[~same])  # a fold whose labels turned does not see them
    assert (a.dense[same] != b.dense[same]).any(axis=1).all()


def test_ids_of_the_first_day_stay_and_new_ones_follow(tmp_path):
    prepare([write(tmp_path / "1.tsv", raw_lines(120, seed=0))], tmp_path / "one", **CROSS_FITTED)
    base = Base.load(tmp_path / "one")
    prepare([write(tmp_path / "2.tsv", raw_lines(300, seed=1))], tmp_path / "two", base=base)
    later = Base.load(tmp_path / "two")
    had = base.counts.kept > 0
    np.testing.assert_array_equal(later.counts.kept[had], base.counts.kept[had])
    added = later.counts.kept[(later.counts.kept > 0) & ~had]
    assert len(added) and added.min() == base.counts.kept.max() + 1
    assert sorted(added) == list(range(added.min(), added.min() + len(added)))
    assert later.artifacts.table_rows == base.artifacts.table_rows + len(added)


def test_weights_and_optimizer_states_are_taken_over_and_lengthened(first_day, days, tmp_path):
    continued = Continued.load(first_day)
    prepare([days[1]], tmp_path / "two", base=continued.base)
    artifacts, content = Artifacts.load(tmp_path / "two"), load_checkpoint(kept_path(first_day))
    torch.manual_seed(0)
    model = build_model(continued.config, artifacts, "auto")
    weights, states = continued.state(model, artifacts)
    before = continued.base.artifacts.table_rows
    name = "tokenizer.embedding.table.weight"
    assert weights[name].shape[0] == artifacts.table_rows > before
    torch.testing.assert_close(weights[name][:before], content["model"][name], rtol=0, atol=0)
    torch.testing.assert_close(weights[name][before:], model.state_dict()[name][before:], rtol=0, atol=0)
    model.load_state_dict(weights)
    (sums,) = (state["sum"] for state in states[0]["state"].values())
    assert sums.shape[0] == artifacts.table_rows and (sums[before:] == 0).all() and (sums[:before] > 0).any()


def test_a_third_day_goes_on_from_the_second_and_resuming_changes_nothing(ctr_train, first_day, days, tmp_path):
    arguments = ("--data", days[1], "--prepared", "two", *QUICK)
    assert ctr_train("--from", first_day, "--out", "whole", *arguments).returncode == 0
    steps = read(tmp_path / "whole" / "gold.json")["steps"]
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for name in ("gold.json", "best.pt", "last.pt"):  # killed before it had saved anything
        (tmp_path / "killed" / name).unlink()
    again = ctr_train("--resume", "--out", "killed")
    assert again.returncode == 0 and "beginning again" in again.stderr
    whole, killed = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    assert all(torch.equal(whole["model"][name], killed["model"][name]) for name in whole["model"])
    assert ctr_train("--from", "whole", "--data", days[2], "--out", "third", *QUICK).returncode == 0
    assert [entry["step"] for entry in read_log(tmp_path / "third")][-1] <= steps + 1
    counts = ValueCounts.load(tmp_path / "third", Artifacts.load(tmp_path / "third").values, 2_000_000)
    assert counts.rows == sum(Artifacts.load(run).counts["train"] for run in (first_day, tmp_path / "whole",
                                                                              tmp_path / "third"))


@pytest.fixture(scope="module")
def few_rows(days, tmp_path_factory) -> Path:
    """few.tsv, and its rows prepared without regard to the run: `other` features, and `alike` ones."""
    directory = tmp_path_factory.mktemp("few")
    few = write(directory / "few.tsv", days[1].read_text().splitlines()[:400])
    prepare([few], directory / "other")
    prepare([few], directory / "alike", min_count=10, history=True, folds=10)
    return directory


@pytest.mark.parametrize(("arguments", "sentence"), [
    (("--numeric", "token"), "--numeric token: the run in day1 has affine, and its weights fit nothing else"),
    (("--embedding-optimizer", "sgd"), "--embedding-optimizer sgd: the run in day1 has rowwise-adagrad"),
    (("--model", "ft"), "--model ft: the run in day1 has model dcnv2"),
    (("--recipe", "full"), "--recipe full: the run in day1 has recipe auto"),
    (("--data", "other"), "other has other features than day1: min_count is 10 there and 1 here; history is True"),
    (("--data", "alike"), "alike was not prepared to go on from day1: its ids are others; prepare its rows with "
                          "`ctr-data prepare --from day1"),
    (("--data", "empty.tsv"), "empty.tsv is empty"),
    (("--lr", "nan"), "--lr nan: at least 0.0"),
    (("--from", "nowhere"), "nowhere is no run: there is no such directory"),
    (("--from", "unfinished"), "unfinished holds a run that has not finished: ctr-train --resume --out unfinished"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_mistakes_are_one_sentence_and_leave_nothing(ctr_train, first_day, few_rows, tmp_path, arguments, sentence):
    (tmp_path / "day1").symlink_to(first_day)
    (tmp_path / "empty.tsv").touch()
    for path in few_rows.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "unfinished").mkdir()
    shutil.copy(first_day / "last.pt", tmp_path / "unfinished")
    before = sorted(path.name for path in tmp_path.iterdir())
    data = () if "--data" in arguments else ("--data", "few.tsv")
    assert_fails(ctr_train("--from", "day1", *data, "--out", "run", *arguments), sentence)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_going_on_needs_rows(ctr_train, first_day):
    assert_fails(ctr_train("--from", first_day), "--from needs --data: which rows does the run go on with?")
