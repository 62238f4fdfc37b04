"""Which format a file is in: decided by its first record, and refused when that leaves a choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from data.findings import cut, shown
from data.formats.layout import Format, Record
from data.formats.preferences import PAIR, PREFERENCES
from data.formats.singles import SINGLES
from data.schema import RowKind
from pipeline.errors import DataError

FORMATS: tuple[Format, ...] = SINGLES + PREFERENCES
"""Every format, in the order in which the documentation lists them."""


def detect(record: Record, wanted: str, origin: str) -> Format:
    """The one format that a file is in.

    Args:
        record: The first record of the file.
        wanted: `auto`, a kind of row, or a format's name; limits the candidates.
        origin: Where the record is, for the error.

    Raises:
        DataError: no format fits, or several do.
    """
    allowed = [each for each in FORMATS if wanted in ("auto", each.name, each.kind)]
    if not allowed:
        names = ", ".join(dict.fromkeys(["auto", *get_args(RowKind), *(each.name for each in FORMATS)]))
        raise DataError(f"no format {shown(wanted)}", where=origin, hint=f"one of {names}, or module:function")
    complete = [each for each in allowed if each.columns <= record.keys()]
    fitting = [each for each in complete if each.fits(record)]
    if len(fitting) == 1:
        return fitting[0].like(record)
    if fitting:
        raise _several(record, fitting, origin)
    if any(each.columns >= PAIR for each in allowed):
        _refuse_half_a_pair(record, origin)
    if complete:
        raise _other_content(record, complete, origin)
    raise _other_columns(record, wanted, origin)


def _refuse_half_a_pair(record: Record, origin: str) -> None:
    """The format of a pair whose other half is missing is no other format, whatever its columns."""
    there, absent = (sorted(part) for part in (PAIR & record.keys(), PAIR - record.keys()))
    if there and absent:
        what = f"no column `{absent[0]}` beside `{there[0]}` among the columns {_columns(record)}"
        raise DataError(what, where=origin, hint="give both, or rename a column with `columns: {ours: yours}`")


def _several(record: Record, fitting: Sequence[Format], origin: str) -> DataError:
    names = ", ".join(f"`{each.name}` ({each.kind})" for each in fitting)
    # The shortest word that leaves one of them.
    kinds = Counter(each.kind for each in fitting)
    first = fitting[0].kind if kinds[fitting[0].kind] == 1 else fitting[0].name
    return DataError(
        f"columns {_columns(record)} fit several formats: {names}",
        where=origin,
        hint=f"name one in the data source, for example `format: {first}`",
    )


def _other_content(record: Record, candidates: Sequence[Format], origin: str) -> DataError:
    columns = sorted(frozenset[str]().union(*(each.columns for each in candidates)))
    values = ", ".join(f"{column}: {shown(record[column])}" for column in columns)
    names = " or ".join(f"`{each.name}`" for each in candidates)
    return DataError(
        f"{values} does not look like {names} among the columns {_columns(record)}",
        where=origin,
        hint=_remedy(record, candidates),
    )


def _remedy(record: Record, candidates: Sequence[Format]) -> str:
    if "label" in record and any("completion" in each.columns for each in candidates):
        return "rated responses have a `label` of true or false: leave out `format`, or say `format: rated`"
    return (
        "dialogues are lists of {role, content} or text of `\\n\\nHuman:` and `\\n\\nAssistant:` turns, "
        "and plain responses need a column `prompt`"
    )


def _other_columns(record: Record, wanted: str, origin: str) -> DataError:
    what = "no format" if wanted == "auto" else f"no format of `{wanted}`"
    layouts = [each for each in FORMATS if wanted in ("auto", each.name, each.kind)]
    shapes = "; ".join(f"{each.name}: {', '.join(sorted(each.columns))}" for each in layouts)
    return DataError(
        f"{what} has the columns {_columns(record)}",
        where=origin,
        hint=f"rename columns with `columns: {{ours: yours}}`, or write an adapter; known layouts: {shapes}",
    )


def _columns(record: Record) -> str:
    return cut(", ".join(sorted(map(repr, record))))
