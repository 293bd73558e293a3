"""What `prepare` must know of the whole input before it writes a row: the number of lines, and counts of values."""

import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .artifacts import FILE as ARTIFACTS_FILE
from .artifacts import Artifacts
from .folds import FoldCounts, folds_of
from .protocol import is_tail, is_validation
from .raw import Progress, Source, read_blocks
from .values import ValueCounts

Rule = Callable[[np.ndarray], np.ndarray]  # line_index int64 [n] -> whether validation, bool [n]


def passes(settings: Artifacts) -> int:
    """How often the input is read: 1, and once more each for --split tail, counts of values, cross-fitted history."""
    return 1 + (settings.split == "tail") + settings.counts_values + (settings.history and settings.folds > 0)


class Inputs:
    """Raw files that are read several times and must be the same each time.

    Args:
        paths: the files, in order.
        settings: what is prepared; `passes(settings)` says how often they are read.

    Raises UserError for no file, a directory, and a pipe that would have to be read again.
    """

    def __init__(self, paths: Sequence[Path | str], settings: Artifacts) -> None:
        if not paths:
            raise UserError("no input file is given")
        self.paths = [Path(path) for path in paths]
        self._first: list[dict[str, Any]] | None = None
        for path in self.paths:
            if not path.exists():
                raise UserError(f"{path} does not exist")
            if path.is_dir():
                raise UserError(f"{path} is a directory" + (
                    " of prepared data; raw files are needed here" if (path / ARTIFACTS_FILE).exists()
                    else "; raw files are needed"))
            if not stat.S_ISREG(path.stat().st_mode) and passes(settings) > 1:
                raise UserError(f"{path} is a pipe, and the input is read {passes(settings)} times; write it to a file "
                                "first")

    @contextmanager
    def read(self) -> Iterator[list[Source]]:
        """Within: the files, to be read to their ends. UserError afterwards where they are not those of before."""
        sources = [Source(path) for path in self.paths]
        yield sources
        found = [source.describe() for source in sources]
        for now, then in zip(found, self._first or found, strict=True):
            if now["sha256"] != then["sha256"]:
                raise UserError(f"{now['file']} changed while it was prepared: {then['bytes']:,} bytes on the first "
                                f"pass, {now['bytes']:,} on a later one, and others")
        self._first = found


def split_rule(inputs: Inputs, settings: Artifacts, progress: Progress | None) -> Rule:
    """Which lines are validation; --split tail counts the lines for that."""
    if settings.split == "hash":
        return lambda line_index: is_validation(line_index, settings.valid_ratio)
    lines = 0
    with inputs.read() as sources:
        for source in sources:
            before = (0, 0)
            for _ in source.blocks():
                if progress is not None:
                    progress(source.lines - before[0], source.bytes_read - before[1])
                before = source.lines, source.bytes_read
            lines += source.lines
    return lambda line_index: is_tail(line_index, lines, settings.valid_ratio)


def count_values(inputs: Inputs, settings: Artifacts, rule: Rule, on_bad_line: str, base: ValueCounts | None,
                 progress: Progress | None) -> ValueCounts | None:
    """Counts of all training rows, on top of those of `base`; None if no feature needs them."""
    if not settings.counts_values:
        return None
    counts = ValueCounts(settings.hash_bins) if base is None else base.copy()
    for _, label, sparse in _training_rows(inputs, settings, rule, on_bad_line, progress):
        counts.add(sparse, label)
    if settings.min_count > 1:
        counts.keep(settings.min_count)
    return counts


def count_folds(inputs: Inputs, settings: Artifacts, rule: Rule, on_bad_line: str, totals: ValueCounts,
                progress: Progress | None) -> FoldCounts:
    """Counts of the training rows in each fold of theirs."""
    counts = FoldCounts(totals, settings.folds)
    for line_index, label, sparse in _training_rows(inputs, settings, rule, on_bad_line, progress):
        counts.add(sparse, label, folds_of(line_index, settings.folds))
    return counts


def _training_rows(inputs: Inputs, settings: Artifacts, rule: Rule, on_bad_line: str,
                   progress: Progress | None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(line_index, label, sparse) of the training rows of each block."""
    with inputs.read() as sources:
        for block in read_blocks(sources, labelled=True, hash_bins=settings.hash_bins, on_bad_line=on_bad_line,
                                 progress=progress):
            train = np.flatnonzero(~rule(block.line_index))
            assert block.rows.label is not None  # labelled=True
            yield block.line_index[train], block.rows.label[train], block.rows.sparse.take(train, axis=0)
