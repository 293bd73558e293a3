"""The default path, no option at all, gives every model more than logistic regression has: on synthetic rows, small."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ctr_train.data.artifacts import Artifacts
from ctr_train.data.dataset import open_split
from ctr_train.data.prepare import prepare
from ctr_train.data.synth import write_synthetic
from ctr_train.metrics import logloss

rivals = importlib.import_module("quality_rivals")
MARGIN = 0.02  # of logloss; found: 0.03 to 0.04


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("default") / "rows.tsv"
    write_synthetic(path, rows=30_000, seed=1)
    return path


@pytest.fixture(scope="module")
def regression(raw: Path) -> float:
    """Logloss of logistic regression on the gold rows of the default split."""
    directory = raw.with_name("indicated")
    prepare([raw], directory, missing_indicator=True)
    train, gold = (rivals.all_rows(open_split(directory, name)) for name in ("train", "gold"))
    logits = rivals.regression_logits(train, gold, Artifacts.load(directory).hash_bins, 0)
    return logloss(logits.astype("float32"), gold.label.copy())


@pytest.mark.parametrize("model", ["dcnv2", "autoint", "ft"])
def test_without_any_option_a_model_beats_logistic_regression(raw: Path, regression: float, model: str,
                                                              tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ctr_train.cli_train", "--model", model, "--data", raw, "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    gold = json.loads((tmp_path / "run" / "gold.json").read_text())
    assert gold["logloss"] < regression - MARGIN, (gold["logloss"], regression)
    assert gold["validation"]["logloss"] < regression
