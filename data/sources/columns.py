"""The columns of a source, renamed as `columns` says."""

from __future__ import annotations

from collections.abc import Mapping

from data.findings import DUPLICATE_KEY, BadRow, cut, shown
from data.sources.record import Located, Record
from pipeline.errors import DataError


def fits(record: Record, columns: Mapping[str, str]) -> bool:
    """Whether a record has all columns that a mapping renames, and none that has a new name already.

    Args:
        record: As the file has it.
        columns: What formats call a column -> what the file calls it.
    """
    return record.keys() >= set(columns.values()) and _taken(record, columns) is None


def refuse_wrong_names(first: Located, columns: Mapping[str, str]) -> None:
    """See that a mapping fits a record that stands for its file.

    Raises:
        DataError: the file has no such column, or another one has the new name.
    """
    for name, old in columns.items():
        if old not in first.record:
            what = f"no column {shown(old)}, which `columns` calls `{cut(name)}`"
            raise DataError(what, where=first.origin, hint=f"the columns are {listed(first.record)}")
    taken = _taken(first.record, columns)
    if taken:
        what = f"`columns` calls {shown(columns[taken])} `{cut(taken)}`, but there is such a column"
        raise DataError(what, where=first.origin, hint=f"rename that one, too: the columns are {listed(first.record)}")


def renamed(found: Located, columns: Mapping[str, str]) -> Located | BadRow:
    """A record with its columns called as formats call them."""
    taken = _taken(found.record, columns)
    if taken:
        what = f"both {shown(columns[taken])}, which `columns` calls `{cut(taken)}`, and a column of that name"
        return BadRow(DUPLICATE_KEY, what, where=found.origin)
    olds = set(columns.values())
    record = {name: value for name, value in found.record.items() if name not in olds}
    record.update({name: found.record[old] for name, old in columns.items() if old in found.record})
    return Located(found.origin, record)


def listed(names: Record | set[str]) -> str:
    """Names of columns as they may be printed, the first 20 of them."""
    shown_names = [f"`{cut(name)}`" for name in sorted(names)]
    return ", ".join(shown_names[:20]) + (f" and {len(shown_names) - 20} more" if len(shown_names) > 20 else "")


def _taken(record: Record, columns: Mapping[str, str]) -> str | None:
    """A new name that a column of the file has, which itself keeps its name."""
    olds = set(columns.values())
    return next((name for name, old in columns.items() if name in record and name not in olds and old in record), None)
