"""What `prepare` must know of the whole input before it writes a row: the number of lines, and counts of values."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .artifacts import Artifacts
from .protocol import is_tail, is_validation
from .raw import Progress, Source, read_blocks
from .values import ValueCounts

Rule = Callable[[np.ndarray], np.ndarray]  # line_index int64 [n] -> whether validation, bool [n]


def passes(settings: Artifacts) -> int:
    """How often the input is read: 1, and once more each for --split tail and for counts of values."""
    return 1 + (settings.split == "tail") + settings.counts_values


def split_rule(inputs: Sequence[Path | str], settings: Artifacts, progress: Progress | None) -> Rule:
    """Which lines are validation; --split tail counts the lines for that."""
    if settings.split == "hash":
        return lambda line_index: is_validation(line_index, settings.valid_ratio)
    lines = 0
    for source in map(Source, inputs):
        before = (0, 0)
        for _ in source.blocks():
            if progress is not None:
                progress(source.lines - before[0], source.bytes_read - before[1])
            before = source.lines, source.bytes_read
        lines += source.lines
    return lambda line_index: is_tail(line_index, lines, settings.valid_ratio)


def count_values(inputs: Sequence[Path | str], settings: Artifacts, rule: Rule, on_bad_line: str,
                 progress: Progress | None) -> ValueCounts | None:
    """Counts of all training rows; None if no feature needs them."""
    if not settings.counts_values:
        return None
    counts = ValueCounts(settings.hash_bins)
    for block in read_blocks([Source(path) for path in inputs], labelled=True, hash_bins=settings.hash_bins,
                             on_bad_line=on_bad_line, progress=progress):
        train = np.flatnonzero(~rule(block.line_index))
        assert block.rows.label is not None  # labelled=True
        counts.add(block.rows.sparse.take(train, axis=0), block.rows.label[train])
    return counts
