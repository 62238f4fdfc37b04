"""Digests: what makes two files, settings, sources or machines the same. All are sha256 in lower-case hex."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
"""The directory that holds the packages `pipeline`, `data`, `reward` and `stages`."""

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "numpy",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
)

_hashed: dict[Path, str] = {}
"""Modules as they were when this process last looked before it imported them."""

Item = TypeVar("Item")
Found = TypeVar("Found")


def file_sha256(path: Path) -> str:
    """Sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def on_all_cores(read: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """What a function that reads or hashes files finds for each item, in their order."""
    if len(items) < 2:
        return list(map(read, items))
    with meanwhile(read, items) as found:
        return found()


@contextmanager
def meanwhile(read: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[Callable[[], list[Found]]]:
    """Read or hash files while something else is done; what is yielded waits for all that was found, in order.

    Both let go of the interpreter, so that threads share the work between the cores. Whoever is interrupted does not
    wait for them, and neither does the end of the process: files are as large as disks.
    """
    results: list[Future[Found]] = [Future() for _ in items]
    left = iter(list(zip(results, items, strict=True)))  # threads take from it in turn

    def work() -> None:
        for result, item in left:
            try:
                result.set_result(read(item))
            except BaseException as error:  # it is the caller's
                result.set_exception(error)

    for _ in range(min(_cpus(), len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        yield lambda: [result.result() for result in results]
    finally:
        for _ in left:  # nothing more is begun
            pass


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no blanks. NaN and infinity are a `ValueError`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Sha256 of a JSON-able value's canonical text."""
    return hashlib.sha256(canonical(value).encode("utf-8")).hexdigest()


def content(files: Mapping[str, str]) -> str:
    """Digest of a set of files, given their relative path -> sha256; the order does not matter."""
    return digest(sorted(files.items()))


def sources(kind: str) -> str:
    """Digest of the modules that a stage of this kind computes with."""
    places = [f"stages/{kind}.py", "stages/core", "data", "reward"]
    if kind == "trl":  # which trainers compare, sample or count in groups
        places.append("pipeline/trainers.py")
    return modules(*places)


def modules(*places: str) -> str:
    """Digest of Python modules: of those that this process has imported as they were then, of others as they are.

    What is edited while a stage trains is not what it computes with; what it has yet to import is.

    Args:
        places: Modules and packages under `ROOT`; one that is not there holds none.
    """
    paths = [path for place in places for path in _paths(ROOT / place)]
    return content({_relative(path): _module_sha256(path) for path in paths})


def environment() -> dict[str, Any]:
    """What results may depend on besides configuration and data; imports no library."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "cpus": _cpus(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }


def _paths(place: Path) -> Iterable[Path]:
    return [place] if place.is_file() else place.rglob("*.py")


@functools.cache
def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _module_sha256(path: Path) -> str:
    name = _relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if name not in sys.modules or path not in _hashed:
        _hashed[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return _hashed[path]


@functools.cache
def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
