"""One writer for a directory: a lock that the kernel drops with the process, however that ends.

On a file system of this machine the kernel's lock alone decides. On a network's, or one that is not known, whether the
lock holds between machines is up to its servers and how it is mounted. There what stands in the lock file counts too:
as long as that is a process of another machine, nobody else gets the directory. Who ends in order takes itself out.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from pipeline.errors import BusyError, StorageError

FILE_NAME = ".lock"
LOCAL = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
)
"""File systems of one machine."""

WAIT = 1.0
"""Seconds in which who has just got the lock may say so."""

_LOCKS = Path("/proc/locks")
_MOUNTS = Path("/proc/self/mountinfo")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_ESCAPED = re.compile(r"\\([0-7]{3})")
_held: set[int] = set()


class Holder(BaseModel):
    """Who holds a lock, as the lock file says."""

    host: str
    boot: str
    """Changes whenever the machine is started."""
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.started}"

    @property
    def is_of_another_machine(self) -> bool:
        """One of this machine that was started anew since is none: nothing of it is left."""
        return self.boot != _boot() and self.host != socket.gethostname()


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold a directory alone.

    Raises:
        BusyError: Another process holds it, or on a network's file system may do so.
        StorageError: The file system has no locks.
        OSError: The lock file cannot be written.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(directory / FILE_NAME, flags, 0o666)
    _held.add(descriptor)
    try:
        _acquire(descriptor, directory)
        try:
            yield
        finally:
            _let_go(descriptor)
    finally:
        if descriptor in _held:  # not in a forked child
            _held.discard(descriptor)
            os.close(descriptor)


def holder(directory: Path) -> Holder | None:
    """Who holds a directory, by the lock file and the kernel's list of locks: to try the lock would take it for a
    moment, and turn away who comes then. Nobody, where the list does not show it, as that of another container."""
    try:
        found = Holder.model_validate_json((directory / FILE_NAME).read_bytes())
        inode = str((directory / FILE_NAME).stat().st_ino)
        locks = [line.split() for line in _LOCKS.read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError):
        return None
    # As in `1: FLOCK ADVISORY WRITE 4711 fd:01:131 0 EOF`.
    own = ["FLOCK", str(found.pid), inode]
    if any([each[1], each[4], each[5].rpartition(":")[2]] == own for each in locks if len(each) > 5):
        return found
    return found if found.is_of_another_machine and caveat(directory) else None


def caveat(directory: Path) -> str:
    """What is to be said of locks on the directory's file system; empty where they can be relied on."""
    kind = file_system(directory)
    if not kind or kind in LOCAL:
        return ""
    return f"{kind} may not keep processes of other machines out: use the directory from one at a time"


def file_system(path: Path) -> str:
    """The type of the file system that a path is on; empty where the system does not say."""
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    place = path.resolve()
    found: tuple[int, str] = (-1, "")
    for line in mounts:
        before, _, after = line.partition(" - ")
        mounted = Path(_ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), before.split()[4]))
        if place.is_relative_to(mounted) and len(mounted.parts) >= found[0]:  # a later one covers an earlier one
            found = len(mounted.parts), after.split()[0]
    return found[1]


def _acquire(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder_soon(descriptor)
        by = f" by {holder}" if holder else ""
        raise BusyError(f"in use{by}", where=directory, hint="wait for it or stop it") from None
    except OSError as error:
        hint = "choose another `output`"
        raise StorageError(f"cannot be locked: {error.strerror}", where=directory, hint=hint) from None
    holder = _holder(descriptor)
    if holder and holder.is_of_another_machine and caveat(directory):
        hint = f"wait for it; if nothing of it runs any more there, remove {directory / FILE_NAME}"
        what = f"in use by {holder}, which did not let go; on {file_system(directory)} it may still run"
        raise BusyError(what, where=directory, hint=hint)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    own = Holder(host=socket.gethostname(), boot=_boot(), pid=os.getpid(), started=started)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, own.model_dump_json().encode("utf-8"), 0)


def _holder_soon(descriptor: int) -> Holder | None:
    """Who wrote the lock file, or is about to."""
    until = time.monotonic() + WAIT
    while (holder := _holder(descriptor)) is None and time.monotonic() < until:
        time.sleep(0.01)
    return holder


def _holder(descriptor: int) -> Holder | None:
    """Who wrote the lock file; nobody, where it is empty or being written."""
    try:
        return Holder.model_validate_json(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None


def _let_go(descriptor: int) -> None:
    if descriptor in _held:
        with contextlib.suppress(OSError):  # the lock goes in any case
            os.ftruncate(descriptor, 0)


def _boot() -> str:
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _close_in_child() -> None:
    """A forked worker that outlives a killed run must not keep the directory locked."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
