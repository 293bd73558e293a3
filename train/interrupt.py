"""Ctrl-C and `kill` as requests: the step in hand is finished and saved before the program stops."""

import signal
import threading
from types import FrameType, TracebackType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_code(number: int) -> int:
    """What a program ended by a signal returns, by the shell's convention: 130 for Ctrl-C, 143 for `kill`."""
    return 128 + number


class Interrupted(Exception):
    """Work that was asked to stop has stopped, and is to be done again."""


class Killed(BaseException):
    """SIGTERM, raised in the main thread as KeyboardInterrupt is, so that on the way out temporary files go."""


def raise_killed(number: int, frame: FrameType | None) -> NoReturn:
    """The handler of SIGTERM that the console scripts install."""
    raise Killed


class Interrupt:
    """Within `with Interrupt() as interrupt:` the first Ctrl-C or `kill` sets `interrupt.requested` to the signal's
    number, 0 until then; a second one stops at once.

    Outside the main thread, where Python allows no signal handlers, both keep their meaning.
    """

    def __init__(self) -> None:
        self.requested = 0

    def __enter__(self) -> "Interrupt":
        main = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS if main}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise Killed if number == signal.SIGTERM else KeyboardInterrupt
        self.requested = number
