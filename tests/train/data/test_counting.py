"""Counts of ids and values: exact where they can be, close where they are estimated, in bounded memory."""

import numpy as np
import pytest

from ctr_train.data import counting
from ctr_train.data.counting import FieldCounts
from ctr_train.data.parse import Block
from ctr_train.data.protocol import NUM_DENSE, NUM_SPARSE

ROWS = 50_000


def block(values: np.ndarray, hash_bins: int) -> Block:
    """Rows whose only content is the hashes uint32 [n, 26]."""
    dense = np.zeros((len(values), NUM_DENSE), dtype=np.float32)
    ids = (values % hash_bins).astype(np.int32)
    return Block(None, dense, dense > 0, ids, values, np.zeros(values.shape, np.bool_))


@pytest.mark.parametrize("hash_bins", [1000, 1 << 20, (1 << 24) + 1, 2**31 - 1])
def test_counts_are_exact_or_within_the_error_of_linear_counting(hash_bins):
    values = np.random.default_rng(0).integers(0, 2**32, (ROWS, NUM_SPARSE), dtype=np.uint32)
    values[:, 0] %= 7
    counts = FieldCounts(hash_bins)
    for part in np.array_split(values, 3):
        counts.add(block(part, hash_bins))
    for field, found in enumerate(list(counts.describe().values())[NUM_DENSE:]):
        distinct = len(np.unique(values[:, field]))
        ids = len(np.unique(values[:, field] % np.uint32(hash_bins)))
        # Standard error of n values in m cells: about n / sqrt(2 m), here 17 of 50,000; allowed are five.
        assert found["distinct_values"] == pytest.approx(distinct, abs=5 * ROWS / np.sqrt(2 << 22))
        if hash_bins <= 1 << 24:
            assert found["distinct_ids"] == ids
        assert found["distinct_ids"] == pytest.approx(ids, abs=5 * ROWS / np.sqrt(2 << 24))
        assert found["collisions"] == found["distinct_values"] - found["distinct_ids"] >= 0


def test_memory_does_not_grow_with_the_bins():
    assert FieldCounts(2**31 - 1)._ids.nbytes == NUM_SPARSE << 24


def test_a_full_map_gives_a_finite_number(monkeypatch):
    monkeypatch.setattr(counting, "_MAP_BITS", 4)
    counts = FieldCounts(10)
    counts.add(block(np.random.default_rng(0).integers(0, 2**32, (ROWS, NUM_SPARSE), dtype=np.uint32), 10))
    assert 10 <= counts.describe()["C1"]["distinct_values"] < 1000
