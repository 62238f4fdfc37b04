"""SIGINT, SIGTERM and SIGUSR1 as an orderly stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from pipeline.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """While watching, a signal raises `KeyboardInterrupt`, which no library swallows, and ends `Interrupted`.

    The handlers are Python's, which run in the main thread; elsewhere nothing is installed.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._waiting = 0
        self._stepping = False

    @property
    def came(self) -> bool:
        """Whether there was a signal."""
        return self._received is not None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Install the handlers, and put the earlier ones back at the end.

        Raises:
            Interrupted: A signal came.
        """
        numbers = SIGNALS if threading.current_thread() is threading.main_thread() else ()
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
        """Hold the first signal back until the end of the block, as while publishing; a second one stops at once."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
        self.stop_if_it_came()

    @contextlib.contextmanager
    def step_by_step(self) -> Iterator[None]:
        """Hold the first signal back until `stop_if_it_came` or the end of the block; a second one stops at once."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
        self.stop_if_it_came()

    def stop_if_it_came(self) -> None:
        """Raise `KeyboardInterrupt` if there was a signal, unless signals wait."""
        if self.came and not self._waiting:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_first, self._received = not self.came, number
        if not is_first or not (self._waiting or self._stepping):
            raise KeyboardInterrupt
