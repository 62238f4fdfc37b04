"""The rows of an evaluation suite, each known by its id, its category and its group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from data import encoding
from data.findings import SURROGATE, BadRow, shown
from data.formats.values import text
from data.intake import Intake, Placed
from data.naming import require_plain
from data.schema import Row
from pipeline.errors import DataError
from pipeline.fingerprint import digest
from pipeline.suites import InvarianceSuite, Suite

CATEGORIES = ("category", "subset")
"""Columns that name a row's category; the first that there is counts. RewardBench calls it `subset`."""


@dataclass(frozen=True)
class Item:
    """One row of a suite.

    Attributes:
        id: The column `id`, or else a digest of the row.
        category: Of one of `CATEGORIES`; empty without one.
        group: The column `group`; empty without one.
    """

    row: Row
    id: str
    category: str = ""
    group: str = ""


@dataclass(frozen=True)
class Items:
    """The rows that a suite asks, and how they were read, as `DataCard` has it."""

    chosen: Sequence[Item]
    record: Mapping[str, Any]


def read(suite: Suite) -> Items:
    """All held-out rows of a suite; the same row twice is one observation.

    Raises:
        DataError: The source cannot be read, rows are malformed or of another kind, none is held out, two have the same
            id, or one lacks the group that the method needs.
    """
    intake = Intake(suite, suite.KINDS, labels=(*CATEGORIES, "group"))
    found: dict[str, Item] = {}
    seen: set[str] = set()
    for placed in intake:
        if not placed.held_out:
            continue
        try:
            labels, content = _labels(placed), _content(placed.row)
        except BadRow as problem:
            intake.refuse(problem)
            continue
        if content in seen:
            continue
        seen.add(content)
        item = _item(placed.row, labels, content)
        if item.id in found:
            what = f"id: {shown(item.id)} stands before, at {found[item.id].row.origin}"
            raise DataError(what, where=placed.row.origin, hint="give every row an id of its own, or none")
        if isinstance(suite, InvarianceSuite) and not item.group:
            hint = "name the rows that belong together alike"
            raise DataError("no `group`, which method=invariance needs", where=placed.row.origin, hint=hint)
        found[item.id] = item
    if not found:
        raise DataError("no held-out rows", where=suite.name, hint="raise its held_out or give more rows")
    return Items(list(found.values()), encoding.record(intake))


def _labels(placed: Placed) -> dict[str, str]:
    """What stands beside the row, by column."""
    record = placed.record or {}
    given = {name: record[name] for name in ("id", *CATEGORIES, "group") if record.get(name) is not None}
    return {name: text(str(value), name, placed.row.origin) for name, value in given.items()}


def _content(row: Row) -> str:
    """Of all that the row says, whatever its place and its id."""
    said = asdict(replace(row, origin=""))
    said.get("facts", {}).pop("id", None)
    try:
        return digest(said)
    except UnicodeEncodeError as error:
        raise BadRow(SURROGATE, where=row.origin) from error


def _item(row: Row, labels: Mapping[str, str], content: str) -> Item:
    category = next((labels[name] for name in CATEGORIES if name in labels), "")
    require_plain(category, "category", row.origin)
    return Item(row, labels.get("id", content[:12]), category, labels.get("group", ""))
