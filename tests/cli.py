"""What a failing command may print."""

import subprocess


def assert_fails(done: subprocess.CompletedProcess[str], sentence: str) -> None:
    """Exit code 1, and nothing but one line on stderr that holds the sentence."""
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("ctr-train: ") and done.stderr.count("\n") == 1, done.stderr
    assert sentence in done.stderr
    assert done.stdout == ""
