"""The run directory: who may write to it, and how a stage directory appears in it, whole or not at all.

    RUN/stages/NAME/          published stages
    RUN/.work/NAME-ID/        being written
    RUN/.failed/NAME/         the last attempt that did not finish: its records, not its weights
    RUN/.checkpoints/NAME/    what an unfinished stage goes on from
    RUN/archive/NAME-SHA/     replaced stages, never deleted
    RUN/quarantine/NAME-SHA/  damaged stages
    RUN/config.yaml  RUN/history.jsonl  RUN/report.html  RUN/report.json  RUN/.lock

Publishing makes every file durable and hashes it (`pipeline/durable.py`), writes the manifest last, reads everything
back and renames the directory, so a process or machine that stops at any point leaves the stage absent or complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline import durable
from pipeline import manifest as manifests
from pipeline.config import RunSettings
from pipeline.errors import BatonError, BusyError, StorageError
from pipeline.manifest import Manifest

RESERVE = 100 * 2**20
"""Bytes that must be free beyond what a stage's inputs suggest."""

_FULL = 2**20
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_PERMISSION = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_RECORDS = frozenset({".json", ".jsonl", ".log", ".txt"})
_held: set[int] = set()


@dataclass(frozen=True)
class RunDirectory:
    """The places of a run directory."""

    root: Path

    @classmethod
    def of(cls, settings: RunSettings) -> RunDirectory:
        return cls(Path(settings.output))

    @property
    def stages(self) -> Path:
        return self.root / "stages"

    @property
    def work(self) -> Path:
        return self.root / ".work"

    @property
    def archive(self) -> Path:
        return self.root / "archive"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def history(self) -> Path:
        return self.root / "history.jsonl"

    def stage(self, name: str) -> Path:
        return self.stages / name

    def failed(self, name: str) -> Path:
        return self.root / ".failed" / name

    def checkpoints(self, name: str) -> Path:
        return self.root / ".checkpoints" / name

    def published(self) -> list[str]:
        """Names of the published stages, sorted."""
        return sorted(path.parent.name for path in self.stages.glob(f"*/{manifests.FILE_NAME}"))


@contextlib.contextmanager
def lock(run: RunDirectory) -> Iterator[None]:
    """Hold the run directory alone; unfinished work of earlier processes is cleared away first.

    The kernel drops the lock with the process, however it ends, so it never needs removing by hand.

    Raises:
        BusyError: Another process holds it.
        StorageError: The directory cannot be written.
    """
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        hint = "choose another `output`"
        raise StorageError(f"cannot be the run directory: {error.strerror}", where=run.root, hint=hint) from None
    try:
        _acquire(descriptor, run.root)
        _held.add(descriptor)
        with storage_errors(run.root):
            _sweep(run)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def begin(run: RunDirectory, name: str) -> Path:
    """A new empty directory for a stage to fill, on the same file system as where it will be published."""
    directory = run.work / f"{name}-{uuid.uuid4().hex[:12]}"
    directory.mkdir(parents=True)
    return directory


def publish(work: Path, run: RunDirectory, name: str, manifest: Manifest) -> Path:
    """Turn a filled work directory into the stage directory; a stage that was there goes to the archive.

    When this returns, the stage survives a power cut.

    Raises:
        ArtifactError: What is on disk is not what the manifest says.
    """
    durable.seal(work, manifests.FILE_NAME, manifest)
    manifests.verify(work)
    target = run.stage(name)
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        _replace(work, target, run)
    else:
        durable.rename_new(work, target)
    for folder in (run.stages, run.work, run.root):
        durable.sync(folder)
    shutil.rmtree(run.failed(name), ignore_errors=True)
    return target


def fail(run: RunDirectory, work: Path) -> Path:
    """Keep the records of an attempt that did not finish and remove its weights."""
    name = work.name.rpartition("-")[0] or work.name
    target = run.failed(name)
    for path in list(manifests.walk(work)):
        if path.suffix not in _RECORDS or path.is_symlink():
            path.unlink()
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)
    return target


def quarantine(run: RunDirectory, name: str) -> Path:
    """Move a damaged stage out of the way, never deleting it."""
    return _set_aside(run.stage(name), run.quarantine, name)


def check_space(directory: Path, largest_input: int) -> None:
    """Refuse to start a stage that would probably run out of space.

    Args:
        directory: Where the stage will write.
        largest_input: Bytes of its biggest input; a stage writes about as much, and a replaced one is kept.

    Raises:
        StorageError: Gives the bytes needed and free.
    """
    needed, free = 2 * largest_input + RESERVE, shutil.disk_usage(directory).free
    if free < needed:
        raise StorageError(f"{needed:,} bytes needed, {free:,} free", where=directory, hint="free some space")


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into `StorageError`; other errors pass."""
    try:
        yield
    except OSError as error:
        refusal = storage_error(error, path)
        if refusal is None:
            raise
        raise refusal from error


def storage_error(error: OSError, path: Path) -> StorageError | None:
    """The `StorageError` for an `OSError` about space or permission; None for any other."""
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
    if error.errno in _NO_SPACE:
        return no_space(place)
    if error.errno in _NO_PERMISSION:
        hint = "check who owns it, or choose another `output`"
        return StorageError(os.strerror(error.errno), where=place, hint=hint)
    return None


def hides_no_space(error: BaseException, directory: Path) -> bool:
    """Whether an error is how a library says that the file system is full; asked before anything is removed."""
    is_foreign = isinstance(error, Exception) and not isinstance(error, BatonError)
    return is_foreign and shutil.disk_usage(directory).free < _FULL


def no_space(path: Path) -> StorageError:
    """The error for a file system that filled up while a file was written."""
    place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return StorageError(
        f"no space left: {shutil.disk_usage(place).free:,} bytes free, the write needed more",
        where=path,
        hint="free some space and run the same command again: finished stages are kept",
    )


def _acquire(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(f"in use{_holder(descriptor)}", where=root, hint="wait for it or stop it") from None
    started = datetime.now(UTC).isoformat(timespec="seconds")
    holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started})
    with storage_errors(root):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode("utf-8"), 0)


def _holder(descriptor: int) -> str:
    """Who wrote the lock file; it may be mid-write, and then nobody is named."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f" by process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return ""


def _sweep(run: RunDirectory) -> None:
    """Clear what dead processes left. A complete directory was cut off in a replacement and is archived."""
    if not run.work.is_dir():
        return
    for orphan in sorted(run.work.iterdir()):
        if (orphan / manifests.FILE_NAME).is_file():
            _set_aside(orphan, run.archive, orphan.name.rpartition("-")[0])
        else:
            fail(run, orphan)


def _set_aside(directory: Path, shelf: Path, name: str) -> Path:
    path = directory / manifests.FILE_NAME
    label = manifests.sha256(directory)[:8] if path.is_file() else "no-manifest"
    shelf.mkdir(exist_ok=True)
    target = shelf / f"{name}-{label}"
    if target.exists():
        target = shelf / f"{name}-{label}-{uuid.uuid4().hex[:8]}"
    directory.rename(target)
    durable.sync(shelf)
    durable.sync(directory.parent)
    return target


def _replace(work: Path, target: Path, run: RunDirectory) -> None:
    if durable.exchange(work, target):
        _set_aside(work, run.archive, target.name)
        return
    _set_aside(target, run.archive, target.name)
    work.rename(target)


def _close_in_child() -> None:
    """A forked worker that outlives a killed run must not keep the run locked."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
