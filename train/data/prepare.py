"""`ctr-data prepare`: raw files to train, valid and gold as memory-mappable Arrow files, streaming."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..files import made_directory, read_json, sha256
from ..locks import claim, lock, release, remove, short_name, sweep, temporary_name
from .artifacts import FILE, Artifacts
from .base import Base
from .counting import FieldCounts
from .edges import NumericEdges
from .folds import FoldCounts
from .history import ValueFeatures
from .passes import Inputs, Rule, count_folds, count_values, split_rule
from .protocol import GOLD_ROWS, HASH_BINS, NUM_SPARSE, SPLIT_RULE, TAIL_RULE, VALID_RATIO
from .raw import Progress, Source, dense_features, read_blocks
from .values import FILE as VALUES_FILE
from .values import ValueCounts

SPLITS = ("train", "valid", "gold")
BATCH_ROWS = 65_536  # rows of a record batch
MAX_HASH_BINS = 2**31 - 1  # ids are int32
MAX_FOLDS = 100


class SplitWriter:
    """One split's Arrow IPC file, uncompressed, in record batches of 65,536 rows; hashed as it is written."""

    def __init__(self, path: Path, num_dense: int) -> None:
        self.path, self.rows, self.clicks = path, 0, 0
        self._schema = pa.schema([("label", pa.uint8()), ("dense", pa.list_(pa.float32(), num_dense)),
                                  ("sparse", pa.list_(pa.int32(), NUM_SPARSE))])
        self._held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._held_rows = 0
        self._file = open(path, "wb")  # noqa: SIM115 - closed by finish() or abandon()
        self._digest = hashlib.sha256()
        self._arrow = pa.ipc.new_file(pa.PythonFile(self, "w"), self._schema)

    def add(self, label: np.ndarray, dense: np.ndarray, sparse: np.ndarray) -> None:
        """Rows to append."""
        self.rows += len(label)
        self.clicks += int(label.sum())
        self._held.append((label, dense, sparse))
        self._held_rows += len(label)
        if self._held_rows >= BATCH_ROWS:
            columns = [np.concatenate(parts) for parts in zip(*self._held, strict=True)]
            whole = self._held_rows - self._held_rows % BATCH_ROWS
            for start in range(0, whole, BATCH_ROWS):
                self._write_batch([column[start:start + BATCH_ROWS] for column in columns])
            self._held = [tuple(column[whole:].copy() for column in columns)]
            self._held_rows -= whole

    def finish(self) -> dict[str, Any]:
        """Write what is held, sync, and return the entry of `Artifacts.outputs`."""
        if self._held_rows:
            self._write_batch([np.concatenate(parts) for parts in zip(*self._held, strict=True)])
        self._arrow.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return {"file": self.path.name, "rows": self.rows, "bytes": size, "sha256": self._digest.hexdigest()}

    def abandon(self) -> None:
        """Close without finishing."""
        self._file.close()

    def _write_batch(self, columns: list[np.ndarray]) -> None:
        label, *matrices = columns
        arrays = [pa.array(label)] + [pa.FixedSizeListArray.from_arrays(pa.array(m.ravel()), m.shape[1])
                                      for m in matrices]
        self._arrow.write_batch(pa.record_batch(arrays, schema=self._schema))

    # What pa.PythonFile asks of a file.
    closed = False

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        """Arrow closes its view of the file; `finish` syncs and closes the file itself."""


def prepare(
    inputs: Sequence[Path | str],
    out: Path | str,
    *,
    hash_bins: int = HASH_BINS,
    valid_ratio: float = VALID_RATIO,
    gold_rows: int = GOLD_ROWS,
    missing_indicator: bool = False,
    split: str = "hash",
    min_count: int = 1,
    history: bool = False,
    folds: int = 0,
    recipe: str = "",
    base: Base | None = None,
    on_bad_line: str = "error",
    progress: Progress | None = None,
) -> Artifacts:
    """Raw labelled files, in order, -> train.arrow, valid.arrow, gold.arrow and artifacts.json under `out`.

    The files appear together once all of them are complete; until then an earlier content of `out` stays. valid holds
    every validation line, gold the first `gold_rows` of them. Where inputs come with true probabilities
    (FILE.truth.npy, from `ctr-data synth`), the best possible metrics are computed too.

    Args:
        hash_bins: ids of a field, 1 to 2^31 - 1.
        valid_ratio: share of the lines that are validation, in [0, 1).
        missing_indicator: 13 more dense columns, 1 where the number is missing.
        split: "hash", the protocol's rule, or "tail": validation lines are the last ones. "tail" reads the input once
            more.
        min_count: values of fewer training rows get their field's rare id; 1 keeps all. More than 1, and history, read
            the input once more and keep values.arrow, which other rows need for the same features.
        history: 52 more dense columns, click rate and frequency of each field's value (`values.ValueCounts`).
        folds: the history of a training row comes from all training rows outside its fold, of so many, 2 to 100
            (`folds.FoldCounts`; the input is read once more); 0: from the rows before it.
        recipe: name of the recipe that the data are prepared for.
        base: what a run was trained on; its settings are taken in place of those above, and its counts of values go on.
        on_bad_line: "error", or "skip": left out and counted; skipped lines still count for the split.
        progress: called with (lines, bytes of the input files) as they are read, on each of `passes.passes` passes.

    Raises UserError for unusable input, settings or `out`.
    """
    settings = Artifacts(hash_bins=hash_bins, valid_ratio=valid_ratio, gold_rows=gold_rows,
                         missing_indicator=missing_indicator, split=split, min_count=min_count, history=history,
                         folds=folds if history else 0, recipe=recipe,
                         split_rule=TAIL_RULE if split == "tail" else SPLIT_RULE)
    if base is not None:
        settings = base.applied_to(settings)
    _check_settings(settings)
    files = Inputs(inputs, settings)
    place = Path(out).resolve()  # "." and links have no name of their own to rename
    try:
        check_out(place)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    with made_directory(place.parent, out), lock(lock_file(place), str(out)):
        check_out(place)
        work, claimed = temporary_name(place), None
        try:
            _recover(place)
            sweep(place)
            claimed = claim(work, directory=True)
            _prepare(files, settings, work, base, on_bad_line, progress)
            _put_in_place(work, place)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}") from error
        finally:
            remove(work)
            release(claimed)
    return settings


def _prepare(files: Inputs, settings: Artifacts, work: Path, base: Base | None, on_bad_line: str,
             progress: Progress | None) -> None:
    """Fill the directory `work`, and `settings` with what was found."""
    rule = split_rule(files, settings, progress)
    before = base.counts if base is not None else None
    counts = count_values(files, settings, rule, on_bad_line, before, progress)
    past: FoldCounts | ValueCounts | None = None
    if settings.history and counts is not None:
        if settings.folds:
            past = count_folds(files, settings, rule, on_bad_line, counts, progress)
        else:
            past = ValueCounts(settings.hash_bins) if before is None else before.copy()
    with files.read() as sources:
        _write_splits(sources, settings, work, on_bad_line, rule, ValueFeatures(settings, counts, past), progress)
    if base is not None:  # the model has these in its weights' place: a feature must go on meaning the same
        settings.numeric_edges = base.artifacts.numeric_edges
        settings.history_moments = base.artifacts.history_moments
    if counts is not None:
        settings.values = counts.save(work)
    settings.save(work)


def _check_settings(settings: Artifacts) -> None:
    if not 1 <= settings.hash_bins <= MAX_HASH_BINS:
        raise UserError(f"hash_bins={settings.hash_bins} is outside 1 to {MAX_HASH_BINS}")
    if not 0.0 <= settings.valid_ratio < 1.0:
        raise UserError(f"valid_ratio={settings.valid_ratio} is outside [0, 1)")
    if settings.gold_rows < 1:
        raise UserError(f"gold_rows={settings.gold_rows}: at least 1 is needed")
    if settings.min_count < 1:
        raise UserError(f"min_count={settings.min_count}: at least 1 is needed")
    if settings.folds and not 2 <= settings.folds <= MAX_FOLDS:
        raise UserError(f"folds={settings.folds}: 2 to {MAX_FOLDS}, or 0 for a history in the order of the file")
    if settings.split not in ("hash", "tail"):
        raise UserError(f"split={settings.split!r}: choose hash or tail")


def lock_file(out: Path) -> Path:
    """The file that is locked while rows are prepared for `out`, beside it."""
    place = out.resolve()
    return place.with_name(f".{short_name(place)}.lock")


def check_out(out: Path) -> None:
    """UserError unless prepared data can be put at `out`: it is absent, empty, or holds prepared data."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a directory")
    if os.path.ismount(out):
        raise UserError(f"{out} is where a file system is mounted, and cannot be replaced: choose a directory in it")
    if out.exists() and (content := {path.name for path in out.iterdir()}):
        # A run directory has an artifacts.json too, and whatever lies here would go with the older data.
        foreign = sorted(content - {FILE, VALUES_FILE, *(f"{name}.arrow" for name in SPLITS)})
        if foreign or FILE not in content:
            raise UserError(f"{out} holds something else than prepared data ({(foreign or sorted(content))[0]}); "
                            "choose another directory")


def _put_in_place(work: Path, out: Path) -> None:
    """Rename the finished directory to its name; an earlier one goes last, and comes back if anything prevents that."""
    if not out.exists():
        os.replace(work, out)
        return
    old = _old(out)
    try:
        os.replace(out, old)
        os.replace(work, out)
    finally:
        if not out.exists():
            os.replace(old, out)
        else:
            remove(old)


def _recover(out: Path) -> None:
    """What a process that was killed within `_put_in_place` left: the earlier directory comes back, or goes."""
    if (old := _old(out)).exists():
        check_out(old)  # says so if it is somebody's own
        if out.exists():
            remove(old)
        else:
            os.replace(old, out)


def _old(out: Path) -> Path:
    """Where an earlier directory waits until the new one is in its place; whoever writes `out` holds its lock."""
    return out.with_name(f".{short_name(out)}.old")


def _write_splits(sources: list[Source], settings: Artifacts, directory: Path, on_bad_line: str, rule: Rule,
                  features: ValueFeatures, progress: Progress | None) -> None:
    """Fill the directory with the splits and `settings` with what was found."""
    writers: dict[str, SplitWriter] = {}
    counts, edges = FieldCounts(settings.hash_bins), NumericEdges(settings.num_numeric)
    validation: list[tuple[np.ndarray, np.ndarray]] = []  # (line_index, label)
    try:
        for name in SPLITS:
            writers[name] = SplitWriter(directory / f"{name}.arrow", settings.num_dense)
        for block in read_blocks(sources, labelled=True, hash_bins=settings.hash_bins, on_bad_line=on_bad_line,
                                 seen=counts.add, progress=progress):
            rows, in_valid = block.rows, rule(block.line_index)
            train, valid = np.flatnonzero(~in_valid), np.flatnonzero(in_valid)
            settings.skipped_lines += block.skipped
            settings.first_skipped = settings.first_skipped or block.first_skipped
            assert rows.label is not None  # labelled=True
            columns = (rows.label, dense_features(rows, settings.missing_indicator), rows.sparse)
            label, dense, sparse = (column.take(train, axis=0) for column in columns)
            edges.add(dense)
            writers["train"].add(label, *features.of_training(label, dense, sparse, block.line_index[train]))
            label, dense, sparse = (column.take(valid, axis=0) for column in columns)
            held_out = (label, *features.of_others(dense, sparse))
            gold = settings.gold_rows - writers["gold"].rows
            writers["valid"].add(*held_out)
            writers["gold"].add(*(column[:gold] for column in held_out))
            validation.append((block.line_index[valid], rows.label[valid]))
        settings.outputs = {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    _check_rows(writers, settings, sources)
    settings.sources = [source.describe() for source in sources]
    settings.counts = {name: writer.rows for name, writer in writers.items()}
    settings.label_rate = {name: w.clicks / w.rows if w.rows else None for name, w in writers.items()}
    settings.fields, settings.numeric_edges = counts.describe(), edges.edges()
    settings.history_moments = features.moments()
    settings.best_possible = _best_possible(sources, settings, validation)


def _check_rows(writers: dict[str, SplitWriter], settings: Artifacts, sources: list[Source]) -> None:
    """UserError where a split that was asked for got no rows."""
    wanted = SPLITS if settings.valid_ratio > 0 else SPLITS[:1]
    for name in wanted:
        if not writers[name].rows:
            lines = sum(source.lines for source in sources)
            raise UserError(f"no row for {name}.arrow among the {lines:,} lines ({settings.skipped_lines:,} bad ones "
                            f"skipped) of {', '.join(str(source.path) for source in sources)}: more lines are needed")


def _best_possible(sources: list[Source], settings: Artifacts,
                   validation: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, dict[str, float]] | None:
    """Logloss and AUC of the true probabilities on valid and gold, if every source has them beside it."""
    from ..metrics import auc, logloss  # imports torch, which nothing else here needs

    files = [source.path.with_name(source.path.name + ".truth.npy") for source in sources]
    if not all(file.exists() for file in files):
        return None
    truths = [_load_truth(file) for file in files]
    for file, truth, source in zip(files, truths, sources, strict=True):
        if truth.shape != (source.lines,):
            raise UserError(f"{file} holds {truth.shape} probabilities, {source.path} {source.lines:,} lines: "
                            "they do not belong together")
        record = source.path.with_name(source.path.name + ".truth.json")
        if record.exists() and not _is_of(read_json(record), source, file):
            raise UserError(f"{record} is of another {source.path.name}: remove it and {file.name}, or make both again")
    line_index, label = (np.concatenate(parts) for parts in zip(*validation, strict=True))
    probability = np.concatenate(truths)[line_index].astype(np.float64)
    logits = np.log(probability) - np.log1p(-probability)
    found = {}
    for name, rows in (("valid", len(label)), ("gold", settings.counts["gold"])):
        if 0 < label[:rows].sum() < rows:
            found[name] = {"logloss": logloss(logits[:rows], label[:rows]), "auc": auc(logits[:rows], label[:rows])}
    return found or None


def _is_of(record: Any, source: Source, probabilities: Path) -> bool:
    """Whether the record of true probabilities is that of both files; one that does not say may be."""
    return (isinstance(record, dict) and record.get("sha256") in (None, source.describe()["sha256"])
            and record.get("probabilities_sha256") in (None, sha256(probabilities)))


def _load_truth(file: Path) -> np.ndarray:
    """Probabilities float32 [lines]; UserError where the file holds something else."""
    try:
        truth = np.load(file, mmap_mode="r")
    except Exception as error:  # a damaged file surfaces as almost any type
        raise UserError(f"{file} cannot be read as probabilities: {str(error) or type(error).__name__}") from error
    if not isinstance(truth, np.ndarray):
        raise UserError(f"{file} cannot be read as probabilities: it is an archive of arrays")
    if truth.dtype != np.float32 or not ((truth > 0.0) & (truth < 1.0)).all():
        raise UserError(f"{file} holds no probabilities: float32 between 0 and 1 are needed, found {truth.dtype}")
    return truth
