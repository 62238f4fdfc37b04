"""Several processes at one run directory."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

from pipeline import lock

from . import children, runs

WITHIN = 5.0
"""Seconds in which a killed holder's lock must be free."""


def at_once(root: Path, count: int) -> Counter[int]:
    """Exit codes of processes that run the same run at the same time; one that comes late finds all done."""
    runs.write_configuration(root)
    reading, writing = os.pipe()
    action = partial(_in_time, partial(runs.run, root), root)
    started = [children.start(action, root / "output", wait=reading) for _ in range(count)]
    os.write(writing, b"." * count)
    codes = Counter(map(children.ended, started))
    os.close(reading)
    os.close(writing)
    return codes


def stale_after_a_kill(root: Path) -> bool:
    """Whether a lock is still held after its holder was killed, though a child of the holder lives on."""
    shutil.rmtree(root / "locked", ignore_errors=True)
    (root / "locked").mkdir()
    reading, writing = os.pipe()

    def hold() -> None:
        with lock.hold(root / "locked"):
            orphan = os.fork()
            os.write(writing, f"{orphan:10}".encode() if orphan else b"")
            signal.pause()

    holder = children.start(hold, root / "output")
    orphan = int(os.read(reading, 10))
    os.kill(holder, signal.SIGKILL)
    children.ended(holder)
    try:
        return not _becomes_free(root / "locked")
    finally:
        os.kill(orphan, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def _becomes_free(directory: Path) -> bool:
    until = time.monotonic() + WITHIN
    while time.monotonic() < until:
        try:
            with lock.hold(directory):
                return True
        except lock.BusyError:
            time.sleep(0.01)
    return False


def _in_time(action: children.Action, root: Path) -> int | None:
    """Hold the directory until all others were refused: a run is over so soon that one may start after it."""
    code = action()
    return code
