"""Scoring raw rows as they stream by: the same batches, and so the same logits, whatever the reader's pieces."""

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ctr_models import CTRModel

from .data.raw import RawFeatures
from .errors import UserError
from .evaluate import Progress, batch_logits, scoring
from .files import atomic_path, check_directory
from .metrics import evaluate_logits

GROUP_ROWS = 1 << 18  # of the Parquet file; a row group a batch would be slow to read
COLUMNS = (("line", pa.int64()), ("probability", pa.float32()), ("logit", pa.float32()), ("label", pa.uint8()))


def rebatch(pieces: Iterable[RawFeatures], batch_size: int) -> Iterator[RawFeatures]:
    """The same rows in the same order, `batch_size` at a time; the last batch may be shorter.

    A row's logit depends in its last bits on the batch around it (matrix products sum in another order), so that
    raw rows must be cut as prepared ones are for both to score the same.
    """
    held: list[RawFeatures] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece.line_index)
        if count < batch_size:
            continue
        joined = _join(held)
        whole = count - count % batch_size
        for start in range(0, whole, batch_size):
            yield _cut(joined, start, start + batch_size)
        held, count = [_cut(joined, whole, count)], count - whole
    if count:
        yield _join(held)


def _join(pieces: list[RawFeatures]) -> RawFeatures:
    if len(pieces) == 1:
        return pieces[0]
    label = None if pieces[0].label is None else np.concatenate([piece.label for piece in pieces])
    return RawFeatures(dense=np.concatenate([piece.dense for piece in pieces]),
                       sparse=np.concatenate([piece.sparse for piece in pieces]), label=label,
                       line_index=np.concatenate([piece.line_index for piece in pieces]))


def _cut(rows: RawFeatures, start: int, stop: int) -> RawFeatures:
    return RawFeatures(dense=rows.dense[start:stop], sparse=rows.sparse[start:stop],
                       label=None if rows.label is None else rows.label[start:stop],
                       line_index=rows.line_index[start:stop])


class _Writer:
    """A Parquet file of predictions, written in row groups of at least `GROUP_ROWS` rows."""

    def __init__(self, path: Path, labelled: bool) -> None:
        self._schema = pa.schema(COLUMNS if labelled else COLUMNS[:-1])
        self._file = pq.ParquetWriter(path, self._schema)
        self._held: list[pa.RecordBatch] = []

    def write(self, batch: RawFeatures, logits: np.ndarray) -> None:
        probability = torch.from_numpy(logits).double().sigmoid().float().numpy()
        columns = [batch.line_index, probability, logits, batch.label]
        self._held.append(pa.record_batch(columns[:len(self._schema)], schema=self._schema))
        if sum(held.num_rows for held in self._held) >= GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        if self._held:
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        self._file.write_table(pa.Table.from_batches(self._held))
        self._held = []


def check_predictions(path: Path, raw: Path) -> None:
    """UserError where a file of predictions would take the place of the rows that are read, or of anything else."""
    check_directory(path.parent)
    if path.exists() and raw.exists() and path.samefile(raw):
        raise UserError(f"{path} is {raw}, which is read: choose another file for the predictions")
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        with open(path, "rb") as file:
            names = pq.read_schema(file).names
    except (pa.ArrowException, OSError):
        names = []
    if names not in ([name for name, _ in COLUMNS], [name for name, _ in COLUMNS[:-1]]):
        raise UserError(f"{path} exists and holds something else than predictions: choose another file")


@contextmanager
def _writer(path: Path | None, labelled: bool) -> Iterator[_Writer | None]:
    """A file that appears under its name once it is complete (UserError if that fails); None without a path."""
    if path is None:
        yield None
        return
    with atomic_path(path) as temporary, closing(_Writer(temporary, labelled)) as writer:
        yield writer


def score(
    model: CTRModel,
    pieces: Iterable[RawFeatures],
    *,
    labelled: bool,
    batch_size: int,
    device: torch.device | str,
    precision: str,
    predictions: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score rows as they come; memory grows by 5 bytes a labelled row and not at all with unlabelled ones.

    Args:
        model: on `device`; its training mode is left as it was.
        pieces: of `data.raw.read_features`.
        labelled: whether the pieces have labels.
        predictions: a Parquet file to write: line int64 (counted from 0), probability float32, logit float32, and
            label uint8 if labelled. An earlier file of that name stays until the new one is complete.
        progress: called with the number of rows of each batch once it is scored.

    Returns: the metrics of `metrics.evaluate_logits` if labelled, else {"rows"}.

    Raises UserError for what `pieces` raises, for no rows, for a NaN or infinite logit and for a file that cannot be
    written.
    """
    rows = 0
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    with _writer(predictions, labelled) as writer, scoring(model, device, precision):
        for batch in rebatch(pieces, batch_size):
            logits = batch_logits(model, batch.dense, batch.sparse, device).cpu().numpy()
            _check_finite(logits, batch.line_index)
            rows += len(logits)
            if labelled:
                assert batch.label is not None
                kept.append((logits, batch.label))
            if writer is not None:
                writer.write(batch, logits)
            if progress is not None:
                progress(len(logits))
        if not rows:
            raise UserError("there are no rows to score")
    if not labelled:
        return {"rows": rows}
    return evaluate_logits(*(np.concatenate(arrays) for arrays in zip(*kept, strict=True)))


def _check_finite(logits: np.ndarray, line_index: np.ndarray) -> None:
    wrong = np.flatnonzero(~np.isfinite(logits))
    if len(wrong):
        raise UserError(f"the logit of line {line_index[wrong[0]] + 1:,} is {logits[wrong[0]]}: "
                        "the checkpoint's weights are unusable")
