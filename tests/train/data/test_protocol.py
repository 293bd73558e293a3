"""The protocol against pinned vectors, and against an implementation that goes character by character."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctr_train.data.protocol import hash_strings, is_validation, transform_dense

VECTORS = json.loads((Path(__file__).parent / "protocol_vectors.json").read_text())


def slow_id(field: int, string: str, hash_bins: int) -> int:
    """FNV-1a as its authors write it, on Python integers."""
    if not string:
        return 0
    value = 2166136261 ^ (42 + field)
    for character in string:
        value = ((value ^ ord(character)) * 16777619) % 2**32
    return value % hash_bins


def slow_is_validation(line: int, ratio: float) -> bool:
    return ((1103515245 * (line + 42) + 12345) % 2**31) / 2**31 < ratio


def test_ids_are_those_pinned() -> None:
    for field, string, expected in VECTORS["ids"]:
        assert hash_strings(field, [string], 2_000_000).tolist() == [expected]


def test_splits_are_those_pinned() -> None:
    lines, expected = zip(*VECTORS["validation"], strict=True)
    assert is_validation(np.array(lines), 0.05).tolist() == list(expected)


@given(st.integers(0, 25), st.lists(st.text(max_size=40).filter(lambda s: not s.endswith("\0"))),
       st.integers(1, 2**31 - 1))
def test_ids_of_any_strings(field: int, strings: list[str], hash_bins: int) -> None:
    found = hash_strings(field, strings, hash_bins)
    assert found.dtype == np.int32
    assert found.tolist() == [slow_id(field, string, hash_bins) for string in strings]


def test_missing_and_long_strings() -> None:
    strings = ["", "a" * 1000, "68fd1e64"]
    expected = [slow_id(3, string, 997) for string in strings]
    assert hash_strings(3, pa.array([None, *strings[1:]]), 997).tolist() == expected
    assert hash_strings(3, [], 997).tolist() == []


@given(st.lists(st.integers(0, 10**11)), st.floats(0, 1))
def test_split_of_any_line(lines: list[int], ratio: float) -> None:
    found = is_validation(np.array(lines, dtype=np.int64), ratio)
    assert found.tolist() == [slow_is_validation(line, ratio) for line in lines]


def test_share_of_validation_lines() -> None:
    assert is_validation(np.arange(1_000_000), 0.05).mean() == pytest.approx(0.05, abs=0.001)


@given(st.lists(st.integers(-(10**18), 10**18)))
def test_transform_of_integers(values: list[int]) -> None:
    found = transform_dense(np.array(values, dtype=np.int64))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([math.log1p(max(v, 0)) for v in values], dtype=np.float32))


def test_transform_of_missing_numbers() -> None:
    assert transform_dense(np.array([np.nan, -3.0, 0.0, 1.0])).tolist() == [0.0, 0.0, 0.0, pytest.approx(math.log(2))]
