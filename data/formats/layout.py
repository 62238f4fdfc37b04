"""What a format is: the columns it needs, how it is told apart, and how a record becomes a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from data.findings import MISSING_COLUMN, MIXED_LAYOUT, BadRow, cut, shown
from data.schema import Row, RowKind

Record = Mapping[str, Any]


def always(record: Record) -> bool:
    """The columns alone decide."""
    return True


@dataclass(frozen=True)
class Format:
    """One layout of a record."""

    name: str
    kind: RowKind | None
    """The kind of its rows; None for an adapter, whose rows tell."""
    columns: frozenset[str]
    """Columns that must be there."""
    read: Callable[[Record, str], Row]
    """A record that has the columns, and its origin -> row; raises `BadRow`."""
    fits: Callable[[Record], bool] = always
    """Whether a record with these columns looks like this format and no other."""
    optional: frozenset[str] = frozenset({"id"})
    """Other columns that mean something."""
    numbers: frozenset[str] = frozenset()
    """Columns that hold numbers; there, text that is a number is one, because CSV has nothing else."""
    facts: bool = False
    """Whether all other columns are kept as facts for a judge."""
    texts: frozenset[str] = frozenset()
    """Columns that hold text in every record, as in the first one."""
    lists: frozenset[str] = frozenset()
    """Columns that hold a list in every record, as in the first one."""

    def like(self, first: Record) -> Format:
        """This format for a file that begins with a record: what is text there is text in every record."""
        texts = frozenset(name for name in self.columns if isinstance(first[name], str))
        lists = frozenset(name for name in self.columns if isinstance(first[name], list | tuple))
        return replace(self, texts=texts, lists=lists)

    def parse(self, record: Record, origin: str) -> Row:
        """The row of a record.

        Raises:
            BadRow: the record breaks the format, or nothing can be learnt from it.
        """
        missing = sorted(self.columns - record.keys())
        if missing:
            columns = cut(", ".join(map(str, record)))
            raise BadRow(MISSING_COLUMN, f"no column `{missing[0]}` among {columns}", where=origin)
        self._refuse_other_layout(record, origin)
        return self.read(record, origin)

    def _refuse_other_layout(self, record: Record, origin: str) -> None:
        for name in sorted(self.texts | self.lists):
            value, was_text = record[name], name in self.texts
            if isinstance(value, list | tuple) if was_text else isinstance(value, str):
                here, before = ("a list", "text") if was_text else ("text", "a list")
                what = f"{name}: {shown(value)} ({here}; {before} in other rows)"
                raise BadRow(MIXED_LAYOUT, what, where=origin)
