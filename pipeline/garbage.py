"""What a run directory holds that nothing refers to any more.

The roots are the manifests of the published stages. A replaced stage is kept as long as the chain of a published one
goes through it; a checkpoint as long as its stage has not been published from the same settings, inputs and data.
What another version of Baton wrote is kept, and all replaced stages as long as a published one is of another version.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import checkpoints, durable, store
from pipeline import manifest as manifests
from pipeline.errors import ArtifactError, OtherVersionError
from pipeline.manifest import Manifest
from pipeline.store import RunDirectory

_NAME = ".gone-"


@dataclass(frozen=True)
class Garbage:
    """A directory or file that nothing refers to."""

    path: Path
    why: str
    bytes: int


def find(run: RunDirectory) -> list[Garbage]:
    """Everything that nothing refers to; the caller holds the run.

    Raises:
        ArtifactError: A manifest cannot be relied on: what it refers to cannot be told.
    """
    roots = {name: _root(run.stage(name)) for name in run.published()}
    found = [
        *_because("replaced, and no published stage was made from it", _unreferenced(run, roots.values())),
        *_because("damaged", (path for path in _entries(run.quarantine) if not _is_of_another_version(path))),
        *_because("records of an attempt that did not finish", _entries(run.failed(""))),
        *(each for name in _names(run) for each in checkpoints.garbage(run.checkpoints(name), _key(roots.get(name)))),
        *_because("not removed to the end", run.root.glob(f"{_NAME}*")),
    ]
    return [Garbage(path, why, _size(path)) for path, why in found]


def delete(run: RunDirectory, found: Sequence[Garbage]) -> None:
    """Remove what was found; each at once, so that nothing is ever there in part under its name."""
    for each in found:
        gone = run.root / f"{_NAME}{uuid.uuid4().hex[:12]}"
        each.path.rename(gone)
        durable.sync(each.path.parent)
        if gone.is_dir() and not gone.is_symlink():
            shutil.rmtree(gone)
        else:
            gone.unlink()


def _root(stage: Path) -> Manifest | None:
    """A published stage's manifest; None where only another version can read it."""
    try:
        found = [str(damage) for damage in manifests.damages(stage, fast=True)]
    except OtherVersionError:
        return None
    if found:
        hint = "`baton run` on its run makes it again"
        raise ArtifactError(f"what it was made from cannot be told: {'; '.join(found)}", where=stage, hint=hint)
    return manifests.load(stage)


def _unreferenced(run: RunDirectory, roots: Collection[Manifest | None]) -> Iterator[Path]:
    """Replaced stages that no chain from a root goes through."""
    if None in roots:
        return iter(())
    shelf = store.archived(run)
    waiting = [record for root in roots if root for record in root.inputs.values()]
    kept: set[Path] = set()
    while waiting:
        place = shelf.get(waiting.pop().manifest_sha256 or "")
        if place is not None and place not in kept:
            kept.add(place)
            waiting += manifests.load(place).inputs.values()
    return (path for path in _entries(run.archive) if path not in kept and not _is_of_another_version(path))


def _is_of_another_version(stage: Path) -> bool:
    try:
        manifests.load(stage)
    except OtherVersionError:
        return True
    except ArtifactError:
        return False
    return False


def _names(run: RunDirectory) -> list[str]:
    return [path.name for path in _entries(run.checkpoints(""))]


def _key(published: Manifest | None) -> str | None:
    return published.key if published else None


def _because(why: str, paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    return ((path, why) for path in paths)


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _size(path: Path) -> int:
    files = manifests.walk(path) if path.is_dir() and not path.is_symlink() else [path]
    return sum(each.lstat().st_size for each in files)
