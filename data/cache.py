"""Token caches: what was made of data once is read again, if and only if all that it was made of is the same.

    CACHE/tokens/KEY/             files and `index.json`: their sizes and sha256, and the record of how they were made
    CACHE/tokens/.work-ID/        being written
    CACHE/tokens/.damaged/KEY-ID/ found damaged, and kept
    CACHE/tokens/.lock            held while entries appear or are set aside, never while one is made
    CACHE/models/                 the same for models that are converted from other files (`data/gguf.py`)

CACHE is `$BATON_CACHE`, or `baton` in `$XDG_CACHE_HOME` or `~/.cache`. An entry is written and synced elsewhere, its
index last, and renamed; so it is there whole or not at all, and of two processes that make the same one, the second
takes the first's. Every file is hashed again whenever an entry is opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import durable, fingerprint, manifest
from pipeline.errors import ArtifactError, StorageError
from pipeline.terminal import printable

INDEX = "index.json"
TOKENS, MODELS = "tokens", "models"
"""Directories of the cache: tokens of data, and models that were converted from other files."""
LIBRARIES = ("datasets", "datasketch", "jinja2", "numpy", "pyarrow", "tokenizers", "transformers")
"""Libraries that rows and tokens may depend on."""
Make = Callable[[Path], Mapping[str, Any]]
"""Fills an empty directory, and returns what is worth knowing about it as JSON."""

_REFUSALS = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.ENOLCK,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EROFS,
    }
)


@dataclass(frozen=True)
class Entry:
    """A cache entry that was checked."""

    directory: Path
    record: dict[str, Any]
    """What its maker returned."""


def root() -> Path:
    """The cache directory.

    Raises:
        StorageError: No variable names one, and the user has no home directory.
    """
    named = os.environ.get("BATON_CACHE")
    if named:
        return Path(named).absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():  # the standard says to ignore a relative path
        return shared / "baton"
    try:
        return Path("~/.cache").expanduser() / "baton"
    except RuntimeError as error:
        raise StorageError("no home directory for the cache", hint="set BATON_CACHE to a directory") from error


def key(*, data: str, tokenizer: str, template: str, options: Mapping[str, Any]) -> str:
    """The sha256 that stands for everything tokens are made of; any change of it gives another key.

    Args:
        data: Digest of the data source's content, settings and adapter.
        tokenizer: Digest of the tokenizer.
        template: Digest of the chat template; empty for text.
        options: What else the stage asks for: the kind of rows and trees, the longest length.
    """
    parts = {
        "data": data,
        "tokenizer": tokenizer,
        "template": template,
        "options": options,
        "code": fingerprint.modules("data"),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(),
    }
    return fingerprint.digest(parts)


def place(key: str, shelf: str = TOKENS) -> Path:
    """Where the entry of a key is, or will be."""
    return root() / shelf / key


def cached(key: str, make: Make, say: Callable[[str], None], shelf: str = TOKENS) -> Entry:
    """The entry of a key, made if it is not there or is damaged.

    Args:
        key: A digest of all that the entry is made of, for tokens as given by `key`.
        make: Called with an empty directory when the entry has to be made.
        say: Prints one line for the user.
        shelf: The kind of entry: `TOKENS` or `MODELS`.

    Raises:
        StorageError: The cache directory cannot be written.
    """
    directory = place(key, shelf)
    with _refusals(directory):
        entry = _intact(directory, say)
        if entry is not None:
            return entry
        _create(directory.parent)
        with _work(directory.parent) as work:
            _seal(work, key, make(work))
            return _publish(work, directory, say)


def _create(tokens: Path) -> None:
    try:
        tokens.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(error, tokens) from error


def _intact(place: Path, say: Callable[[str], None]) -> Entry | None:
    """The entry if it is there and as it was written; a damaged one is set aside."""
    if not place.exists():
        return None
    with contextlib.suppress(ArtifactError, FileNotFoundError):
        return _opened(place)
    with _locked(place.parent):
        return _opened_or_set_aside(place, say)


def _publish(work: Path, place: Path, say: Callable[[str], None]) -> Entry:
    """Give the finished directory its name, unless another process was faster."""
    with _locked(place.parent):
        found = _opened_or_set_aside(place, say) if place.exists() else None
        if found is not None:
            return found
        work.rename(place)
        durable.sync(place.parent)
    return _opened(place)


def _opened_or_set_aside(place: Path, say: Callable[[str], None]) -> Entry | None:
    """Only under the lock, so that nobody's new entry is taken for the damaged one."""
    try:
        return _opened(place)
    except FileNotFoundError:
        return None
    except ArtifactError as damage:
        aside = place.parent / ".damaged" / f"{place.name}-{uuid.uuid4().hex[:8]}"
        aside.parent.mkdir(exist_ok=True)
        place.rename(aside)
        what = printable(damage.what)
        say(f"cache entry {place.name[:12]} is damaged ({what}): it is made again; the damaged one is now {aside}")
        return None


def _opened(place: Path) -> Entry:
    """An entry whose every file was hashed.

    Raises:
        ArtifactError: It is not as it was written.
        FileNotFoundError: There is no entry.
    """
    place.lstat()
    index = _index(place)
    if index["key"] != place.name:
        raise ArtifactError("it belongs to another key", where=place)
    recorded, found = index["files"], _files(place)
    changed = [name for name in sorted(recorded.keys() | found.keys()) if recorded.get(name) != found.get(name)]
    if changed:
        raise ArtifactError(f"{', '.join(changed)} changed since written", where=place)
    return Entry(place, index["record"])


def _index(place: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((place / INDEX).read_text(encoding="utf-8"))
        intact = index.pop("sha256") == fingerprint.digest(index)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, OSError) as error:
        raise ArtifactError(f"{INDEX} cannot be read", where=place) from error
    if not intact:
        raise ArtifactError(f"{INDEX} changed since written", where=place)
    return index


def _seal(work: Path, key: str, record: Mapping[str, Any]) -> None:
    """Make a filled directory durable and write its index."""
    for path in manifest.walk(work):
        durable.sync(path)
    index = {"key": key, "files": _files(work), "record": dict(record)}
    durable.write_text(work / INDEX, json.dumps({**index, "sha256": fingerprint.digest(index)}, indent=2) + "\n")
    for folder in (path for path in work.rglob("*") if path.is_dir()):
        durable.sync(folder)


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file but the index."""
    found = {path.relative_to(directory).as_posix(): path for path in manifest.walk(directory)}
    return {name: _description(path) for name, path in sorted(found.items()) if name != INDEX}


def _description(path: Path) -> dict[str, Any]:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path.name} is not a regular file", where=path)
    return {"bytes": status.st_size, "sha256": fingerprint.file_sha256(path)}


@contextlib.contextmanager
def _work(tokens: Path) -> Iterator[Path]:
    """An empty directory to write in; what processes left that died while writing is cleared away."""
    work = tokens / f".work-{uuid.uuid4().hex}"
    with contextlib.ExitStack() as held:
        with _locked(tokens):
            for orphan in tokens.glob(".work-*"):
                _remove_if_dead(orphan)
            work.mkdir()
            held.enter_context(_flock(work))
        held.callback(shutil.rmtree, work, ignore_errors=True)
        yield work


def _remove_if_dead(work: Path) -> None:
    """Whoever writes holds a lock, which the kernel drops with the process."""
    with contextlib.suppress(BlockingIOError, FileNotFoundError), _flock(work, fcntl.LOCK_NB):
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _locked(tokens: Path) -> Iterator[None]:
    path = tokens / ".lock"
    with contextlib.suppress(FileExistsError):
        path.touch(exist_ok=False)
    with _flock(path):
        yield


@contextlib.contextmanager
def _flock(path: Path, options: int = 0) -> Iterator[None]:
    """Hold a file or directory alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | options)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _refusals(place: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into `StorageError`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise _refusal(error, place) from error


def _refusal(error: OSError, place: Path) -> StorageError:
    return StorageError(
        f"the cache cannot be written: {error.strerror}",
        where=error.filename or place,
        hint="set BATON_CACHE to a directory with free space that you may write to",
    )


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


__all__ = ["MODELS", "TOKENS", "Entry", "cached", "key", "place", "root"]
