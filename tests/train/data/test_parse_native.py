"""The native parser against the one in whole-array operations, bit for bit, and what both refuse."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_lines import raw_lines

from ctr_kernels.library import NATIVE_ABSENT
from ctr_train.data import raw
from ctr_train.data.parse import Block, parse_arrays, why_bad
from ctr_train.data.prepare import prepare

pytestmark = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=f"native kernels are absent: {NATIVE_ABSENT}")

HEX = "0123456789abcdef"
NUMBER = st.one_of(st.just(""), st.integers(-99, 70_000).map(str), st.integers(-(10**18) + 1, 10**18 - 1).map(str))
STRING = st.one_of(st.just(""), st.text(HEX, min_size=8, max_size=8), st.text(HEX, max_size=8))
ROW = st.tuples(st.sampled_from("01"), st.lists(NUMBER, min_size=13, max_size=13),
                st.lists(STRING, min_size=26, max_size=26))
EXAMPLE = ["1", *["5"] * 13, *["68fd1e64"] * 26]
# (column, what stands there): each breaks the format, the last ones as columns or lines that are not there.
BROKEN = [(0, "2"), (0, ""), (0, "10"), (3, "-"), (3, "1.5"), (3, "1" * 19), (3, "--1"), (3, " 1"), (3, "0x1"),
          (13, "/"), (13, ":"), (14, "68FD1E64"), (14, "68fd1e6g"), (14, "68fd1e6`"), (39, "68fd1e6/"),
          (39, "68fd1e6:"), (14, "68fd1e64a"), (20, "1 2"), (20, "\xb1fd1e64"), (39, "1\t2"), (39, "1\n"), (5, "1\n2")]


def parse_native(text: bytes, labelled: bool, hash_bins: int) -> Block | None:
    from ctr_train.data.parse_native import parse_native

    return parse_native(text, labelled, hash_bins)


def assert_equal(found: Block | None, expected: Block | None) -> None:
    assert found is not None and expected is not None
    for field in fields(Block):
        mine, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)


@given(st.lists(ROW, max_size=5), st.booleans(), st.sampled_from([1, 7, 2_000_000, 2**31 - 1]))
def test_both_find_the_same(rows: list, labelled: bool, hash_bins: int) -> None:
    lines = ["\t".join([label, *numbers, *strings][0 if labelled else 1:]) for label, numbers, strings in rows]
    text = "".join(line + "\n" for line in lines).encode()
    assert_equal(parse_native(text, labelled, hash_bins), parse_arrays(text, labelled, hash_bins))


@pytest.mark.parametrize(("column", "value"), BROKEN)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_both_refuse_what_breaks_the_format(column: int, value: str, place: int) -> None:
    lines = ["\t".join(EXAMPLE)] * 3
    lines[place] = "\t".join([*EXAMPLE[:column], value, *EXAMPLE[column + 1:]])
    text = "".join(line + "\n" for line in lines).encode("latin-1")
    assert parse_native(text, True, 1000) is None
    assert parse_arrays(text, True, 1000) is None
    assert any(why_bad(line, True) for line in text.split(b"\n")[:-1])


def test_large_files_are_prepared_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raw.tsv").write_text("".join(line + "\n" for line in raw_lines(300)))
    outputs = []
    for large in (1 << 40, 0):
        monkeypatch.setattr(raw, "LARGE_BYTES", large)
        assert (raw._parser([raw.Source(tmp_path / "raw.tsv")]) is None) == bool(large)
        outputs.append(prepare([tmp_path / "raw.tsv"], tmp_path / str(large), hash_bins=500, valid_ratio=0.3).to_dict())
    assert outputs[0] == outputs[1]
