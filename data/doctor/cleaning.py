"""Writes a data source without the rows that the doctor would leave out.

What is written has none of the kinds of findings for which rows were left out: malformed rows, rows without anything
to learn, duplicates, contradictions, cycles, and prompts on both sides. Runs of words on both sides stay, because only
a person can tell copies from a common pattern.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data.doctor.diagnosis import Drop
from data.findings import WRONG_TYPE, BadRow
from data.read import Reading
from pipeline.errors import DataError, StorageError

Write = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Cleaned:
    """Where the rows went."""

    path: Path
    """The rows that stay, as JSONL in the columns in which they were read."""
    dropped_path: Path
    """For each row that was left out: where it was, the reason, and particulars."""
    kept: int
    dropped: int


def dropped_path(destination: Path) -> Path:
    """Where the list of what was left out goes."""
    return destination.with_name(destination.name + ".dropped.jsonl")


def write_cleaned(readings: Iterable[Reading], drops: Mapping[int, Drop], destination: Path) -> Cleaned:
    """Write the rows that can stay, and a list of the others.

    Each file appears whole or not at all, the list before the rows.

    Args:
        readings: The rows of the source, read again.
        drops: `Diagnosis.drops` of the same source.
        destination: The file to write, which must not exist.

    Raises:
        StorageError: a file exists already, or cannot be written.
        DataError: the source is generated, so that there are no records to write.
    """
    kept = dropped = 0
    with _new_file(destination) as write_kept, _new_file(dropped_path(destination)) as write_dropped:
        for reading in readings:
            reason = _reason(reading, drops) or _written(reading, write_kept)
            if reason is None:
                kept += 1
            else:
                write_dropped({"where": reading.origin, **reason})
                dropped += 1
    return Cleaned(destination, dropped_path(destination), kept, dropped)


def _reason(reading: Reading, drops: Mapping[int, Drop]) -> dict[str, str] | None:
    """Why a row is left out; None when it stays."""
    if reading.problem is not None:
        return {"reason": reading.problem.kind.name, "what": reading.problem.what}
    drop = drops.get(reading.number)
    return None if drop is None else {"reason": drop.kind.name, "what": drop.what}


def _written(reading: Reading, write: Write) -> dict[str, str] | None:
    """Write a row; returns why it cannot be written."""
    if reading.record is None:
        raise DataError("holds no records", where=reading.origin, hint="generated rows need no cleaning")
    try:
        write(reading.record)
    except BadRow as error:
        return {"reason": error.kind.name, "what": error.what}
    return None


@contextmanager
def _new_file(path: Path) -> Iterator[Write]:
    """A file of JSON lines that gets its name when it is complete and on the disk."""
    _refuse_existing(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as stream:
            yield lambda value: _write_line(stream, value)
            stream.flush()
            os.fsync(stream.fileno())
        _refuse_existing(path)
        temporary.rename(path)
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=path, hint="give another file") from error
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise StorageError("exists already", where=path, hint="give the name of a new file")


def _write_line(stream: IO[str], value: Mapping[str, Any]) -> None:
    try:
        line = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        line = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=_plain)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        # Half a character in a column that nothing reads: kept as the escape that it was.
        line = json.dumps(json.loads(line))
    stream.write(line + "\n")


def _finite(value: Any) -> Any:
    """The value with null for what is not a number: data frames write so what is missing."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _plain(value: object) -> str:
    """Dates and times of Parquet as text."""
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise BadRow(WRONG_TYPE, f"{type(value).__name__}: JSON has no such values", where="")
