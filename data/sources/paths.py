"""The files that a source names."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from data.sources import arrow
from data.sources.files import unreadable
from data.sources.record import place
from pipeline.config import DataSource
from pipeline.errors import DataError


def files(source: DataSource) -> list[str]:
    """Paths of the data files, in the order of the source; a glob's in alphabetical order.

    Raises:
        DataError: a glob matches nothing, a file is named twice, or a split is asked for that cannot be there.
    """
    named = [source.source] if isinstance(source.source, str) else source.source
    found = [path for name in named for path in _files(name, source.split)]
    _refuse_twice(found)
    return found


def _files(name: str, split: str) -> list[str]:
    if arrow.is_directory(name):
        return arrow.files(name, split)
    if split != "train":
        hint = "leave out `split`: only `hub:` sources and directories of `datasets` have several"
        raise DataError(f"files have no split `{place(split)}`", where=place(name), hint=hint)
    # A path can hold the letters of a glob and still be meant as it stands.
    if os.path.lexists(name) or not glob.has_magic(name):
        return [name]
    matches = _matches(name)
    if not matches:
        raise DataError("no file matches", where=place(name), hint="paths are relative to the working directory")
    return matches


def _matches(pattern: str) -> list[str]:
    """What a glob matches, directories left out. `Path.glob` would match hidden files, too."""
    try:
        found = glob.glob(pattern, recursive=True)  # noqa: PTH207
        return sorted(match for match in found if not Path(match).is_dir())
    except (OSError, ValueError) as error:
        raise unreadable(pattern, error) from error


def _refuse_twice(paths: list[str]) -> None:
    seen: set[Path] = set()
    for path in map(Path, paths):
        if path.absolute() in seen:
            hint = "name it once; a mixture's `epochs` repeats a source"
            raise DataError("is named twice", where=place(str(path)), hint=hint)
        seen.add(path.absolute())
