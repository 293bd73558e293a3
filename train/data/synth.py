"""Synthetic rows in the raw Criteo format, with the true click probability of every row kept beside them."""

import gzip
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UserError
from ..files import atomic_path, sha256, write_json
from ..metrics import evaluate_logits
from .protocol import DENSE_NAMES, SPARSE_NAMES
from .synth_features import FREQUENT, LAST_DAY, draw_features, identities
from .teacher import Teacher

MAX_ROWS = 1 << 40
CHUNK_ROWS = 16_384  # rows of one random stream: part of what the data of a seed are
THREADS, AHEAD = 2, 4  # numpy lets go of the interpreter's lock for most of a chunk; chunks drawn before they are due
_NO_WORD = np.uint32(0)


@dataclass(frozen=True)
class Truth:
    """What is known of synthetic rows.

    Attributes:
        file: the rows.
        rows, seed, day: what was asked for.
        label_rate: mean label.
        logloss, auc: of the true probabilities on the labels drawn: no model can be expected to do better. auc is NaN
            where it is undefined (labels of one class only).
        probabilities: the .npy file of the true probabilities, float32 [rows] in the order of the lines.
    """

    file: Path
    rows: int
    seed: int
    day: int
    label_rate: float
    logloss: float
    auc: float
    probabilities: Path


def write_synthetic(
    out: Path | str, *, rows: int, seed: int, day: int = 0, progress: Callable[[int], None] | None = None
) -> Truth:
    """Write `rows` labelled lines to `out`, gzip-compressed if it ends in .gz; the same seed gives the same bytes.

    Beside it go OUT.truth.npy (probabilities) and OUT.truth.json ({"rows", "seed", "label_rate", "best_possible":
    {"logloss", "auc"}, "sha256" of `out`, "probabilities_sha256"}, auc null where undefined; "day" after "seed" where
    it is not 0). `out` itself appears last, when everything else is there. An earlier `out` is replaced if it has such
    a record.

    Args:
        day: 0 and 1 are the beginning, with the same bytes. On later days effects and click rate have drifted
            (`teacher`) and some values are new (`synth_features`), alike for all seeds; the rows are other ones.
        progress: called with the number of rows after each chunk written.

    Raises UserError: rows below 1, a day below 0 or above LAST_DAY, files that cannot be written (nothing is left
        half-written, nor the truth without its rows).
    """
    out = Path(out)
    _check_rows(rows)
    if not 0 <= day <= LAST_DAY:
        raise UserError(f"cannot make synthetic rows of day {day:,}: it is not between 0 and {LAST_DAY:,}")
    probabilities_file, json_file = (out.with_name(out.name + ending) for ending in (".truth.npy", ".truth.json"))
    if out.is_file() and out.stat().st_size and not json_file.exists():
        raise UserError(f"{out} exists and was not made here ({json_file.name} is not beside it): choose another file")
    logits, labels = np.empty(rows, dtype=np.float32), np.empty(rows, dtype=np.uint8)
    done = 0
    beside: list[Path] = []
    try:
        with atomic_path(out) as temporary:
            with open(temporary, "wb") as raw, _compressed(raw) if out.suffix == ".gz" else raw as file:
                for text, chunk_logits, chunk_labels in _chunks(rows, seed, day):
                    file.write(text)
                    count = len(chunk_labels)
                    logits[done:done + count], labels[done:done + count] = chunk_logits, chunk_labels
                    done += count
                    if progress is not None:
                        progress(count)
            metrics = evaluate_logits(logits, labels)
            with atomic_path(probabilities_file) as file_name, open(file_name, "wb") as file:
                np.save(file, _probability(logits))
            beside.append(probabilities_file)
            write_json(json_file, {
                "rows": rows, "seed": seed, **({"day": day} if day else {}), "label_rate": metrics["label_rate"],
                "best_possible": {"logloss": metrics["logloss"], "auc": metrics["auc"]}, "sha256": sha256(temporary),
                "probabilities_sha256": sha256(probabilities_file),
            })
            beside.append(json_file)
    except BaseException:
        for path in beside:
            path.unlink(missing_ok=True)
        raise
    auc = float("nan") if metrics["auc"] is None else metrics["auc"]
    return Truth(out, rows, seed, day, metrics["label_rate"], metrics["logloss"], auc, probabilities_file)


def write_days(
    out: Path | str, *, rows: int, days: int, seed: int, progress: Callable[[int], None] | None = None
) -> list[Truth]:
    """Write days 1 to `days`, `rows` lines each, to the files `day_file(out, day, days)`; the truth of each, in order.

    A day's bytes do not depend on `days`. For the rest see `write_synthetic`; what fails leaves the days before whole.

    Raises UserError: as `write_synthetic`; days below 1 or above LAST_DAY (nothing is written then).
    """
    check_days(rows, days)
    return [write_synthetic(day_file(out, day, days), rows=rows, seed=seed, day=day, progress=progress)
            for day in range(1, days + 1)]


def day_file(out: Path | str, day: int, days: int) -> Path:
    """Where a day of `days` goes: its number before the suffix (or before that and .gz), FILE-3.tsv.gz.

    Numbers have as many digits as that of the last day, so that the names sort.
    """
    out = Path(out)
    suffix = Path(out.stem).suffix + out.suffix if out.suffix == ".gz" else out.suffix
    return out.with_name(f"{out.name.removesuffix(suffix)}-{day:0{len(str(days))}d}{suffix}")


def check_days(rows: int, days: int) -> None:
    """UserError, before anything is written, unless `write_days` can make as many rows and days."""
    _check_rows(rows)
    if not 1 <= days <= LAST_DAY:
        raise UserError(f"cannot make {days:,} days of synthetic rows: from 1 to {LAST_DAY:,} are possible")


def _check_rows(rows: int) -> None:
    if rows < 1:
        raise UserError(f"cannot make {rows:,} synthetic rows: at least 1 is needed")
    if rows > MAX_ROWS:
        raise UserError(f"cannot make {rows:,} synthetic rows: at most {MAX_ROWS:,} are possible")


def _compressed(raw: BinaryIO) -> gzip.GzipFile:
    """A gzip stream without name and time, so that the bytes depend on nothing but the rows."""
    return gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=0)


def _chunks(rows: int, seed: int, day: int) -> Iterator[tuple[bytes, np.ndarray, np.ndarray]]:
    """(lines, true logits, labels) of each chunk in order, drawn ahead by threads."""
    teacher, values = Teacher(day), identities(day)
    sizes = [min(CHUNK_ROWS, rows - start) for start in range(0, rows, CHUNK_ROWS)]
    pending: deque[Future[tuple[bytes, np.ndarray, np.ndarray]]] = deque()
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        try:
            for chunk, size in enumerate(sizes):
                pending.append(pool.submit(_draw, teacher, values, (seed, day, chunk), size))
                if len(pending) > AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _draw(teacher: Teacher, frequent: dict[str, np.ndarray], stream: tuple[int, int, int],
          rows: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """The first `rows` rows of the chunk of the stream (seed, day, chunk), of the day's teacher and frequent values.

    Whole chunks are drawn, so that fewer rows are the beginning of more.
    """
    seed, day, chunk = stream
    key = np.array([seed % 2**64, max(day - 1, 0) << 32 | chunk], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    values, missing = draw_features(generator, CHUNK_ROWS)
    logits = teacher.logits(values, missing)
    labels = (generator.random(CHUNK_ROWS, dtype=np.float32) < _probability(logits)).astype(np.uint8)
    if day > 1:
        for name, identity in frequent.items():
            ranks = values[name]
            values[name] = np.where(ranks < FREQUENT, identity[np.minimum(ranks, FREQUENT - 1)], ranks)
    return (format_lines(labels[:rows], {name: column[:rows] for name, column in values.items()},
                         {name: column[:rows] for name, column in missing.items()}), logits[:rows], labels[:rows])


def _probability(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def format_lines(labels: np.ndarray, values: dict[str, np.ndarray], missing: dict[str, np.ndarray]) -> bytes:
    """Rows as raw Criteo lines: label, I1..I13 as decimals, C1..C26 as 8 hex digits, empty where missing.

    Each entry is laid out in 12 bytes: a TAB and up to 8 characters, the rest NUL; deleting the NULs gives the lines.
    """
    words = np.zeros((len(labels), 1 + 3 * (len(DENSE_NAMES) + len(SPARSE_NAMES)) + 1), dtype="<u4")
    words[:, 0] = labels + ord("0")
    words[:, 1:-1:3] = ord("\t")
    words[:, -1] = ord("\n")
    for column, name in enumerate(DENSE_NAMES + SPARSE_NAMES):
        if name in DENSE_NAMES:
            high, low = _decimal_words(values[name])
        else:
            high, low = _hex_words(value_codes(SPARSE_NAMES.index(name), values[name]))
        if name in missing:
            high, low = np.where(missing[name], _NO_WORD, high), np.where(missing[name], _NO_WORD, low)
        words[:, 3 * column + 2], words[:, 3 * column + 3] = high, low
    return words.tobytes().translate(None, b"\0")


def value_codes(field: int, ranks: np.ndarray) -> np.ndarray:
    """uint32 codes of the values of a categorical field (from 0) by rank; distinct within a field.

    The finaliser of MurmurHash3 (Appleby), a bijection of 32-bit integers, after adding a constant of the field.
    """
    code = ranks.astype(np.uint32) + np.uint32((field + 1) * 0x9E3779B9 % 2**32)
    code ^= code >> np.uint32(16)
    code *= np.uint32(0x85EBCA6B)
    code ^= code >> np.uint32(13)
    code *= np.uint32(0xC2B2AE35)
    code ^= code >> np.uint32(16)
    return code


def _words_of(texts: list[str]) -> np.ndarray:
    """Texts of up to 4 ASCII characters as little-endian words uint32, NUL after their end."""
    return np.frombuffer(np.array(texts, dtype="S4").tobytes(), dtype="<u4")


_DECIMAL = _words_of([str(i) for i in range(10_000)])
_LAST_FOUR = _words_of([f"{i:04d}" for i in range(10_000)])  # after higher digits
_NEGATIVE = _words_of([str(-i) for i in range(1_000)])
_HEX = _words_of([f"{i:04x}" for i in range(1 << 16)])


def _decimal_words(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(higher, last four) characters of integers from -999 to 99,999,999."""
    high, low = np.divmod(np.maximum(numbers, 0), 10_000)
    words = np.where(high > 0, _DECIMAL[high], _NO_WORD), np.where(high > 0, _LAST_FOUR[low], _DECIMAL[low])
    return words[0], np.where(numbers < 0, _NEGATIVE[np.maximum(-numbers, 0) % 1_000], words[1])


def _hex_words(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first four, last four) hex digits of uint32 codes."""
    return _HEX[codes >> np.uint32(16)], _HEX[codes & np.uint32(0xFFFF)]
