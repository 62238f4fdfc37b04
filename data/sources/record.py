"""What a reader hands on: a record and its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data.findings import BadRow
from pipeline.terminal import printable

Record = Mapping[str, Any]
"""Column -> value, as the file has them."""


@dataclass(frozen=True, slots=True)
class Located:
    """A record of a data source and its place."""

    origin: str
    """`file:line`, where line formats have the record begin, or `file:row N`; both counted from 1."""
    record: Record


Records = Iterator[Located | BadRow]
"""Records in the order of the source; one that cannot be read takes its place as what is wrong with it."""


def place(path: str) -> str:
    """A path as origins and messages have it: on one line, whatever its name holds."""
    return printable(path, None)
