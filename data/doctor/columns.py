"""What is odd about the columns of records: some that nothing reads, numbers that are written as text."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from data.findings import NUMBER_AS_TEXT, UNUSED_COLUMN, Kind, cut, shown
from data.formats import FORMATS, Format, Record
from data.formats.values import NUMBER

_ALL_TEXT = re.compile(r"\.[ct]sv(\.gz|\.zst)?:")
"""In a place: the file's format has nothing but text."""


class ColumnCheck:
    """Looks at the columns of records.

    Args:
        labels: Columns that are read beside the row.
    """

    def __init__(self, labels: Collection[str] = ()) -> None:
        self._formats: dict[str, Format] = {each.name: each for each in FORMATS}
        self._seen: set[str] = set(labels)

    def __call__(self, record: Record, layout: str, origin: str) -> Iterator[tuple[Kind, str]]:
        """Columns that were not met before and that nothing reads, and numbers that are text.

        Nothing is known of the columns of an adapter.
        """
        known = self._formats.get(layout)
        if known is None:
            return
        if not known.facts:
            yield from self._unused(record, known)
        for column in known.numbers:
            value = record.get(column)
            if isinstance(value, str) and NUMBER.fullmatch(value) and not _ALL_TEXT.search(origin):
                yield NUMBER_AS_TEXT, f"{column}: {shown(value)}"

    def _unused(self, record: Record, known: Format) -> Iterator[tuple[Kind, str]]:
        for column in record.keys() - known.columns - known.optional - self._seen:
            self._seen.add(column)
            yield UNUSED_COLUMN, cut(repr(column))
