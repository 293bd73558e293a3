"""metrics.jsonl of a run: one JSON object a line, written as training goes on.

Each line ends with a checksum of itself and all lines before it, "chain": what is changed, lost or out of order shows.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import UserError
from .files import atomic_path

NAME, CHAIN = "metrics.jsonl", "chain"
TRAINING, EVALUATION = ("step", "epoch", "loss", "rows_per_s", "lr"), ("step", "logloss")  # numbers of a line


class RunLog:
    """Appends to the run's metrics.jsonl; lines that the run goes on without are cut off first.

    Lines are {"step", "epoch", "loss", "rows_per_s", "lr"}, and {"event": "eval", "step", ...metrics}.

    Args:
        chain: of the last line to keep, as `chain` was when the checkpoint was saved; 0 keeps none.

    Attributes:
        chain: of the last line written.
    """

    def __init__(self, directory: Path, chain: int) -> None:
        self._path, self.chain = directory / NAME, chain

    def __enter__(self) -> "RunLog":
        kept = b""
        if self.chain:
            for line, _, chain in _lines(self._path):
                kept += line + b"\n"
                if chain == self.chain:
                    break
            else:
                raise UserError(f"{self._path} has lost lines that were there when the checkpoint was saved")
        with atomic_path(self._path) as temporary:
            temporary.write_bytes(kept)
        self._handle = open(self._path, "ab", buffering=0)  # each line reaches the file at once
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._handle.close()

    def write(self, entry: dict[str, Any]) -> None:
        """Add a line. ValueError for NaN or infinity, which JSON does not have; UserError where that fails."""
        chain = _next(self.chain, entry)
        line = json.dumps({**entry, CHAIN: chain}, allow_nan=False).encode() + b"\n"
        try:
            while line:  # a disk that fills up takes a part first
                line = line[self._handle.write(line):]
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror or error}") from error
        self.chain = chain


def read_log(directory: Path, chain: int | None = None) -> list[dict[str, Any]]:
    """The entries of a run's metrics.jsonl, [] without one; a last line that a crash cut short is left out.

    chain: of the last line, where it is known. Raises UserError for a line that is damaged, lost or out of order.
    """
    lines = list(_lines(directory / NAME))
    if chain not in (None, lines[-1][2] if lines else 0):
        raise UserError(f"{directory / NAME} is damaged: its last lines are missing")
    return [entry for _, entry, _ in lines]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any], int]]:
    """(line, its entry, its chain) of every whole line; UserError for one that does not follow from those before."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    before = 0
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            chain = entry.pop(CHAIN)
            good = chain == _next(before, entry) and all(
                isinstance(entry[key], int | float) for key in (EVALUATION if "event" in entry else TRAINING))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            good = False
        if not good:
            raise UserError(f"{path}, line {number:,} is damaged, or does not belong there: "
                            f"{line[:60].decode(errors='backslashreplace')!r}")
        yield line, entry, chain
        before = chain


def _next(chain: int, entry: dict[str, Any]) -> int:
    """The chain of a line; never 0."""
    return zlib.crc32(json.dumps(entry, allow_nan=False).encode(), chain) or 1


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
