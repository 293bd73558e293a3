"""metrics.jsonl of a run: one JSON object a line, written as training goes on."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import UserError
from .files import atomic_path

NAME = "metrics.jsonl"


class RunLog:
    """Appends to the run's metrics.jsonl; lines after `step`, the one a run goes on from, are cut off first.

    Lines are {"step", "epoch", "loss", "rows_per_s", "lr"}, and {"event": "eval", "step", ...metrics}.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self._path, self._step = directory / NAME, step

    def __enter__(self) -> "RunLog":
        kept = [line for line in read_log(self._path.parent) if line["step"] <= self._step]
        with atomic_path(self._path) as temporary:
            temporary.write_text("".join(_line(entry) for entry in kept))
        self._handle = open(self._path, "ab", buffering=0)  # each line reaches the file at once
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._handle.close()

    def write(self, entry: dict[str, Any]) -> None:
        """Add a line. ValueError for NaN or infinity, which JSON does not have; UserError where that fails."""
        line = _line(entry).encode()
        try:
            while line:  # a disk that fills up takes a part first
                line = line[self._handle.write(line):]
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}") from error


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The entries of a run's metrics.jsonl, [] without one; a last line that a crash cut short is left out."""
    path = directory / NAME
    lines = path.read_text().split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]


def rows_per_second(entries: list[dict[str, Any]]) -> float | None:
    """Training rows a second over a whole run, evaluations and checkpoints left out; None without training lines."""
    training = [entry for entry in entries if "event" not in entry]
    if not training:
        return None
    steps = [b["step"] - a["step"] for a, b in zip([{"step": 0}, *training], training, strict=False)]
    seconds_a_row = sum(n / entry["rows_per_s"] for n, entry in zip(steps, training, strict=True))
    return sum(steps) / seconds_a_row


def training_loss(entries: list[dict[str, Any]], step: int, share: float = 0.1) -> float | None:
    """Mean loss of the steps before `step`, of the last `share` of them; None without training lines."""
    total, steps, before = 0.0, 0, 0
    for entry in (entry for entry in entries if "event" not in entry and entry["step"] <= step):
        if entry["step"] > (1.0 - share) * step:
            total += entry["loss"] * (entry["step"] - before)
            steps += entry["step"] - before
        before = entry["step"]
    return total / steps if steps else None


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"
