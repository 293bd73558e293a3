"""The end of a run: whichever weights are kept are calibrated, in their checkpoint and nowhere else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ctr_train import loop
from ctr_train.checkpoint import build_model, kept_path, load_checkpoint, load_scored, scored_weights
from ctr_train.data.dataset import open_split
from ctr_train.evaluate import evaluate, labels_of, predict
from ctr_train.finish import finish, result_table
from ctr_train.records import write_config

MORE = {"recipe": "small", "seed": 0, "deterministic": False, "from": None, "data": "rows", "train_rows": 1,
        "history": False, "kernels_resolved": {}, "versions": {}}  # what a run's settings hold beside the trainer's
OPTIONS = {"batch_size": 64, "device": "cpu", "precision": "fp32"}


@pytest.fixture
def finished(make_trainer, prepared, tmp_path):
    """(directory name, **settings) -> its directory, after training and finish, and the trainer."""

    def run(name: str, **settings):
        trainer, stop = make_trainer(name, model="ft", shortcut="mlp", batch_size=64, **settings)
        outcome = trainer.train(stop)
        write_config(tmp_path / name, {**trainer.config, **MORE})
        finish(tmp_path / name, trainer, open_split(prepared, "train"), prepared)
        return tmp_path / name, trainer, outcome

    return run


def scored_model(directory: Path, trainer):
    content = load_checkpoint(kept_path(directory))
    model = build_model(trainer.config, trainer.artifacts, "auto")
    load_scored(model, content)
    return model, content


@pytest.mark.parametrize(("name", "settings", "losses", "kept"), [
    ("no evaluations", {"steps": 6}, [], ("last.pt", 6)),
    ("the last is best", {"steps": 6, "eval_every": 3}, [0.5, 0.4], ("best.pt", 6)),
    ("an earlier one is best", {"steps": 6, "eval_every": 3}, [0.4, 0.5], ("best.pt", 3)),
    ("patience", {"steps": 60, "eval_every": 3, "patience": 2}, [0.4, 0.3, 0.5, 0.5], ("best.pt", 6)),
    ("average", {"steps": 6, "eval_every": 3, "ema": 0.8}, [0.4, 0.5], ("best.pt", 3)),
])
def test_the_kept_weights_are_calibrated(finished, prepared, monkeypatch, name, settings, losses, kept):
    remaining = iter(losses)
    monkeypatch.setattr(loop, "evaluate", lambda *args, **options: {"logloss": next(remaining), "auc": None})
    directory, trainer, outcome = finished(name, temperature=2.0, calibration_rows=500, **settings)
    assert outcome == ("patience" if name == "patience" else "finished")
    model, content = scored_model(directory, trainer)
    assert (kept_path(directory).name, content["step"]) == kept
    train = open_split(prepared, "train")
    part = train.part(train.rows - 500, train.rows)
    assert evaluate(model, part, **OPTIONS)["calibration"] == pytest.approx(1.0, abs=1e-5)
    plain = build_model(trainer.config, trainer.artifacts, "auto")
    plain.load_state_dict(scored_weights(content))
    found, before = (predict(which, part, **OPTIONS) for which in (model, plain))
    np.testing.assert_allclose(found, before / 2 + content["calibration"]["shift"], atol=1e-5)
    assert abs(content["calibration"]["shift"]) > 1e-3
    gold = json.loads((directory / "gold.json").read_text())
    again = evaluate(model, open_split(prepared, "gold"), **OPTIONS)
    assert gold["logloss"] == pytest.approx(again["logloss"], abs=1e-7)
    assert (gold["checkpoint"], gold["logit_calibration"]) == (kept[0], content["calibration"])
    if losses:
        assert load_checkpoint(directory / "last.pt")["calibration"] == {"scale": 1.0, "shift": 0.0}


def test_finishing_twice_changes_nothing(finished, make_trainer, prepared, tmp_path):
    """A run killed while it was being finished is finished anew from the same weights."""
    directory, trainer, _ = finished("run", temperature=2.0, calibration_rows=500, steps=6, eval_every=3)
    first = load_checkpoint(directory / "best.pt")
    finish(directory, trainer, open_split(prepared, "train"), prepared)
    second = load_checkpoint(directory / "best.pt")
    assert first["calibration"] == second["calibration"]
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])


def test_nothing_is_calibrated_unless_asked_for(finished):
    directory, trainer, _ = finished("run", temperature=1.0, calibration_rows=0, steps=6)
    _, content = scored_model(directory, trainer)
    assert content["calibration"] == {"scale": 1.0, "shift": 0.0}


def test_labels_of_the_calibrating_rows_are_the_click_rate(finished, prepared):
    directory, trainer, _ = finished("run", temperature=1.0, calibration_rows=10**9, steps=6)
    model, _ = scored_model(directory, trainer)
    train = open_split(prepared, "train")
    mean = torch.from_numpy(predict(model, train, **OPTIONS)).double().sigmoid().mean().item()
    assert mean == pytest.approx(float(labels_of(train).mean()), abs=1e-6)


@pytest.mark.parametrize(("losses", "said"), [([0.5, 0.4], "6 of 6, the last: still improving"),
                                              ([0.4, 0.5], "3 of 6, kept: worse afterwards")])
def test_the_table_says_whether_the_run_was_still_improving(finished, monkeypatch, losses, said):
    remaining = iter(losses)
    monkeypatch.setattr(loop, "evaluate", lambda *args, **options: {"logloss": next(remaining), "auc": None})
    directory, trainer, _ = finished("run", steps=6, eval_every=3)
    lines = dict(line.split(None, 1) if not line.startswith(("best step", "training loss")) else
                 (line[:13].strip(), line[15:]) for line in result_table(directory).splitlines())
    assert lines["best step"] == said
    assert lines["validation"].startswith("0.4000   (the last ")
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    kept = [entry["loss"] for entry in log if "loss" in entry and entry["step"] == int(said[0])]
    assert lines["training loss"].startswith(f"{kept[0]:.4f}")
