"""Which of a record's columns a user may have to rename, so that a format reads them."""

from __future__ import annotations

from collections.abc import Iterable

from data.findings import shown
from data.formats.layout import Format, Record

MEANT = {
    "question": "prompt",
    "query": "prompt",
    "input": "prompt",
    "response": "completion",
    "output": "completion",
    "completions": "responses",
}
"""Other names of columns, for suggestions."""


def suggestion(record: Record, formats: Iterable[Format]) -> str:
    """The setting that gives a record the columns of one of these formats, of which it lacks some; the format that
    reads most of its columns. Empty if there is none."""
    found: dict[str, str] = {}
    for each in sorted(formats, key=lambda each: len(each.columns)):
        renamed = _renamed(record, each)
        if renamed and each.columns <= record.keys() | renamed.keys():
            found = renamed
    if not found:
        return ""
    setting = ", ".join(f"{name}: {old if old.isidentifier() else shown(old)}" for name, old in found.items())
    capitals = any(old != old.lower() for old in found.values())
    return f"say `columns: {{{setting}}}`" + (" (names are case-sensitive)" if capitals else "")


def _renamed(record: Record, layout: Format) -> dict[str, str]:
    """What a format calls a column that is not there -> the column that may be meant."""
    free = sorted(name for name in record if isinstance(name, str) and name not in layout.columns)
    meanings = {old: {plain, MEANT.get(plain, plain)} for old in free for plain in (old.strip().lower(),)}
    found = {name: [old for old in free if name in meanings[old]] for name in sorted(layout.columns - record.keys())}
    return {name: olds[0] for name, olds in found.items() if olds}
