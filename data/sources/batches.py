"""Records from Arrow batches, as Parquet files, directories of `datasets` and the Hub yield them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data.findings import NOT_UTF8, WRONG_TYPE, BadRow, cut, shown
from data.sources.lines import too_large
from data.sources.record import Located, Records
from data.sources.strict_json import undecodable
from pipeline.errors import DataError

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1024


def located(batches: Iterator[pyarrow.RecordBatch], name: str, max_chars: int) -> Records:
    """The records of all batches, numbered from 1.

    Args:
        batches: Batches of one table.
        name: What the table is called in origins.
        max_chars: The longest record.

    Raises:
        DataError: a batch is damaged.
    """
    number = 0
    for batch in batches:
        for found in _rows(batch):
            number += 1
            yield _checked(found, f"{name}:row {number}", max_chars)


def refuse_columns(names: Sequence[str], where: str) -> None:
    """See that no column has the name of another, which a record could not hold.

    Raises:
        DataError: one has.
    """
    twice = {column for column in names if names.count(column) > 1}
    if twice:
        raise DataError(f"two columns are called {shown(min(twice))}", where=where, hint="rename one of them")


def _rows(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | pyarrow.RecordBatch]:
    """Every row; those that cannot be read as batches of one row."""
    import pyarrow

    try:
        batch.validate(full=True)
        return list(batch.to_pylist())
    except (pyarrow.ArrowException, ValueError, OverflowError):
        if batch.num_rows == 1:
            return [batch]
        half = batch.num_rows // 2
        return _rows(batch.slice(0, half)) + _rows(batch.slice(half))


def _checked(row: dict[str, Any] | pyarrow.RecordBatch, origin: str, max_chars: int) -> Located | BadRow:
    if not isinstance(row, dict):
        return _unreadable(row, origin)
    length = _length(row)
    if length > max_chars:
        return too_large(length, max_chars, origin)
    return Located(origin, row)


def _unreadable(row: pyarrow.RecordBatch, origin: str) -> BadRow:
    """Which column of a row cannot be read, and why."""
    import pyarrow

    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise _damaged(f"{cut(name)}: {cut(str(error))}", origin) from error
            return BadRow(NOT_UTF8, f"{cut(name)}: {_wrong_byte(column)}", where=origin)
        try:
            column.to_pylist()
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            return BadRow(WRONG_TYPE, f"{cut(name)}: {cut(str(error))}", where=origin)
    raise _damaged("its columns do not fit together", origin)


def _wrong_byte(column: pyarrow.Array) -> str:
    """What is not UTF-8 in a column. Text inside other values is not looked at: after one fault is found in a nested
    column, its other parts have not been checked, and could point outside the memory that is theirs."""
    import pyarrow

    if column.type == pyarrow.string():
        content = column.view(pyarrow.binary())
        content.validate(full=True)
        try:
            content[0].as_py().decode("utf-8")
        except UnicodeDecodeError as error:
            return undecodable(error)
    return "not UTF-8"


def _damaged(what: str, origin: str) -> DataError:
    return DataError(f"damaged: {what}", where=origin, hint="write or download the file again")


def _length(value: object) -> int:
    """The number of characters in a value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_length, value))
    return 0
