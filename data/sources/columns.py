"""The columns of a source: renamed as `columns` says, and the same in all of its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data.findings import DUPLICATE_KEY, BadRow, cut, shown
from data.sources.record import Located, Record
from pipeline.errors import DataError


def refuse_wrong_names(first: Located, columns: Mapping[str, str]) -> None:
    """See that a mapping fits the first record of a file.

    Args:
        first: The record.
        columns: What formats call a column -> what the file calls it.

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


def refuse_mixture(firsts: Sequence[Located]) -> None:
    """See that the first records of all files have the same columns.

    Raises:
        DataError: two have not.
    """
    for other in firsts[1:]:
        differing = firsts[0].record.keys() ^ other.record.keys()
        if differing:
            what = f"the columns differ from those of {firsts[0].origin}: {listed(differing)} only in one of them"
            hint = "give files of one layout; make sources of their own of the others"
            raise DataError(what, where=other.origin, hint=hint)


def listed(names: Record | set[str]) -> str:
    """Names of columns as they may be printed."""
    shown_names = [f"`{cut(name)}`" for name in sorted(names)]
    return ", ".join(shown_names[:20]) + (f" and {len(shown_names) - 20} more" if len(shown_names) > 20 else "")


def _taken(record: Record, columns: Mapping[str, str]) -> str | None:
    """A new name that a column of the file has, which itself keeps its name."""
    olds = set(columns.values())
    return next((name for name, old in columns.items() if name in record and name not in olds and old in record), None)
