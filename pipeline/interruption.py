"""SIGINT and SIGTERM as an orderly stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from pipeline.errors import Interrupted


class Interruption:
    """While watching, a signal raises `KeyboardInterrupt`, which no library swallows, and ends `Interrupted`.

    The handlers are Python's, which run in the main thread; elsewhere nothing is installed.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._waiting = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Install the handlers, and put the earlier ones back at the end.

        Raises:
            Interrupted: A signal came.
        """
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        previous = [(number, signal.signal(number, self._receive)) for number in numbers]
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(self._received or signal.SIGINT) from None
        finally:
            for number, handler in previous:
                signal.signal(number, handler)

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Hold signals back until the end of the block, as while publishing."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
        if self._received is not None and not self._waiting:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if not self._waiting:
            raise KeyboardInterrupt
