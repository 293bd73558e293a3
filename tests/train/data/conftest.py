"""Raw Criteo lines, well-formed and random, and a runner for the real `ctr-data`."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CTR_DATA = [sys.executable, "-m", "ctr_train.data.cli"]


@pytest.fixture(scope="session")
def make_lines() -> Callable[..., list[str]]:
    """(rows, seed) -> labelled lines without line ends: missing values, negatives, large numbers, few and many ids."""

    def number(draw: random.Random, field: int) -> str:
        if draw.random() < 0.2:
            return ""
        small = -draw.randrange(4) if field == 1 else draw.randrange(4)
        return str(draw.choice([small, draw.randrange(100), draw.randrange(10**9)]))

    def category(draw: random.Random, field: int) -> str:
        if draw.random() < 0.1:
            return ""
        return f"{draw.randrange(3 if field % 2 else 2**32) * 2654435761 % 2**32:08x}"

    def make(rows: int, seed: int = 0) -> list[str]:
        draw = random.Random(seed)
        return ["\t".join([str(int(draw.random() < 0.25)), *(number(draw, i) for i in range(13)),
                           *(category(draw, i) for i in range(26))]) for _ in range(rows)]

    return make


@pytest.fixture
def raw(tmp_path: Path, make_lines: Callable[..., list[str]]) -> Path:
    """A raw file of 1,000 good lines."""
    path = tmp_path / "raw.tsv"
    path.write_text("".join(line + "\n" for line in make_lines(1000)))
    return path


@pytest.fixture
def ctr_data(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The real `ctr-data` in a process of its own, in `tmp_path`: (*arguments) -> finished process."""

    def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*CTR_DATA, *map(str, arguments)], capture_output=True, text=True, timeout=120,
                              cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)

    return run
