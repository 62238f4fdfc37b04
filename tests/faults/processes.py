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
from pipeline.contract import Context, Result
from pipeline.errors import BusyError

from . import children, runs

PATIENCE = 60.0
"""Seconds after which those that were not refused go on, should there be several."""
WITHIN = 5.0
"""Seconds in which a killed holder's lock must be free."""


def at_once(root: Path, count: int) -> Counter[int]:
    """Exit codes of processes that run the same run at the same time: the first one's stages wait for all others."""
    runs.write_configuration(root)
    started = [children.start(partial(runs.run, root, _wait_and_run), root / "output") for _ in range(count)]
    codes: Counter[int] = Counter()
    until = time.monotonic() + PATIENCE
    while started:
        for child in list(started):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                started.remove(child)
                codes[os.waitstatus_to_exitcode(status)] += 1
        if len(started) == 1 or time.monotonic() > until:
            (root / "go").touch()
        time.sleep(0.01)
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
        except BusyError:
            time.sleep(0.01)
    return False


def _wait_and_run(context: Context) -> Result:
    while not (context.directory.parents[2] / "go").exists():
        time.sleep(0.01)
    return runs.run_stage(context)
