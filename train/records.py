"""The two records of a run directory: config.json, how it is trained, and gold.json, what came out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import read_record, write_record
from .recipes import HYPERPARAMETERS

CONFIG, RESULT = "config.json", "gold.json"
CONFIG_KIND, RESULT_KIND = "run 1", "result 1"  # of the record, and its version
CONFIG_KEYS = (*HYPERPARAMETERS, "model", "recipe", "seed", "deterministic", "from", "data", "train_rows", "history",
               "kernels_resolved", "versions")
RESULT_KEYS = ("rows", "sha256", "logloss", "auc", "normalised_entropy", "calibration", "reliability", "best_possible",
               "checkpoint", "steps", "rows_trained", "rows_per_s", "training_loss", "validation", "log")


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """config.json of a run: its settings, atomically."""
    write_record(directory / CONFIG, CONFIG_KIND, config)


def read_config(directory: Path) -> dict[str, Any]:
    """The settings of the run in `directory`; UserError where config.json is missing, damaged or of another version."""
    return _complete(directory / CONFIG, read_record(directory / CONFIG, CONFIG_KIND), CONFIG_KEYS)


def write_result(directory: Path, result: dict[str, Any]) -> None:
    """gold.json of a finished run, atomically."""
    write_record(directory / RESULT, RESULT_KIND, result)


def read_result(directory: Path) -> dict[str, Any]:
    """The result of the run in `directory`; UserError where gold.json is missing, damaged or of another version."""
    return _complete(directory / RESULT, read_record(directory / RESULT, RESULT_KIND), RESULT_KEYS)


def _complete(path: Path, content: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    for key in keys:
        if key not in content:
            raise UserError(f"{path} has no {key!r}: it is of another version; choose another --out for a new run")
    return content
