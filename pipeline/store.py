"""The run directory: who may write to it, and how a stage directory appears in it, whole or not at all.

    RUN/stages/NAME/          published stages
    RUN/.work/NAME-ID/        being written
    RUN/.failed/NAME/         the last attempt that did not finish: its records, not its weights
    RUN/.checkpoints/NAME/    what an unfinished stage goes on from
    RUN/archive/NAME-SHA/     replaced stages, never deleted
    RUN/quarantine/NAME-SHA/  damaged stages
    RUN/config.yaml  RUN/history.jsonl  RUN/report.html  RUN/report.json  RUN/.lock

Publishing makes every file durable and hashes it (`pipeline/durable.py`), writes the manifest last, reads everything
back and renames the directory, so a process or machine that stops at any point leaves the stage absent or complete. A
stage that is replaced changes places with the new one, in the archive, at once: there is never none, and nothing that
was published is ever among what is cleared away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import durable
from pipeline import lock as locking
from pipeline import manifest as manifests
from pipeline.config import RunSettings
from pipeline.errors import ArtifactError, BatonError, StorageError
from pipeline.manifest import Manifest

RESERVE = 100 * 2**20
"""Bytes that must be free beyond what a stage's inputs suggest."""

_FULL = 2**20
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_PERMISSION = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_RECORDS = frozenset({".json", ".jsonl", ".log", ".txt"})


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

    @property
    def is_begun(self) -> bool:
        """Whether a run was ever here; its lock may have been removed, as the error about a stale one says to."""
        return any(path.exists() for path in (self.root / locking.FILE_NAME, self.stages, self.history))

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
        durable.make_directory(run.root)
        holding = contextlib.ExitStack()
        holding.enter_context(locking.hold(run.root))
    except OSError as error:
        hint = "choose another `output`"
        raise StorageError(f"cannot be the run directory: {error.strerror}", where=run.root, hint=hint) from None
    with holding:
        with storage_errors(run.root):
            _sweep(run)
        yield


def begin(run: RunDirectory, name: str) -> Path:
    """A new empty directory for a stage to fill, on the same file system as where it will be published.

    Raises:
        StorageError: They are on two file systems, between which nothing can be renamed.
    """
    directory = run.work / f"{name}-{uuid.uuid4().hex[:12]}"
    directory.mkdir(parents=True)
    durable.make_directory(run.stages)
    if directory.stat().st_dev != run.stages.stat().st_dev:
        directory.rmdir()
        hint = "keep the whole run directory on one file system"
        raise StorageError(f"on another file system than {run.work}", where=run.stages, hint=hint)
    return directory


def name_of(work: Path) -> str:
    """The stage that a directory which `begin` made is for."""
    return work.name.rpartition("-")[0]


def publish(work: Path, run: RunDirectory, name: str, manifest: Manifest) -> Path:
    """Turn a filled work directory into the stage directory; a stage that was there goes to the archive.

    When this returns, the stage survives a power cut.

    Raises:
        ArtifactError: What is on disk is not what the manifest says.
    """
    durable.seal(work, manifests.FILE_NAME, manifest)
    manifests.verify(work)
    _place(work, run, name)
    shutil.rmtree(run.failed(name), ignore_errors=True)
    return run.stage(name)


def fail(run: RunDirectory, work: Path) -> Path:
    """Keep the records of an attempt that did not finish and remove its weights."""
    name = name_of(work) or work.name
    target = run.failed(name)
    for path in list(manifests.walk(work)):
        if path.suffix not in _RECORDS or path.is_symlink():
            path.unlink()
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)
    return target


def archived(run: RunDirectory) -> dict[str, Path]:
    """Replaced stages by the sha256 of their manifests, by which the stages made from them know them."""
    found = run.archive.glob(f"*/{manifests.FILE_NAME}")
    return {manifests.sha256(path.parent): path.parent for path in found if path.is_file()}


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
    require_space(directory, 2 * largest_input + RESERVE)


def require_space(directory: Path, needed: int, purpose: str = "") -> None:
    """Refuse to go on where there is too little space.

    Raises:
        StorageError: Gives the bytes needed and free.
    """
    free = shutil.disk_usage(_existing(directory)).free
    if free < needed:
        wanted = f"{needed:,} bytes needed{f' {purpose}' if purpose else ''}"
        raise StorageError(f"{wanted}, {free:,} free", where=directory, hint="free some space")


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what keeps the operating system from writing into `StorageError`; other errors pass."""
    try:
        yield
    except OSError as error:
        refusal = storage_error(error, path)
        if refusal is None:
            raise
        raise refusal from error


def storage_error(error: OSError, path: Path) -> StorageError | None:
    """The `StorageError` for an `OSError` about space, permission or a broken device; None for any other."""
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
    if error.errno in _NO_SPACE:
        return no_space(place)
    if error.errno in _NO_PERMISSION:
        hint = "check who owns it, or choose another `output`"
        return StorageError(os.strerror(error.errno), where=place, hint=hint)
    if error.errno == errno.EIO:
        hint = "look after the device, then run the same command again: finished stages are kept"
        return StorageError("the device failed to read or write", where=place, hint=hint)
    return None


def hides_no_space(error: BaseException, directory: Path) -> bool:
    """Whether an error is how a library says that the file system is full; asked before anything is removed."""
    is_foreign = isinstance(error, Exception) and not isinstance(error, BatonError)
    return is_foreign and shutil.disk_usage(directory).free < _FULL


def no_space(path: Path) -> StorageError:
    """The error for a file system that filled up while a file was written."""
    return StorageError(
        f"no space left: {shutil.disk_usage(_existing(path)).free:,} bytes free, the write needed more",
        where=path,
        hint="free some space and run the same command again: finished stages are kept",
    )


def _existing(path: Path) -> Path:
    """The path, or the nearest above it that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _sweep(run: RunDirectory) -> None:
    """Clear what dead processes left; what they had finished is put where it belongs, or kept."""
    if not run.work.is_dir():
        return
    for orphan in sorted(run.work.iterdir()):
        name = name_of(orphan)
        if not _is_whole(orphan):
            fail(run, orphan)
        elif os.path.lexists(run.stage(name)):
            _set_aside(orphan, run.archive, name)
        else:
            _place(orphan, run, name)


def _is_whole(directory: Path) -> bool:
    try:
        return not manifests.damages(directory)
    except ArtifactError:
        return False


def _place(work: Path, run: RunDirectory, name: str) -> None:
    """Rename a whole directory to where its stage belongs; when this returns, that survives a power cut."""
    target = run.stage(name)
    durable.make_directory(run.stages)
    if os.path.lexists(target):
        _replace(work, target, run)
    else:
        durable.rename_new(work, target)
    for folder in (run.stages, run.work):
        durable.sync(folder)


def _replace(work: Path, target: Path, run: RunDirectory) -> None:
    """Have a stage and a new one change places at once, the new one coming from where the old one will be kept.

    Where the file system cannot do that, there is a moment without the stage. Who is stopped then leaves a whole work
    directory, which the next process puts in its place.
    """
    kept = _free_place(target, run.archive, target.name)
    durable.rename_new(work, kept)
    if durable.exchange(kept, target):
        durable.sync(run.archive)
        return
    kept.rename(work)
    durable.sync(run.work)
    _set_aside(target, run.archive, target.name)
    durable.rename_new(work, target)


def _set_aside(directory: Path, shelf: Path, name: str) -> Path:
    target = _free_place(directory, shelf, name)
    durable.rename_new(directory, target)
    durable.sync(shelf)
    durable.sync(directory.parent)
    return target


def _free_place(directory: Path, shelf: Path, name: str) -> Path:
    """Where to keep a directory."""
    path = directory / manifests.FILE_NAME
    label = manifests.sha256(directory)[:8] if path.is_file() else "no-manifest"
    durable.make_directory(shelf)
    target = shelf / f"{name}-{label}"
    return shelf / f"{name}-{label}-{uuid.uuid4().hex[:8]}" if os.path.lexists(target) else target
