"""What the values of the training rows did: counts and clicks for each id, for rare values and history features.

History features are target statistics: click rate and frequency of each field's value. A training row must not see its
own label in them, or a value seen once would carry that label into its feature. Either they are cross-fitted
(`folds.py`), or ordered as CatBoost's (Prokhorenkova et al. 2018, section 3.2) with the order of the file: a training
row sees the rows before it. Every other row sees all training rows.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..files import check_sha256, sha256
from .protocol import NUM_SPARSE

FILE = "values.arrow"
STATISTICS = 2  # features of each field: click rate and frequency
SMOOTHING = 10.0  # rows of the mean click rate that a value begins with
MAX_BINS = 1 << 24  # of each field: 12 bytes of memory each
_SCHEMA = pa.schema([("field", pa.uint8()), ("id", pa.int32()), ("count", pa.uint32()), ("clicks", pa.uint32()),
                     ("row", pa.int32())])


class ValueCounts:
    """Rows and clicks of each id of each field, in 12 bytes an id: hash_bins * 26 * 12 at most, whatever the rows.

    Args:
        hash_bins: ids of a field, at most MAX_BINS.

    Attributes:
        counts, clicks: uint32 [26 * hash_bins], those of id i of field j at j * hash_bins + i.
        rows, clicked: all rows counted, and their clicks.
        kept: int32 [26 * hash_bins], the row of the embedding table that an id has to itself, less 25; 0: none.
        table_rows: rows of the table: one for the rare values of each field, and one for each id that is kept.
    """

    def __init__(self, hash_bins: int) -> None:
        if hash_bins > MAX_BINS:
            raise UserError(f"hash_bins={hash_bins}: counts of values (min_count, history) need 12 bytes for each id "
                            f"of each field; at most {MAX_BINS:,} are supported")
        self.hash_bins = hash_bins
        self.counts = np.zeros(NUM_SPARSE * hash_bins, dtype=np.uint32)  # memory that no id touches is never taken
        self.clicks = np.zeros(NUM_SPARSE * hash_bins, dtype=np.uint32)
        self.kept = np.zeros(NUM_SPARSE * hash_bins, dtype=np.int32)
        self.table_rows = NUM_SPARSE
        self.rows = self.clicked = 0
        self._first = np.arange(NUM_SPARSE, dtype=np.int64) * hash_bins

    def copy(self) -> "ValueCounts":
        """The same counts, to be added to on their own."""
        found, seen = ValueCounts(self.hash_bins), self.seen()
        for name in ("counts", "clicks", "kept"):
            getattr(found, name)[seen] = getattr(self, name)[seen]
        found.rows, found.clicked, found.table_rows = self.rows, self.clicked, self.table_rows
        return found

    def seen(self) -> np.ndarray:
        """Places int64 of the ids that have come. Memory that no id touches is read, but never taken."""
        return np.flatnonzero(self.counts)

    def of(self, sparse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and clicks counted so far of ids int32 [n, 26], both int64 [n, 26]."""
        places = self.places(sparse)
        return self.counts[places].astype(np.int64), self.clicks[places].astype(np.int64)

    def add(self, sparse: np.ndarray, label: np.ndarray) -> None:
        """Count rows: ids int32 [n, 26], label uint8 [n]."""
        places = self.places(sparse)
        np.add.at(self.counts, places, np.uint32(1))
        np.add.at(self.clicks, places[label == 1], np.uint32(1))
        self.rows += len(label)
        self.clicked += int(label.sum())

    def ordered(self, sparse: np.ndarray, label: np.ndarray) -> np.ndarray:
        """History float32 [n, 52] of rows that follow those counted: each from the rows before it; then counts them."""
        places = self.places(sparse)
        flat = places.ravel()
        order = np.argsort(flat, kind="stable")  # rows of a value stay in their order
        runs = flat[order]
        first = np.flatnonzero(np.diff(runs, prepend=-1))
        lengths = np.diff(first, append=len(runs))
        clicked = np.repeat(label.astype(np.int64), NUM_SPARSE)[order]
        clicks_before = np.cumsum(clicked) - clicked
        counts, clicks = np.empty((2, len(flat)), dtype=np.int64)
        counts[order] = np.arange(len(runs)) - np.repeat(first, lengths)
        clicks[order] = clicks_before - np.repeat(clicks_before[first], lengths)
        rows_before = self.rows + np.arange(len(label))
        clicked_before = self.clicked + np.cumsum(label, dtype=np.int64) - label
        found = history_features(self.counts[places] + counts.reshape(places.shape),
                                 self.clicks[places] + clicks.reshape(places.shape), rows_before, clicked_before)
        self.add(sparse, label)
        return found

    def frozen(self, sparse: np.ndarray) -> np.ndarray:
        """History float32 [n, 52] of other rows, ids int32 [n, 26]: from all rows counted."""
        return history_features(*self.of(sparse), np.array([self.rows]), np.array([self.clicked]))

    def keep(self, min_count: int) -> None:
        """Give a row of the table to each id that came at least `min_count` times; who has one keeps it."""
        seen = self.seen()
        new = seen[(self.counts[seen] >= min_count) & (self.kept[seen] == 0)]
        first = self.table_rows - NUM_SPARSE + 1
        self.kept[new] = np.arange(first, first + len(new), dtype=np.int32)
        self.table_rows += len(new)

    def table_ids(self, sparse: np.ndarray) -> np.ndarray:
        """Rows of the table int32 [n, 26] of ids int32 [n, 26]: an id's own, or j for the rare values of field j.

        No two fields share a row, and neither do two kept values (but those that share a hashed id).
        """
        kept = self.kept[self.places(sparse)]
        return np.where(kept > 0, kept + np.int32(NUM_SPARSE - 1), np.arange(NUM_SPARSE, dtype=np.int32))

    def save(self, directory: Path | str) -> dict[str, Any]:
        """Write values.arrow: the ids that occur, compressed. Returns its entry of `Artifacts.values`."""
        path = Path(directory) / FILE
        places = self.seen()
        columns = [(places // self.hash_bins).astype(np.uint8), (places % self.hash_bins).astype(np.int32),
                   self.counts[places], self.clicks[places], self.kept[places]]
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA, options=options) as writer:
            writer.write_table(pa.table([pa.array(column) for column in columns], schema=_SCHEMA))
        return {"file": FILE, "ids": len(places), "rows": self.rows, "clicks": self.clicked,
                "table_rows": self.table_rows,
                "bytes": path.stat().st_size, "sha256": sha256(path)}

    @classmethod
    def load(cls, directory: Path | str, entry: dict[str, Any], hash_bins: int) -> "ValueCounts":
        """Read values.arrow; UserError where it is missing, or is not the one that `entry` describes."""
        path = Path(directory) / FILE
        check_file(path, entry)
        found = cls(hash_bins)
        with open(path, "rb") as file:
            table = pa.ipc.open_file(file).read_all()
        if table.schema != _SCHEMA:
            raise UserError(f"{path} has the columns {', '.join(table.schema.names)}; {', '.join(_SCHEMA.names)} are "
                            "needed: it is of another version")
        field, ids, counts, clicks, kept = (column.to_numpy() for column in table.columns)
        places = field.astype(np.int64) * hash_bins + ids
        found.counts[places], found.clicks[places], found.kept[places] = counts, clicks, kept
        found.rows, found.clicked, found.table_rows = entry["rows"], entry["clicks"], entry["table_rows"]
        return found

    def places(self, sparse: np.ndarray) -> np.ndarray:
        """Where ids int32 [n, 26] are in `counts` and `clicks`, int64 [n, 26]."""
        return sparse + self._first


def check_file(path: Path, entry: dict[str, Any]) -> None:
    """UserError where values.arrow is missing, or is not the one that `entry` describes."""
    if not path.exists():
        raise UserError(f"{path} does not exist: features of rare values or history need it")
    check_sha256(path, entry["sha256"], f"{entry['sha256']} is expected: it was changed or belongs to other data")


def history_features(counts: np.ndarray, clicks: np.ndarray, rows: np.ndarray, clicked: np.ndarray) -> np.ndarray:
    """Click rates then frequencies, float32 [n, 52], of counts and clicks [n, 26] among `rows` rows, [n] or [1].

    Rate: log-odds of (clicks + a p) / (count + a), less those of p; a = SMOOTHING, p the click rate of all rows so
    far. Frequency: log10 of the share of the rows so far that hold the value. Both begin with some imaginary rows,
    so that they are finite from the first row on.
    """
    mean = ((clicked + 1.0) / (rows + 4.0))[:, None]
    rate = (clicks + SMOOTHING * mean) / (counts + SMOOTHING)
    odds = np.log(rate / (1.0 - rate)) - np.log(mean / (1.0 - mean))
    frequency = np.log10((counts + 1.0) / (rows + 100.0)[:, None])
    return np.concatenate([odds, frequency], axis=1).astype(np.float32)
