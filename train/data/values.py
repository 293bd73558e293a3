"""What the values of the training rows did before: counts and clicks for each id, for rare values and history features.

History features are the ordered statistics of CatBoost (Prokhorenkova et al. 2018, section 3.2) with the order of the
file: a training row sees the rows before it, never its own label nor a later one; every other row sees all training
rows. Without that order a value seen once would carry its own label into its feature.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..files import sha256
from .protocol import NUM_SPARSE, hash_strings

FILE = "values.arrow"
STATISTICS = 2  # features of each field: click rate and frequency
SMOOTHING = 10.0  # rows of the mean click rate that a value begins with
MAX_BINS = 1 << 24  # of each field: 8 bytes of memory each
_RARE = "rare"  # no hexadecimal string, so that no value is called so
_SCHEMA = pa.schema([("field", pa.uint8()), ("id", pa.int32()), ("count", pa.uint32()), ("clicks", pa.uint32())])


class ValueCounts:
    """Rows and clicks of each id of each field, in 8 bytes an id: min(hash_bins, 16 M) * 26 * 8, whatever the rows.

    Args:
        hash_bins: ids of a field, at most MAX_BINS.

    Attributes:
        counts, clicks: uint32 [26 * hash_bins], those of id i of field j at j * hash_bins + i.
        rows, clicked: all rows counted, and their clicks.
    """

    def __init__(self, hash_bins: int) -> None:
        if hash_bins > MAX_BINS:
            raise UserError(f"hash_bins={hash_bins}: counts of values (min_count, history) need 8 bytes for each id of "
                            f"each field; at most {MAX_BINS:,} are supported")
        self.hash_bins = hash_bins
        self.counts = np.zeros(NUM_SPARSE * hash_bins, dtype=np.uint32)  # memory that no id touches is never taken
        self.clicks = np.zeros(NUM_SPARSE * hash_bins, dtype=np.uint32)
        self.rows = self.clicked = 0
        self._first = np.arange(NUM_SPARSE, dtype=np.int64) * hash_bins

    def add(self, sparse: np.ndarray, label: np.ndarray) -> None:
        """Count rows: ids int32 [n, 26], label uint8 [n]."""
        places = self._places(sparse)
        np.add.at(self.counts, places, np.uint32(1))
        np.add.at(self.clicks, places[label == 1], np.uint32(1))
        self.rows += len(label)
        self.clicked += int(label.sum())

    def ordered(self, sparse: np.ndarray, label: np.ndarray) -> np.ndarray:
        """History float32 [n, 52] of rows that follow those counted: each from the rows before it; then counts them."""
        places = self._places(sparse)
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
        found = _features(self.counts[places] + counts.reshape(places.shape),
                          self.clicks[places] + clicks.reshape(places.shape), rows_before, clicked_before)
        self.add(sparse, label)
        return found

    def frozen(self, sparse: np.ndarray) -> np.ndarray:
        """History float32 [n, 52] of other rows, ids int32 [n, 26]: from all rows counted."""
        places = self._places(sparse)
        rows, clicked = np.array([self.rows]), np.array([self.clicked])
        return _features(self.counts[places], self.clicks[places], rows, clicked)

    def without_rare(self, sparse: np.ndarray, min_count: int) -> np.ndarray:
        """The ids int32 [n, 26], those counted fewer than `min_count` times replaced by their field's `rare_ids`.

        Id 0, the missing value, stays.
        """
        rare = (self.counts[self._places(sparse)] < min_count) & (sparse != 0)
        return np.where(rare, rare_ids(self.hash_bins), sparse)

    def save(self, directory: Path | str) -> dict[str, Any]:
        """Write values.arrow: the ids that occur, compressed. Returns its entry of `Artifacts.values`."""
        path = Path(directory) / FILE
        places = np.flatnonzero(self.counts)
        columns = [(places // self.hash_bins).astype(np.uint8), (places % self.hash_bins).astype(np.int32),
                   self.counts[places], self.clicks[places]]
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA, options=options) as writer:
            writer.write_table(pa.table([pa.array(column) for column in columns], schema=_SCHEMA))
        return {"file": FILE, "ids": len(places), "rows": self.rows, "clicks": self.clicked,
                "bytes": path.stat().st_size, "sha256": sha256(path)}

    @classmethod
    def load(cls, directory: Path | str, entry: dict[str, Any], hash_bins: int) -> "ValueCounts":
        """Read values.arrow; UserError where it is missing, or is not the one that `entry` describes."""
        path = Path(directory) / FILE
        if not path.exists():
            raise UserError(f"{path} does not exist: features of rare values or history need it")
        if (checksum := sha256(path)) != entry["sha256"]:
            raise UserError(f"{path} has the SHA-256 {checksum}, {entry['sha256']} is expected: it was changed or "
                            "belongs to other data")
        found = cls(hash_bins)
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        field, ids, counts, clicks = (column.to_numpy() for column in table.columns)
        places = field.astype(np.int64) * hash_bins + ids
        found.counts[places], found.clicks[places] = counts, clicks
        found.rows, found.clicked = entry["rows"], entry["clicks"]
        return found

    def _places(self, sparse: np.ndarray) -> np.ndarray:
        return sparse + self._first


def rare_ids(hash_bins: int) -> np.ndarray:
    """Each field's id for rare values, int32 [26]: that of a string no value can have.

    >>> rare_ids(2_000_000)[:2].tolist()
    [1200959, 1759654]
    """
    return np.concatenate([hash_strings(field, [_RARE], hash_bins) for field in range(NUM_SPARSE)])


def _features(counts: np.ndarray, clicks: np.ndarray, rows: np.ndarray, clicked: np.ndarray) -> np.ndarray:
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
