"""Protocol baseline-v1: how a raw Criteo value becomes a feature, and which split a line belongs to.

The baseline study's rules, to be reproduced bit for bit: FNV-1a ids (Fowler, Noll, Vo; 32 bit), log1p of the
numbers, and a split drawn from the line's index by one step of a linear congruential generator.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

PROTOCOL, PROTOCOL_VERSION = "baseline-v1", 1
NUM_DENSE, NUM_SPARSE = 13, 26
DENSE_NAMES = tuple(f"I{i}" for i in range(1, NUM_DENSE + 1))
SPARSE_NAMES = tuple(f"C{i}" for i in range(1, NUM_SPARSE + 1))
HASH_BINS, VALID_RATIO, GOLD_ROWS = 2_000_000, 0.05, 500_000
TRANSFORM = "log1p(max(x, 0)), missing -> 0"
SPLIT_RULE = "line i (from 0) is validation iff ((1103515245 * (i + 42) + 12345) mod 2^31) / 2^31 < valid_ratio"
TAIL_RULE = "line i (from 0) of n is validation iff i >= n - floor(valid_ratio * n)"

_OFFSET, _PRIME, _FIELD_SALT = 2166136261, np.uint32(16777619), 42


def fnv_basis(field: int) -> int:
    """The hash of an empty string in field j (from 0): offset basis XOR (42 + j)."""
    return _OFFSET ^ (_FIELD_SALT + field)


def fnv_step(state: np.ndarray, character: np.ndarray) -> np.ndarray:
    """One character more: uint32 states and characters of one shape -> uint32 states (FNV-1a)."""
    return (state ^ character) * _PRIME


def hash_strings(field: int, strings: pa.Array | Sequence[str], hash_bins: int) -> np.ndarray:
    """Ids int32 [n] in [0, hash_bins) of the strings of field `field` (from 0); a missing or empty one is 0.

    >>> hash_strings(0, ["", "68fd1e64"], 2_000_000).tolist()
    [0, 1945411]
    """
    if isinstance(strings, pa.Array):
        strings = ["" if s is None else s for s in strings.to_pylist()]
    lengths = np.fromiter((len(s) for s in strings), dtype=np.int64, count=len(strings))
    width = int(lengths.max(initial=0))
    state = np.full(len(strings), fnv_basis(field), dtype=np.uint32)
    if width:
        characters = np.array(strings, dtype=f"U{width}").view(np.uint32).reshape(-1, width)
        for i in range(width):
            state = np.where(i < lengths, fnv_step(state, characters[:, i]), state)
    return ids_of(state, lengths == 0, hash_bins)


def ids_of(state: np.ndarray, missing: np.ndarray, hash_bins: int) -> np.ndarray:
    """FNV-1a states uint32 -> ids int32; 0 where missing."""
    bins = np.uint32(hash_bins)
    ids = state - state // bins * bins  # the remainder: numpy has vector code for a division by one number, not for %
    ids[missing] = 0
    return ids.view(np.int32)


_SMALL = 1 << 16  # values below are looked up; most numbers of Criteo are counts far smaller
LOG1P = np.log1p(np.arange(_SMALL, dtype=np.float64)).astype(np.float32)


def transform_dense(values: np.ndarray) -> np.ndarray:
    """log1p(max(x, 0)) as float32 of numbers of any shape; missing ones are NaN, or 0 in integer arrays, and become 0.

    >>> transform_dense(np.array([np.nan, -2.0, 0.0, np.e - 1])).round(6).tolist()
    [0.0, 0.0, 0.0, 1.0]
    """
    if np.issubdtype(values.dtype, np.integer):
        positive = np.maximum(values, 0)
        if positive.max(initial=0) < _SMALL:
            return LOG1P[positive]
        return np.where(positive < _SMALL, LOG1P[np.minimum(positive, _SMALL - 1)],
                        np.log1p(positive.astype(np.float64)).astype(np.float32))
    positive = np.maximum(np.nan_to_num(values.astype(np.float64), nan=0.0), 0.0)
    return np.log1p(positive).astype(np.float32)


def is_validation(line_index: np.ndarray, valid_ratio: float = VALID_RATIO) -> np.ndarray:
    """Whether lines (index from 0 over all lines of all files, int64) are validation lines; bool of that shape.

    >>> is_validation(np.arange(100)).nonzero()[0].tolist()[:3]
    [32, 67, 69]
    """
    draw = (1103515245 * (line_index.astype(np.int64) + 42) + 12345) & ((1 << 31) - 1)
    return draw / float(1 << 31) < valid_ratio


def is_tail(line_index: np.ndarray, lines: int, valid_ratio: float) -> np.ndarray:
    """Whether lines (index from 0 over all `lines` lines of all files) belong to the last share; bool of that shape.

    >>> is_tail(np.arange(5), 5, 0.4).tolist()
    [False, False, False, True, True]
    """
    return line_index >= lines - int(valid_ratio * lines)
