"""Ctrl-C as a request: the step in hand is finished and saved before the program stops."""

import signal
import threading
from types import FrameType, TracebackType


class Interrupt:
    """Within `with Interrupt() as interrupt:` the first Ctrl-C sets `interrupt.requested`; a second one stops at once.

    Outside the main thread, where Python allows no signal handlers, Ctrl-C keeps its meaning.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
