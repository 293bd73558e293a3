"""Tests of Triton kernels on a CPU: each of their files runs once more in a process of its own, in the interpreter.

The interpreter is chosen before Triton is imported, so that one process cannot have both.
"""

import os
import re
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs within test_in_the_interpreter")
outside = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")


def run_in_the_interpreter(file: str, at_least: int, skipped: int = 1) -> None:
    """Run the tests of `file`: none may fail, `at_least` must pass, and that many, the caller too, are skipped."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "not gpu", file], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|skipped)", done.stdout)}
    assert counts["passed"] >= at_least and counts["skipped"] == skipped, done.stdout[-2000:]
