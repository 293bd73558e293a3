"""Damaged raw files: every row that is prepared is one of the file's, as the protocol words it, or nothing is."""

import gzip
import random
import tempfile
from pathlib import Path

import numpy as np
from raw_lines import features, raw_lines

from ctr_train.data.artifacts import Artifacts
from ctr_train.data.dataset import open_split
from ctr_train.data.parse import why_bad

from .commands import call

BINS, RATIO = 1000, 0.2


def check(seed: int) -> str:
    """Damage a file of 40 to 300 rows and prepare it. Returns what became of it."""
    draw = random.Random(seed)
    text = "".join(line + "\n" for line in raw_lines(draw.randrange(40, 300), seed=seed)).encode()
    for _ in range(draw.choice([1, 1, 1, 3])):
        text = draw.choice(DAMAGES)(draw, text)
    content = gzip.compress(text, mtime=0) if draw.random() < 0.3 else text
    if content is not text and draw.random() < 0.5:
        content = draw.choice([flip, cut, insert])(draw, content)
    skip = draw.random() < 0.5
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        (where / "rows.tsv").write_bytes(content)
        done = call(where, "ctr-data", "prepare", "--input", "rows.tsv", "--out", "out", "--recipe", "baseline-v1",
                    "--hash-bins", str(BINS), "--valid-ratio", str(RATIO), "--on-bad-line", "skip" if skip else "error")
        left = sorted(path.name for path in where.iterdir())
        if done.code:
            assert done.failed_well(), f"code {done.code}: {done.err}"
            assert left == ["rows.tsv"], f"left over: {left}"
            return "refused"
        assert left == ["out", "rows.tsv"], f"left over: {left}"
        return _compare(where / "out", content, skip)


def _compare(out: Path, content: bytes, skip: bool) -> str:
    """AssertionError unless the prepared rows are the file's good lines."""
    text = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    lines = text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n")
    lines = lines[:-1] if not lines[-1] else lines
    good = [not why_bad(line, True) for line in lines]
    found = Artifacts.load(out)
    assert found.skipped_lines == good.count(False) and (skip or all(good)), "bad lines were taken, or good ones left"
    for name, wanted in (("train", False), ("valid", True)):
        expected = [features(line.decode(), BINS) for i, line in enumerate(lines)
                    if good[i] and (((1103515245 * (i + 42) + 12345) % 2**31) / 2**31 < RATIO) == wanted]
        rows = open_split(out, name).slice(0, len(expected) + 1)
        assert rows.label.tolist() == [label for label, _, _ in expected], f"labels of {name}"
        assert np.allclose(rows.dense, [dense for _, dense, _ in expected], rtol=1e-6, atol=0), f"numbers of {name}"
        assert rows.sparse.tolist() == [sparse for _, _, sparse in expected], f"ids of {name}"
    return "prepared without its bad lines" if not all(good) else "prepared"


def flip(draw: random.Random, text: bytes) -> bytes:
    damaged = bytearray(text)
    for _ in range(draw.choice([1, 1, 2, 8])):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def cut(draw: random.Random, text: bytes) -> bytes:
    return text[:draw.randrange(1, len(text))]


def insert(draw: random.Random, text: bytes) -> bytes:
    at = draw.randrange(len(text))
    return text[:at] + draw.randbytes(draw.choice([1, 1, 4, 64])) + text[at:]


def remove(draw: random.Random, text: bytes) -> bytes:
    at = draw.randrange(len(text))
    return text[:at] + text[at + draw.choice([1, 1, 5, 300]):] or b"\n"


def swap(draw: random.Random, text: bytes) -> bytes:
    lines = text.split(b"\n")
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]
    return b"\n".join(lines)


def separate(draw: random.Random, text: bytes) -> bytes:
    old, new = draw.choice([(b"\t", b","), (b"\t", b" "), (b"\n", b"\r\n"), (b"\n", b"\r"), (b"\t", b"\t\t"),
                            (b"\n", b"\n\n")])
    return text.replace(old, new) if draw.random() < 0.3 else text.replace(old, new, draw.randrange(1, 20))


def column(draw: random.Random, text: bytes) -> bytes:
    """A value of a row becomes one of another kind."""
    lines = text.split(b"\n")
    i = draw.randrange(len(lines))
    values = lines[i].split(b"\t")
    values[draw.randrange(len(values))] = draw.choice([b"", b"-", b"+1", b"1.5", b"1e3", b"nan", b"0x1f", b" 1", b"1 ",
                                                       b"99999999999999999999", b"ABCDEF01", b"-5", b"00000000", b"\0",
                                                       b"123456789", "\u0663".encode(), b'"1"'])
    lines[i] = b"\t".join(values)
    return b"\n".join(lines)


def mark(draw: random.Random, text: bytes) -> bytes:
    return draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"label\tI1\tI2\n", b"\n", b"#\n"]) + text


DAMAGES = [flip, cut, insert, remove, swap, separate, column, mark]
