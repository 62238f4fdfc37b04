"""Files and directories that survive a power cut: synced, hashed, sealed with a record that is written last, renamed.

What is published has gone through all of it: a directory at its final place is whole.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import uuid
from pathlib import Path

from pydantic import BaseModel

from pipeline import manifest as manifests
from pipeline.errors import ArtifactError
from pipeline.fingerprint import file_sha256, meanwhile
from pipeline.manifest import OutputRecord
from pipeline.seal import sealed

_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2


def inventory(directory: Path) -> list[OutputRecord]:
    """Make every file durable and readable like its neighbours, and hash it.

    Raises:
        ArtifactError: A link or anything else that is not a regular file.
    """
    paths = list(manifests.walk(directory))
    for path in paths:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError("a stage may only leave regular files", where=path)
        # safetensors writes 0600, which would keep colleagues from reading the hand-over
        path.chmod(0o666 & ~_umask())
    with meanwhile(file_sha256, paths) as hashed:  # the disk has its own work
        for path in paths:
            sync(path)
        digests = hashed()
    outputs = [
        OutputRecord(
            path=path.relative_to(directory).as_posix(),
            bytes=path.stat().st_size,
            sha256=digest,
            role="log" if path.name == "metrics.jsonl" or path.suffix == ".log" else "artifact",
        )
        for path, digest in zip(paths, digests, strict=True)
    ]
    return sorted(outputs, key=lambda output: output.path)


def seal(directory: Path, file_name: str, record: BaseModel) -> None:
    """Make the names of a directory's files, which are durable, so as well; then write its record."""
    for folder in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
        sync(folder)
    write_text(directory / file_name, sealed(record))


def make_directory(directory: Path) -> None:
    """Have a directory, and those above it, that a power cut does not take away."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text at once: readers see the old or the new, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file or directory on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_new(source: Path, target: Path) -> None:
    """Rename a directory to a place where nothing is; OSError where there is something."""
    if _renameat2(source, target, _RENAME_NOREPLACE):
        return
    if os.path.lexists(target):  # a plain rename takes the place of an empty directory without a word
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def exchange(first: Path, second: Path) -> bool:
    """Let two directories change places at once; False where the system or file system does not offer it."""
    return _renameat2(first, second, _RENAME_EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Rename with flags; False where the system or file system does not offer it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(target))


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current
