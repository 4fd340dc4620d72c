"""SIGINT and SIGTERM: during set-up they end it; during a step they are kept until the step's end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; the message says what is left. `code`: the exit code, 128 and the signal's number."""

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.code = 128 + number


class Watch:
    """The signal that came (0: none); `patient` where it is kept and not raised at once."""

    def __init__(self) -> None:
        self.number = 0
        self.patient = False
        self.since = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        if not self.patient:
            raise Interrupted(f"stopped by {signal.Signals(number).name}", number)
        if self.number == 0:
            self.number, self.since = number, time.monotonic()
            again = "; once more to stop at once" if number == signal.SIGINT else ""
            os.write(2, f"{signal.Signals(number).name}: this step will be finished and saved{again}\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self.since > 0.5:  # torchrun sends its own right behind
            raise Interrupted("stopped at once by a second SIGINT", number)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Signals are kept until whoever is inside looks at `number`."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """Handles both signals in the block, where this is the main thread; else they keep their handlers."""
    watching = Watch()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, watching.handle) for number in SIGNALS}
    try:
        yield watching
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
