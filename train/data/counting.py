"""What is counted while preparing: missing values, distinct ids and distinct values of every field."""

import threading
from typing import Any

import numpy as np

from .parse import Block
from .protocol import DENSE_NAMES, NUM_DENSE, NUM_SPARSE, SPARSE_NAMES

_MAP_BITS = 22  # of the linear counting maps of values: 4 MB a field
_MAX_IDS = 1 << 24  # cells of a map of ids: up to so many bins, ids are counted exactly
_MIX = np.uint32(2654435769)  # Fibonacci hashing: its high bits depend on all bits of the value


class FieldCounts:
    """Counts over blocks, in memory that does not grow: min(hash_bins, 16 M) + 4 M bytes for each categorical field.

    Distinct ids are exact up to 16 M hash bins. Distinct values, and ids of more bins, are estimated by linear
    counting (Whang et al. 1990): n values thrown into m cells leave about m exp(-n / m) empty, so n = -m ln(empty
    share); near exact for thousands, within 1% for millions. Collisions are values that share their id with another
    of the field: distinct values - distinct ids.
    """

    def __init__(self, hash_bins: int) -> None:
        self.rows = 0
        self._lock = threading.Lock()
        self._missing = np.zeros(NUM_DENSE + NUM_SPARSE, dtype=np.int64)
        self._exact = hash_bins <= _MAX_IDS
        # Filled, because numpy then takes huge pages: faulting in small ones one by one costs more than all counting.
        self._ids = np.full((NUM_SPARSE, min(hash_bins, _MAX_IDS)), False)
        self._values = np.full((NUM_SPARSE, 1 << _MAP_BITS), False)

    def add(self, block: Block) -> None:
        """Count a block's rows; from several threads at once, since a map's cells only ever become true."""
        missing = np.concatenate([block.dense_missing.sum(axis=0), block.sparse_missing.sum(axis=0)])
        with self._lock:
            self.rows += len(block.sparse)
            self._missing += missing
        ids = block.sparse if self._exact else _mix(block.sparse.view(np.uint32)) % np.uint32(_MAX_IDS)
        ids = ids.T.astype(np.intp)  # contiguous by field: its map then stays in the cache
        cells = ((block.values * _MIX) >> np.uint32(32 - _MAP_BITS)).T.astype(np.intp)
        for field in range(NUM_SPARSE):
            self._ids[field][ids[field]] = True
            self._values[field][cells[field]] = True

    def describe(self) -> dict[str, dict[str, Any]]:
        """The entry `Artifacts.fields`."""
        missing = self._missing / max(self.rows, 1)
        found: dict[str, dict[str, Any]] = {name: {"missing": float(missing[i])} for i, name in enumerate(DENSE_NAMES)}
        for field, name in enumerate(SPARSE_NAMES):
            ids = int(np.count_nonzero(self._ids[field])) if self._exact else _linear_count(self._ids[field])
            values = max(_linear_count(self._values[field]), ids)
            found[name] = {"missing": float(missing[NUM_DENSE + field]), "distinct_ids": ids,
                           "distinct_values": values, "collisions": values - ids}
        return found


def _mix(values: np.ndarray) -> np.ndarray:
    """uint32 -> uint32, one to one, as if at random (the finaliser of MurmurHash3, Appleby): no pattern is left."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        values = (values ^ (values >> np.uint32(shift))) * np.uint32(factor)
    return values ^ (values >> np.uint32(16))


def _linear_count(cells: np.ndarray) -> int:
    """About how many distinct values were thrown into the cells, bool [m], of which those hit are true."""
    empty = max(len(cells) - int(np.count_nonzero(cells)), 1)
    return round(len(cells) * float(np.log(len(cells) / empty)))
