"""Raw Criteo files, plain or gzip, as a stream of features: read in order, parsed by a few threads."""

import gzip
import hashlib
import io
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .artifacts import Artifacts
from .containers import BOM, HEAD_BYTES, container_of
from .history import ValueFeatures
from .parse import COLUMNS, BadLine, Block, Parser, good_lines, parse_block
from .values import ValueCounts

BLOCK_BYTES = 1 << 19  # some 2,000 lines: larger arrays leave the cache and are mapped anew at each use
KEPT_BYTES = 24 << 20  # below 32 MB, up to which glibc lets the threshold rise
MAX_LINE_BYTES = 1 << 20
LARGE_BYTES = 16 << 20  # of all files: what whole arrays parse within the second that it takes to import torch
MAX_THREADS = 8  # each holds some 50 MB; the one thread that reads keeps no more of them busy
GZIP_MAGIC = b"\x1f\x8b"
Progress = Callable[[int, int], None]  # (lines, bytes of the files) since the last call


@dataclass
class RawFeatures:
    """Rows in the order of the files: dense float32 [n, num_dense], sparse int32 [n, 26], label uint8 [n] (None if
    unlabelled), line_index int64 [n] from 0 over all lines of all files, bad ones included.
    """

    dense: np.ndarray
    sparse: np.ndarray
    label: np.ndarray | None
    line_index: np.ndarray


class Source:
    """One raw file, read as blocks of whole lines.

    Attributes: lines, read so far; sha256 and size of the file, once it has been read to its end.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.lines = 0
        self._digest = hashlib.sha256()
        self.bytes_read = 0

    def blocks(self) -> Iterator[bytes]:
        """Whole lines, about BLOCK_BYTES at a time, each line ended by a newline alone. UserError if unreadable."""
        try:
            with open(self.path, "rb") as file, closing(self._open(file)) as stream:
                yield from self._lines(stream)
        except FileNotFoundError:
            raise UserError(f"{self.path} does not exist") from None
        except IsADirectoryError:
            raise UserError(f"{self.path} is a directory; raw rows are needed here") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{self.path} is a truncated or damaged gzip file, after line {self.lines:,} ({error})") \
                from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error

    def describe(self) -> dict[str, Any]:
        """The entry of `Artifacts.sources`."""
        return {"file": str(self.path), "bytes": self.bytes_read, "sha256": self._digest.hexdigest(),
                "rows": self.lines}

    def _open(self, file: io.BufferedReader) -> Any:
        compressed = file.peek(2)[:2] == GZIP_MAGIC  # by content: names lie
        counted: Any = _Counted(file, self._count)
        return gzip.GzipFile(fileobj=counted) if compressed else counted

    def _count(self, data: bytes) -> None:
        self._digest.update(data)
        self.bytes_read += len(data)

    def _lines(self, stream: Any) -> Iterator[bytes]:
        rest, begun = b"", False
        while data := stream.read(BLOCK_BYTES):
            if not begun:
                data, begun = self._begin(stream, data), True
            cut = data.rfind(b"\n") + 1
            if cut:
                yield self._whole(rest + data[:cut])
                rest = data[cut:]
            else:
                rest += data
            if len(rest) > MAX_LINE_BYTES:
                raise UserError(f"{self.path}, line {self.lines + 1:,} is longer than {MAX_LINE_BYTES:,} bytes: "
                                "no Criteo rows")
        if rest:
            yield self._whole(rest + b"\n")
        if not self.lines:
            raise UserError(f"{self.path} is empty")

    def _begin(self, stream: Any, data: bytes) -> bytes:
        """The first bytes of the text, without a byte order mark; UserError where they are not of a text."""
        while len(data) < HEAD_BYTES and (more := stream.read(BLOCK_BYTES)):
            data += more
        if (container := container_of(data)) is not None:
            inside = " inside gzip" if isinstance(stream, gzip.GzipFile) else ""
            raise UserError(f"{self.path} is {container}{inside}; plain text is needed, or text compressed with gzip")
        return data.removeprefix(BOM)

    def _whole(self, text: bytes) -> bytes:
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        self.lines += text.count(b"\n")
        return text


class _Counted:
    """A file that shows every byte it reads to `seen`."""

    def __init__(self, file: io.BufferedReader, seen: Callable[[bytes], None]) -> None:
        self._file, self._seen = file, seen

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._seen(data)
        return data

    def close(self) -> None:
        """The file is closed by who opened it."""


@dataclass
class ParsedBlock:
    """A block's rows and where they come from; skipped counts its bad lines, of which the first is said."""

    rows: Block
    line_index: np.ndarray
    skipped: int
    first_skipped: str


def read_blocks(
    sources: Sequence[Source],
    *,
    labelled: bool | None,
    hash_bins: int,
    on_bad_line: str = "error",
    seen: Callable[[Block], None] | None = None,
    progress: Progress | None = None,
) -> Iterator[ParsedBlock]:
    """All lines of all sources in order, parsed by as many threads as there are CPUs, up to 8, a few blocks ahead.

    Args:
        labelled: 40 columns (True) or 39 (False); None: False if the first line has 39, else True.
        on_bad_line: "error" raises UserError with file, line and text; "skip" leaves the line out and counts it.
        seen: called with every block in the thread that parsed it, in no order.
    """
    if on_bad_line not in ("error", "skip"):
        raise ValueError(f"on_bad_line={on_bad_line!r}: choose error or skip")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(cpus, MAX_THREADS)
    first_line = 0  # of the file, counted over all files
    parser = _parser(sources)
    # glibc keeps freed memory below a threshold that rises to the largest array freed so far (mallopt(3)). Without
    # this one, all threads return theirs to the kernel and fault it in anew block after block.
    np.empty(KEPT_BYTES, dtype=np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[ParsedBlock]] = deque()
        try:
            for source in sources:
                before = here = 0
                for text in source.blocks():
                    if labelled is None:
                        labelled = text[:text.index(b"\n")].count(b"\t") + 1 != COLUMNS - 1
                    waiting.append(pool.submit(_parse, text, source.path, here, first_line + here, labelled,
                                               hash_bins, on_bad_line, seen, parser))
                    if progress is not None:
                        progress(source.lines - here, source.bytes_read - before)
                    before, here = source.bytes_read, source.lines
                    if len(waiting) > 2 * threads:
                        yield waiting.popleft().result()
                first_line += source.lines
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _parser(sources: Sequence[Source]) -> Parser | None:
    """The native parser for large files, where it is built; None: the one in whole-array operations."""
    if sum(source.path.stat().st_size for source in sources if source.path.exists()) < LARGE_BYTES:
        return None
    from .parse_native import native_parser

    return native_parser()


def _parse(text: bytes, path: Path, line: int, line_index: int, labelled: bool, hash_bins: int, on_bad_line: str,
           seen: Callable[[Block], None] | None, parser: Parser | None) -> ParsedBlock:
    skipped, first = 0, ""
    try:
        rows = parse_block(text, labelled=labelled, hash_bins=hash_bins, parser=parser)
        kept = np.arange(len(rows.sparse))
    except BadLine as bad:
        first = f"{path}, line {line + bad.line + 1:,}: {bad.reason}"
        if on_bad_line == "error":
            raise UserError(first) from None
        good, kept = good_lines(text, labelled=labelled)
        rows = parse_block(good, labelled=labelled, hash_bins=hash_bins)
        skipped = text.count(b"\n") - len(kept)
    if seen is not None:
        seen(rows)
    return ParsedBlock(rows, line_index + kept, skipped, first)


def dense_features(rows: Block, missing_indicator: bool) -> np.ndarray:
    """The numbers of a block float32 [n, 13], or with 13 indicators of what is missing behind them [n, 26]."""
    if not missing_indicator:
        return rows.dense
    return np.concatenate([rows.dense, rows.dense_missing.astype(np.float32)], axis=1)


def read_features(
    paths: Sequence[Path | str],
    *,
    settings: Artifacts,
    counts: ValueCounts | None = None,
    labelled: bool | None = None,
    on_bad_line: str = "error",
    progress: Progress | None = None,
) -> Iterator[RawFeatures]:
    """Features of raw rows as `settings` prepares them, in pieces of some thousand rows.

    Args:
        paths: files in order, plain or gzip.
        settings: hash_bins, missing_indicator, min_count and history are used.
        counts: of the training rows that `settings` come from; needed for min_count and history.
        labelled: 40 columns (True) or 39 (False); None takes what the first line has.
        on_bad_line: "error" or "skip".
        progress: called with (lines, bytes of the files) as they are read.

    Raises UserError for a missing, empty or damaged file, and for a bad line unless they are skipped.
    """
    sources, features = [Source(path) for path in paths], ValueFeatures(settings, counts)
    for block in read_blocks(sources, labelled=labelled, hash_bins=settings.hash_bins, on_bad_line=on_bad_line,
                             progress=progress):
        dense, sparse = features.of_others(dense_features(block.rows, settings.missing_indicator), block.rows.sparse)
        yield RawFeatures(dense, sparse, block.rows.label, block.line_index)
