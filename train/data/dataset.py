"""A prepared split as a memory map: rows are gathered from it by whole batches, never one by one in Python."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..files import check_sha256
from .protocol import NUM_SPARSE

if TYPE_CHECKING:
    from .artifacts import Artifacts

WORD = 4  # bytes of a float32 or int32
SHOWN_SECONDS = 1.0  # a check that took longer is told


class Rows(NamedTuple):
    """Rows of a split as numpy arrays: dense float32 [n, num_dense], sparse int32 [n, 26], label uint8 [n]."""

    dense: np.ndarray
    sparse: np.ndarray
    label: np.ndarray


class Split:
    """The rows of one Arrow IPC file that `ctr-data prepare` wrote (uncompressed; columns label, dense, sparse).

    Nothing is read before it is asked for. Pickles as its path, so that processes share the page cache.

    Args:
        path: the file.

    Raises UserError where it is missing, empty, damaged or not of that form.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._buffer = pa.memory_map(str(self.path)).read_buffer()
            batches = pa.ipc.open_file(self._buffer)
            self.num_dense = _check_schema(batches.schema, self.path)
            batches_with_rows = []
            for i in range(batches.num_record_batches):
                batch = batches.get_batch(i)
                batch.validate()
                if any(column.null_count for column in batch.columns):
                    raise UserError(f"{self.path}: record batch {i} holds nulls; make it again with `ctr-data prepare`")
                if batch.num_rows:
                    batches_with_rows.append(batch)
        except FileNotFoundError:
            raise UserError(f"{self.path} does not exist; make it with `ctr-data prepare`") from None
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.path} is damaged or no Arrow IPC file ({reason}); make it again with "
                            "`ctr-data prepare`") from error
        if not batches_with_rows:
            raise UserError(f"{self.path} holds no rows")
        self._map_columns(batches_with_rows)

    def _map_columns(self, batches: list[pa.RecordBatch]) -> None:
        """Find every column of every record batch in the map: row i of batch k lies at its start + i * width."""
        start = self._buffer.address
        counts = [batch.num_rows for batch in batches]
        self._first = np.cumsum([0, *counts[:-1]])  # [batches], row with which each begins
        self.rows = sum(counts)
        # buffers(): of a plain column (validity, data); of a list (validity, validity of the values, data)
        self._label_at = np.array([batch.column(0).buffers()[1].address - start for batch in batches])
        dense_at, sparse_at = (np.array([batch.column(i).buffers()[2].address - start for batch in batches])
                               for i in (1, 2))
        self._bytes = np.frombuffer(self._buffer, dtype=np.uint8)
        for at in (self._label_at, dense_at, sparse_at):
            if at.min() < 0 or at.max() >= len(self._bytes):  # decompressed copies lie outside the map
                raise UserError(f"{self.path} is compressed and cannot be mapped; make it again with "
                                "`ctr-data prepare`")
        self._dense_at, self._sparse_at = dense_at // WORD, sparse_at // WORD  # Arrow aligns buffers to 8 bytes
        words = len(self._bytes) // WORD
        # A row that begins at each 4-byte word of the file: they overlap, and one `take` copies whole rows.
        self._dense_rows, self._sparse_rows = (
            np.ndarray(words - width + 1, dtype=np.dtype((np.void, width * WORD)), buffer=self._buffer, strides=WORD)
            for width in (self.num_dense, NUM_SPARSE)
        )

    def __len__(self) -> int:
        return self.rows

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Split, (self.path,)

    def gather(self, indices: np.ndarray) -> Rows:
        """The rows of `indices` int64 [n], each in [0, rows), in that order, as fresh arrays; IndexError otherwise."""
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.rows):
            wrong = indices[(indices < 0) | (indices >= self.rows)][0]
            raise IndexError(f"row {wrong} is outside {self.path} of {self.rows:,} rows")
        batch = np.searchsorted(self._first, indices, side="right") - 1
        row = indices - self._first[batch]
        dense = self._dense_rows[self._dense_at[batch] + row * self.num_dense]
        sparse = self._sparse_rows[self._sparse_at[batch] + row * NUM_SPARSE]
        return Rows(dense.view(np.float32).reshape(-1, self.num_dense), sparse.view(np.int32).reshape(-1, NUM_SPARSE),
                    self._bytes[self._label_at[batch] + row])

    def slice(self, start: int, stop: int) -> Rows:
        """Rows start to stop, as a Python slice without step would cut them: read-only views of the map.

        A slice that crosses a record batch (every 65,536 rows) is put together from the pieces' copies.
        """
        start, stop, _ = slice(start, stop).indices(self.rows)
        if start >= stop:
            return self.gather(np.empty(0, dtype=np.int64))
        first, last = np.searchsorted(self._first, [start, stop - 1], side="right") - 1
        pieces = []
        for batch in range(first, last + 1):
            begin = self._first[batch]
            end = self._first[batch + 1] if batch + 1 < len(self._first) else self.rows
            pieces.append(self._views(batch, max(start, begin) - begin, min(stop, end) - begin))
        if len(pieces) == 1:
            return pieces[0]
        return Rows(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))

    def part(self, start: int, stop: int) -> "Part":
        """Rows start to stop as a split of their own, not copied; ValueError unless 0 <= start < stop <= rows."""
        return Part(self, start, stop)

    def _views(self, batch: int, start: int, stop: int) -> Rows:
        """Rows start to stop of one record batch, without a copy."""

        def matrix(dtype: type, first_word: int, width: int) -> np.ndarray:
            count, offset = (stop - start) * width, (first_word + start * width) * WORD
            values: np.ndarray = np.frombuffer(self._buffer, dtype, count, offset)
            return values.reshape(-1, width)

        label_at = self._label_at[batch]
        return Rows(matrix(np.float32, self._dense_at[batch], self.num_dense),
                    matrix(np.int32, self._sparse_at[batch], NUM_SPARSE),
                    self._bytes[label_at + start:label_at + stop])


class Part:
    """Consecutive rows of a split, numbered from 0, with the interface of `Split`."""

    def __init__(self, split: Split, start: int, stop: int) -> None:
        if not 0 <= start < stop <= split.rows:
            raise ValueError(f"rows {start} to {stop} are no part of {split.path} of {split.rows:,} rows")
        self._split, self._start = split, start
        self.path, self.rows, self.num_dense = split.path, stop - start, split.num_dense

    def __len__(self) -> int:
        return self.rows

    def gather(self, indices: np.ndarray) -> Rows:
        """As `Split.gather`."""
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.rows):
            raise IndexError(f"rows {indices.min()} to {indices.max()} are not within a part of {self.rows:,} rows")
        return self._split.gather(indices + self._start)

    def slice(self, start: int, stop: int) -> Rows:
        """As `Split.slice`."""
        start, stop, _ = slice(start, stop).indices(self.rows)
        return self._split.slice(start + self._start, max(start, stop) + self._start)


def open_split(directory: Path | str, name: str) -> Split:
    """The split `name` ("train", "valid" or "gold") of a prepared directory; UserError as `Split`."""
    return Split(Path(directory) / f"{name}.arrow")


def open_verified(directory: Path | str, name: str, artifacts: "Artifacts") -> Split:
    """`open_split`, its bytes compared with the checksum in `artifacts`, its rows with what they say.

    The cost is one read of the file, 0.7 to 2 GB/s; what took longer than a second is told on stderr.

    Raises UserError as `Split`, and where the file is another one than was written.
    """
    split, expected, started = open_split(directory, name), artifacts.outputs[name], time.monotonic()
    check_sha256(split.path, expected["sha256"], f"its artifacts.json says {expected['sha256']}: it was changed or "
                 "damaged after it was written; prepare the rows again")
    if (seconds := time.monotonic() - started) > SHOWN_SECONDS:
        size = split.path.stat().st_size
        click.echo(f"{split.path}: checksum of {size / 1e9:.1f} GB verified in {seconds:.1f} s", err=True)
    if (split.rows, split.num_dense) != (artifacts.counts[name], artifacts.num_dense):
        raise UserError(f"{split.path} holds {split.rows:,} rows of {split.num_dense} numeric features, its "
                        f"artifacts.json says {artifacts.counts[name]:,} of {artifacts.num_dense}: prepare again")
    return split


def _check_schema(schema: pa.Schema, path: Path) -> int:
    """num_dense, if the columns are label uint8, dense float32 [num_dense] and sparse int32 [26]; else UserError."""

    def width(name: str, of: pa.DataType) -> int:
        kind = schema.field(name).type
        return kind.list_size if pa.types.is_fixed_size_list(kind) and kind.value_type == of else 0

    if schema.names == ["label", "dense", "sparse"] and schema.field("label").type == pa.uint8():
        num_dense = width("dense", pa.float32())
        if num_dense and width("sparse", pa.int32()) == NUM_SPARSE:
            return num_dense
    columns = ", ".join(f"{field.name} {field.type}" for field in schema)
    raise UserError(f"{path} has the columns ({columns}); label uint8, dense float32 lists and sparse int32 lists of "
                    f"{NUM_SPARSE} are needed, as `ctr-data prepare` writes them")
