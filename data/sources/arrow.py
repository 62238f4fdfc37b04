"""Directories written by `save_to_disk` of `datasets`: Arrow files, mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.findings import cut, shown
from data.sources.batches import BATCH_ROWS, located, refuse_columns
from data.sources.files import regular, unreadable
from data.sources.record import Records, place
from pipeline.errors import DataError

if TYPE_CHECKING:
    import pyarrow

STATE = "state.json"
SPLITS = "dataset_dict.json"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def is_directory(path: str) -> bool:
    """Whether a path is a directory that `datasets` wrote."""
    try:
        return any(Path(path, name).is_file() for name in (STATE, SPLITS))
    except OSError:
        return False


def files(path: str, split: str) -> list[str]:
    """The data files of a split, in order.

    Args:
        path: The directory.
        split: Which of its parts, if it has several.

    Raises:
        DataError: there is no such split, or a file that describes the directory is broken.
    """
    directory = Path(path)
    if (directory / SPLITS).is_file():
        known = _described(directory / SPLITS, "splits")
        if split not in known:
            names = ", ".join(cut(name) for name in known) or "none"
            raise DataError(f"no split {shown(split)}", where=place(path), hint=f"set `split`; there are: {names}")
        directory /= split
    entries = _described(directory / STATE, "_data_files")
    if not entries:
        raise DataError("holds no row", where=place(str(directory)), hint="give a directory that holds data")
    return [str(directory / _file_name(entry, directory)) for entry in entries]


def read(path: str, max_chars: int) -> Records:
    """The records of one Arrow file.

    Raises:
        DataError: the file cannot be read or is damaged, or two columns have one name.
    """
    import pyarrow

    name = place(path)
    _refuse_cut(path, name)
    try:
        with pyarrow.memory_map(path) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
            refuse_columns(stream.schema.names, name)
            yield from located(_batches(stream), name, max_chars)
    except (pyarrow.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        what = f"not an intact Arrow file: {cut(str(error))}"
        raise DataError(what, where=name, hint="write or download the directory again") from error


def _batches(stream: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    for batch in stream:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def _refuse_cut(path: str, name: str) -> None:
    """An Arrow stream that ends between two batches would be read as if it were whole."""
    file = regular(path)
    try:
        with file.open("rb") as stream:
            stream.seek(max(file.stat().st_size - len(END_OF_STREAM), 0))
            end = stream.read()
    except OSError as error:
        raise unreadable(path, error) from error
    if end != END_OF_STREAM:
        hint = "write or download the directory again"
        raise DataError("not an intact Arrow file: cut short", where=name, hint=hint)


def _described(path: Path, key: str) -> list[Any]:
    """A list in one of the JSON files that describe the directory."""
    try:
        found = json.loads(regular(str(path)).read_text(encoding="utf-8"))[key]
    except OSError as error:
        raise unreadable(str(path), error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _not_described(path, key) from error
    if not isinstance(found, list):
        raise _not_described(path, key)
    return found


def _not_described(path: Path, key: str) -> DataError:
    hint = "write the directory again with `save_to_disk`"
    return DataError(f"holds no list `{key}`", where=place(str(path)), hint=hint)


def _file_name(entry: Any, directory: Path) -> str:
    """The name of a data file, which may not lead out of the directory."""
    name = entry.get("filename") if isinstance(entry, dict) else None
    if not isinstance(name, str) or Path(name).name != name:
        what = f"names {shown(name)} as a data file (expected the name of a file beside it)"
        raise DataError(what, where=place(str(directory / STATE)), hint="write the directory again")
    return name
