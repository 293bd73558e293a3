"""A runner for the real `ctr-data`, and raw files for it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from raw_lines import raw_lines

CTR_DATA = [sys.executable, "-m", "ctr_train.data.cli"]
ROWS = 1000


@pytest.fixture
def lines() -> list[str]:
    """1,000 well-formed labelled lines, without line ends."""
    return raw_lines(ROWS)


@pytest.fixture
def raw(tmp_path: Path, lines: list[str]) -> Path:
    """They as a file."""
    path = tmp_path / "raw.tsv"
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.fixture
def start_ctr_data(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """The real `ctr-data` in a process of its own, in `tmp_path`: (*arguments) -> running process."""

    def start(*arguments: str | Path, **options: object) -> subprocess.Popen[str]:
        return subprocess.Popen([*CTR_DATA, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)

    return start


@pytest.fixture
def ctr_data(start_ctr_data: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """(*arguments) -> finished process."""

    def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        process = start_ctr_data(*arguments, **options)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run
