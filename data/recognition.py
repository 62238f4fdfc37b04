"""Which layout the files of a source are in.

The first record that a format fits decides, if it is among the first few: a bad first row does not stand for the
others. Files of one source agree in the columns that some format reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from data import adapters, sources
from data.findings import BadRow
from data.formats import FORMATS, Format, NoFormat, detect
from data.sources import Located
from data.sources.columns import listed
from pipeline.config import DataSource
from pipeline.errors import DataError

Numbered = tuple[int, Located | BadRow]
"""The number of a row in its source, counted from 1, and what was found there."""
READ = frozenset[str]().union(*(each.columns | each.optional for each in FORMATS)) - {"id"}
"""Columns that some format reads as a part of a row."""


def recognise(found: Iterator[Numbered], source: DataSource) -> tuple[Format, list[Numbered]]:
    """The layout of a source.

    Args:
        found: What the source holds, from its first record on; a few are taken from it.
        source: Names the format, or leaves it to the records.

    Returns:
        The layout, and what was taken; the last of it decided.

    Raises:
        DataError: none of the records has a layout, or one fits several.
        ConfigError: the adapter is not allowed.
    """
    taken: list[Numbered] = []
    refusal: NoFormat | None = None
    for number, each in islice(found, sources.LOOKED_AT):
        taken.append((number, each))
        if isinstance(each, BadRow):
            continue
        try:
            return _layout(each, source), taken
        except NoFormat as error:
            refusal = refusal or error
    assert refusal is not None  # the first was a record
    raise refusal


def refuse_mixture(source: DataSource) -> None:
    """See that all files of a source have the same of the columns that formats read, or that it renames.

    Raises:
        DataError: two have not.
        ConfigError: the adapter is not allowed.
    """
    if adapters.is_adapter(source.format):
        return
    first: Located | None = None
    for head in sources.heads(source):
        other = next((each for each in head if _has_layout(each, source)), head[0] if head else None)
        first = first or other
        if first is None or other is None:
            continue
        differing = (first.record.keys() ^ other.record.keys()) & (READ | source.columns.keys())
        if differing:
            what = f"the columns differ from those of {first.origin}: {listed(differing)} only in one of them"
            hint = "give files of one layout; make sources of their own of the others"
            raise DataError(what, where=other.origin, hint=hint)


def _layout(found: Located, source: DataSource) -> Format:
    if adapters.is_adapter(source.format):
        return adapters.find(source.format)
    return detect(found.record, source.format, found.origin)


def _has_layout(found: Located, source: DataSource) -> bool:
    try:
        _layout(found, source)
    except NoFormat:
        return False
    except DataError:
        return True  # it has several, which is for `recognise` to say
    return True
