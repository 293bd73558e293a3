"""The console scripts in processes forked from this one, which has imported all that they need already."""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ctr_train import cli_eval, cli_report, cli_train
from ctr_train.data import cli as cli_data

MODULES = {module.NAME: module for module in (cli_train, cli_eval, cli_report, cli_data)}
SECONDS = 120.0  # no command of the campaign takes so long
FAULT = 70  # exit code of a child whose function raised


@dataclass
class Done:
    """A command that has ended: its exit code, negative for a signal, and what it printed."""

    code: int
    out: str
    err: str

    def failed_well(self) -> bool:
        """Whether it ended with code 1 or 2 and one sentence, and printed no result."""
        lines = self.err.splitlines()
        return self.code in (1, 2) and self.out == "" and bool(lines) and lines[-1].startswith(
            (*(f"{name}: " for name in MODULES), "Error: ")) and "Traceback" not in self.err


class Command:
    """A console script with its arguments, in the directory `where`, as a child process."""

    def __init__(self, where: Path, *arguments: str | Path) -> None:
        self._files = [where / f".{name}-of-the-command" for name in ("out", "err")]

        def run() -> None:
            os.chdir(where)
            for file, descriptor in zip(self._files, (1, 2), strict=True):
                os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
            torch.set_num_threads(1)
            sys.argv = [str(argument) for argument in arguments]
            MODULES[sys.argv[0]].main()

        self.pid = fork(run)

    def kill(self) -> None:
        """SIGKILL, whatever it is doing."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Done:
        """Its end; what it printed is no longer on the disk afterwards. AssertionError if it does not end."""
        code = wait(self.pid, SECONDS)
        texts = [file.read_text(errors="replace") if file.exists() else "" for file in self._files]
        for file in self._files:
            file.unlink(missing_ok=True)
        return Done(code, *texts)


def call(where: Path, *arguments: str | Path) -> Done:
    """A command from its beginning to its end."""
    return Command(where, *arguments).wait()


def fork(function: Callable[[], object]) -> int:
    """The process number of a child that runs the function and ends with its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 0
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        function()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = FAULT
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float) -> int:
    """The exit code of a child, negative for a signal; AssertionError, and its end, where it takes longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a process still ran after {seconds:g} s")
