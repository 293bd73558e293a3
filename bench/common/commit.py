"""Which commit a result belongs to; needs Python alone."""

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """Short hash of the checkout, with "-dirty" if it has changes, or $CTR_COMMIT where it came without its history;
    "unknown" outside a checkout."""
    return os.environ.get("CTR_COMMIT") or first_line(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"])


def first_line(command: list[str]) -> str:
    """The first line that a command prints; "unknown" where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
