"""Raw Criteo lines to features, a block of some ten thousand lines at a time, in whole-array operations.

A block is parsed optimistically: separators are found, counted and reshaped to [lines, columns], numbers and hex
strings read by column position. Whatever does not fit is looked at again line by line, strictly, to name the line.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .protocol import NUM_DENSE, NUM_SPARSE, fnv_basis, fnv_step, ids_of, transform_dense

TAB, NEWLINE, MINUS, ZERO = 9, 10, 45, 48
COLUMNS = 1 + NUM_DENSE + NUM_SPARSE  # of a labelled file; an unlabelled one has one less
MAX_DIGITS = 18  # of a number: what int64 surely holds
HEX = 8  # characters of a categorical value, at most
_WORD = 8  # bytes of the words that fields are read in
_FRONT = 3 * _WORD  # room for the words of a number of MAX_DIGITS
_BYTES = np.uint64(0x0101010101010101)  # times a byte: that byte eight times
_TOP_BITS = _BYTES * np.uint64(0x80)
_LONG = 100  # stands for all lengths beyond: those of no field
_SHOWN = 60  # characters of an offending text


@dataclass
class Block:
    """Lines parsed. label uint8 [n] (None if unlabelled), dense float32 [n, 13] transformed, dense_missing bool
    [n, 13], sparse int32 [n, 26], values uint32 [n, 26] (hashes before the modulo), sparse_missing bool [n, 26].
    """

    label: np.ndarray | None
    dense: np.ndarray
    dense_missing: np.ndarray
    sparse: np.ndarray
    values: np.ndarray
    sparse_missing: np.ndarray


class BadLine(ValueError):
    """A line that breaks the format. `line` counts from 0 within the block; `reason` quotes the offending text."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line, self.reason = line, reason


Parser = Callable[[bytes, bool, int], Block | None]  # (text, labelled, hash_bins); None: some line breaks the format


def parse_block(text: bytes, *, labelled: bool, hash_bins: int, parser: Parser | None = None) -> Block:
    """Whole lines, each ended by a newline -> features. Raises BadLine for the first line that breaks the format.

    Args:
        parser: one that does what `parse_arrays` does, which is the default.
    """
    block = (parser or parse_arrays)(text, labelled, hash_bins)
    if block is not None:
        return block
    for i, line in enumerate(text.split(b"\n")[:-1]):
        reason = why_bad(line, labelled)
        if reason:
            raise BadLine(i, reason)
    raise AssertionError("a block was refused, yet each of its lines is well-formed")


def good_lines(text: bytes, *, labelled: bool) -> tuple[bytes, np.ndarray]:
    """The well-formed lines of a block, and their positions in it, int64."""
    lines = text.split(b"\n")[:-1]
    kept = [i for i, line in enumerate(lines) if not why_bad(line, labelled)]
    return b"".join(lines[i] + b"\n" for i in kept), np.array(kept, dtype=np.int64)


def why_bad(line: bytes, labelled: bool) -> str:
    """What is wrong with one line (without its newline), quoting the text; empty if nothing."""
    columns = line.split(b"\t")
    expected = COLUMNS if labelled else COLUMNS - 1
    if len(columns) != expected:
        unlabelled = "; rows without labels cannot be trained on" if labelled and len(columns) == expected - 1 else ""
        return f"{len(columns)} columns instead of {expected}: {_shown(line)}{unlabelled}"
    if labelled and columns[0] not in (b"0", b"1"):
        return f"the label is {_shown(columns[0])}, not 0 or 1"
    first = int(labelled)
    for i, value in enumerate(columns[first:first + NUM_DENSE]):
        digits = value.removeprefix(b"-")
        if value and not (digits.isdigit() and len(digits) <= MAX_DIGITS):
            return f"I{i + 1} is {_shown(value)}, not an integer" + (
                f" of at most {MAX_DIGITS} digits" if digits.isdigit() else "")
    for i, value in enumerate(columns[first + NUM_DENSE:]):
        if len(value) > HEX:
            return f"C{i + 1} is {_shown(value)}, longer than {HEX} characters"
        if value.strip(b"0123456789abcdef"):
            return f"C{i + 1} is {_shown(value)}, not lowercase hexadecimal"
    return ""


def _shown(text: bytes) -> str:
    shown = text[:_SHOWN].decode("utf-8", "backslashreplace")
    return repr(shown + ("..." if len(text) > _SHOWN else ""))


def parse_arrays(text: bytes, labelled: bool, hash_bins: int) -> Block | None:
    """The features, or None where anything breaks the format. Within, arrays are [columns, n]: a field's are together.
    """
    columns = COLUMNS if labelled else COLUMNS - 1
    # Padded, because words of 8 bytes are read that end where the first field does or begin where the last one does.
    data = np.frombuffer(b" " * _FRONT + text + b" " * _WORD, dtype=np.uint8)
    words = np.ndarray(len(data) - _WORD + 1, dtype="<u8", buffer=data, strides=1)  # the 8 bytes from each position
    separators = np.flatnonzero(data <= NEWLINE)  # other bytes as low belong nowhere: found out by the next check
    if len(separators) % columns:
        return None
    ends = np.ascontiguousarray(separators.reshape(-1, columns).T)
    found = data[ends]
    if (found[-1] != NEWLINE).any() or (found[:-1] != TAB).any():
        return None
    starts = np.empty_like(ends)
    starts[1:] = ends[:-1] + 1
    starts[0, 1:] = ends[-1, :-1] + 1
    starts[0, :1] = _FRONT
    lengths = np.minimum(ends - starts, _LONG).astype(np.uint8)

    first, label = int(labelled), None
    if labelled:
        label = data[starts[0]] - np.uint8(ZERO)  # wraps for bytes below '0'
        if (lengths[0] != 1).any() or (label > 1).any():
            return None
    numbers, strings = slice(first, first + NUM_DENSE), slice(first + NUM_DENSE, None)
    values = _integers(words, ends[numbers], lengths[numbers], data[starts[numbers]] == MINUS)
    if values is None:
        return None
    hashes = _hashes(words[starts[strings]], lengths[strings])
    if hashes is None:
        return None
    missing = lengths[strings] == 0
    return Block(label, np.ascontiguousarray(transform_dense(values).T), (lengths[numbers] == 0).T,
                 np.ascontiguousarray(ids_of(hashes, missing, hash_bins).T), hashes.T, missing.T)


def _integers(words: np.ndarray, ends: np.ndarray, lengths: np.ndarray, negative: np.ndarray) -> np.ndarray | None:
    """Decimal integers [13, n], a missing one 0; None where something else stands."""
    digits = lengths - negative
    longest = int(digits.max(initial=0))
    if longest > MAX_DIGITS or (negative & (digits == 0)).any():
        return None
    values = _number(words[ends - _WORD], np.minimum(digits, _WORD))
    if values is None:
        return None
    for done in range(_WORD, longest, _WORD):  # rare: 9 digits and more
        field, row = np.nonzero(digits > done)
        higher = _number(words[ends[field, row] - _WORD - done], np.minimum(digits[field, row] - done, _WORD))
        if higher is None:
            return None
        values[field, row] += higher * 10**done
    return np.negative(values, out=values, where=negative)


def _number(words: np.ndarray, digits: np.ndarray) -> np.ndarray | None:
    """int64 of the last `digits` (0 to 8) of the 8 characters of each uint64; None where one of them is no digit.

    Digits are added up in pairs, then the pairs in pairs, then those (Lemire, 2018: "Quickly parsing eight digits").
    """
    skipped = ((_WORD - digits) * np.uint8(8)).astype(np.uint64)  # bits; 64 of them leave 0, as numpy defines shifts
    value = ((words ^ _BYTES * np.uint64(ZERO)) >> skipped) << skipped
    if (((value + _BYTES * np.uint64(0x80 - 10)) | value) & _TOP_BITS).any():
        return None
    value = (value * np.uint64(10) + (value >> np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    value = (value * np.uint64(100) + (value >> np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    value = (value * np.uint64(10_000) + (value >> np.uint64(32))) & np.uint64(0x00000000FFFFFFFF)
    return value.view(np.int64)


def _hashes(words: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """FNV-1a states uint32 [26, n] of lowercase hex strings of at most 8 characters; None where another stands."""
    if lengths.max(initial=0) > HEX:
        return None
    basis = np.array([[fnv_basis(field)] for field in range(NUM_SPARSE)], dtype=np.uint32)
    full = lengths == HEX
    if not (_is_hex(words) | ~full).all():
        return None
    state = basis
    for half in (words.astype(np.uint32), (words >> np.uint64(32)).astype(np.uint32)):  # half as wide, twice as fast
        for bits in range(0, 32, 8):
            state = fnv_step(state, (half >> np.uint32(bits)) & np.uint32(0xFF))
    state = np.where(full, state, basis)
    field, row = np.nonzero((lengths > 0) & ~full)
    if len(row):  # rare: strings of 1 to 7 characters
        length, word, short = lengths[field, row], words[field, row], basis[field, 0]
        for i in range(HEX - 1):
            character = (word >> np.uint64(8 * i)) & np.uint64(0xFF)
            inside = i < length
            if not np.isin(character[inside], np.frombuffer(b"0123456789abcdef", dtype=np.uint8)).all():
                return None
            short = np.where(inside, fnv_step(short, character.astype(np.uint32)), short)
        state[field, row] = short
    return state


def _is_hex(words: np.ndarray) -> np.ndarray:
    """Whether all 8 bytes of each uint64 are 0-9 or a-f: byte + (128 - bound) has its top bit set iff >= bound."""
    low = words & ~_TOP_BITS

    def at_least(bound: int) -> np.ndarray:
        return low + _BYTES * np.uint64(0x80 - bound)

    digit = at_least(ord("0")) ^ at_least(ord("9") + 1)
    letter = at_least(ord("a")) ^ at_least(ord("f") + 1)
    return ((digit | letter) & ~words & _TOP_BITS) == _TOP_BITS
