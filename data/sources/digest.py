"""What stands for the content of a source without its rows being read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType

from data.findings import shown
from data.sources import hub, paths
from data.sources.files import regular, unreadable
from pipeline.config import DataSource
from pipeline.errors import DataError


def fingerprint(source: DataSource) -> str:
    """The sha256 that stands for a data source's content.

    Of a file, its bytes; of several, their digests in order; of a part of the embedded world, the generator's code
    and arguments; of a Hub data set, the reference and the split.

    Raises:
        DataError: a file is missing, unreadable or not a regular file; the reference is malformed.
    """
    if source.scheme == "world":
        return _of_world(source)
    if source.scheme == "hub":
        return _of(*hub.reference(source), source.split)
    digests = [_of_file(path) for path in paths.files(source)]
    return digests[0] if len(digests) == 1 else _of(*digests)


def stamps(source: DataSource) -> list[tuple[str, int, int, int]]:
    """Path, inode, size and time of change of each file of a source, to see whether one changes; none for `hub:` and
    `world:` sources.

    Raises:
        DataError: a file is missing or not a regular file.
    """
    if source.scheme:
        return []
    found = [(path, regular(path).stat()) for path in paths.files(source)]
    return [(path, each.st_ino, each.st_size, each.st_mtime_ns) for path, each in found]


def world_part(source: DataSource) -> str:
    """The part of the embedded world that a source names.

    Raises:
        DataError: there is no such part.
    """
    from data import instruction_prompts, world, world_suites

    part = source.name.removeprefix("world:")
    parts = (*world.PARTS, instruction_prompts.PART, *world_suites.PARTS)
    if part not in parts:
        hint = f"one of {', '.join(parts)}"
        raise DataError(f"no part {shown(part)} of the embedded world", where=source.name, hint=hint)
    return part


def _of_world(source: DataSource) -> str:
    from data import instruction_prompts, world, world_suites

    part = world_part(source)
    if part == instruction_prompts.PART:
        rows = source.rows or instruction_prompts.DEFAULT_ROWS
        return _of(_code(instruction_prompts), part, rows, source.seed)
    if part in world_suites.PARTS:
        return _of(_code(world), _code(world_suites), part, source.rows, source.seed)
    return _of(_code(world), part, source.rows or world.DEFAULT_ROWS[part], source.seed)


def _code(module: ModuleType) -> str:
    assert module.__file__ is not None
    return Path(module.__file__).read_text(encoding="utf-8")


def _of_file(path: str) -> str:
    try:
        with regular(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def _of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
