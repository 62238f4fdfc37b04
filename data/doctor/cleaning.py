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
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from data.doctor.diagnosis import Drop
from data.read import Reading
from pipeline.errors import DataError, StorageError

Write = Callable[[Mapping[str, Any]], tuple[str, ...]]
"""Writes an object as a line; returns the names that JSON cannot hold the values of, which were left out."""


@dataclass(frozen=True)
class Cleaned:
    """Where the rows went."""

    path: Path
    """The rows that stay, as JSONL in the file's own columns."""
    dropped_path: Path
    """For each row that was left out: where it was, the reason, and particulars."""
    kept: int
    dropped: int
    columns_left_out: tuple[str, ...] = ()
    """Columns that hold what JSON cannot, as bytes; in the order in which they were met."""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "path": str(self.path),
            "dropped_path": str(self.dropped_path),
            "kept": self.kept,
            "dropped": self.dropped,
            "columns_left_out": list(self.columns_left_out),
        }


def dropped_path(destination: Path) -> Path:
    """Where the list of what was left out goes."""
    return destination.with_name(destination.name + ".dropped.jsonl")


def write_cleaned(
    readings: Iterable[Reading], drops: Mapping[int, Drop], destination: Path, columns: Mapping[str, str] | None = None
) -> Cleaned:
    """Write the rows that can stay, and a list of the others.

    Each file appears whole or not at all, the list before the rows. Columns that JSON cannot hold are left out, never
    the row.

    Args:
        readings: The rows of the source, read again.
        drops: `Diagnosis.drops` of the same source.
        destination: The file to write, which must not exist.
        columns: What formats call a column -> what the file calls it, as in the source's settings.

    Raises:
        StorageError: a file exists already, or cannot be written.
        DataError: the source is generated, so that there are no records to write.
    """
    kept = dropped = 0
    left_out: dict[str, None] = {}
    with _new_file(destination) as write_kept, _new_file(dropped_path(destination)) as write_dropped:
        for reading in readings:
            reason = _reason(reading, drops)
            if reason is None:
                left_out |= dict.fromkeys(write_kept(_original(reading, columns or {})))
                kept += 1
            else:
                write_dropped({"where": reading.origin, **reason})
                dropped += 1
    return Cleaned(destination, dropped_path(destination), kept, dropped, tuple(left_out))


def _reason(reading: Reading, drops: Mapping[int, Drop]) -> dict[str, str] | None:
    """Why a row is left out; None when it stays."""
    if reading.problem is not None:
        return {"reason": reading.problem.kind.name, "what": reading.problem.what}
    drop = drops.get(reading.number)
    return None if drop is None else {"reason": drop.kind.name, "what": drop.what}


def _original(reading: Reading, columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with its columns called as the file calls them."""
    if reading.record is None:
        raise DataError("holds no records", where=reading.origin, hint="generated rows need no cleaning")
    return {columns.get(name, name): value for name, value in reading.record.items()}


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


def _write_line(stream: IO[str], record: Mapping[str, Any]) -> tuple[str, ...]:
    left_out: tuple[str, ...] = ()
    try:
        line = _line(record)
    except TypeError:
        left_out = tuple(name for name, value in record.items() if not _fits(value))
        line = _line({name: value for name, value in record.items() if name not in left_out})
    stream.write(line + "\n")
    return left_out


def _fits(value: Any) -> bool:
    """Whether JSON can hold a value."""
    try:
        _line(value)
    except TypeError:
        return False
    return True


def _line(value: Any) -> str:
    """A value as JSON.

    Raises:
        TypeError: JSON cannot hold it.
    """
    try:
        line = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        line = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=_plain)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        # Half a character in a column that nothing reads: kept as the escape that it was.
        line = json.dumps(json.loads(line))
    return line


def _finite(value: Any) -> Any:
    """The value with null for what is not a number: data frames write so what is missing."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _plain(value: object) -> str | float:
    """Dates and times of Parquet as text; its decimals as numbers, or as text where a number would lose digits."""
    if isinstance(value, Decimal):
        number = float(value)
        return number if Decimal(repr(number)) == value else str(value)
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise TypeError(f"{type(value).__name__}: JSON has no such values")
