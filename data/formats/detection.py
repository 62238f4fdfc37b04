"""Which format a file is in: decided by one record, and refused when that leaves a choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from data.findings import cut, shown
from data.formats.layout import Format, Record
from data.formats.preferences import PAIR, PREFERENCES
from data.formats.renaming import suggestion
from data.formats.singles import RESPONSE_COLUMNS, SINGLES
from data.schema import RowKind
from pipeline.errors import DataError

FORMATS: tuple[Format, ...] = SINGLES + PREFERENCES
"""Every format, in the order in which the documentation lists them."""


class NoFormat(DataError):
    """A record that no format fits; another one of its file may."""


def detect(record: Record, wanted: str, origin: str) -> Format:
    """The one format that a file is in.

    Args:
        record: The first record of the file.
        wanted: `auto`, a kind of row, or a format's name. It limits the candidates; a name is believed, whatever else
            the columns look like.
        origin: Where the record is, for the error.

    Raises:
        NoFormat: no format fits.
        DataError: several do, or there is none of that name.
    """
    allowed = [each for each in FORMATS if wanted in ("auto", each.name, each.kind)]
    if not allowed:
        names = ", ".join(dict.fromkeys(["auto", *get_args(RowKind), *(each.name for each in FORMATS)]))
        raise DataError(f"no format {shown(wanted)}", where=origin, hint=f"one of {names}, or module:function")
    complete = [each for each in allowed if each.columns <= record.keys()]
    fitting = [each for each in complete if each.name == wanted or each.fits(record)]
    if len(fitting) == 1:
        return fitting[0].like(record)
    if fitting:
        raise _several(record, fitting, origin)
    raise _none(record, wanted, allowed, complete, origin)


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


def _none(record: Record, wanted: str, allowed: Sequence[Format], complete: Sequence[Format], origin: str) -> NoFormat:
    """The error for a record that no format fits; what is most likely meant decides what it says."""
    renaming = suggestion(record, allowed)
    # The format of a pair whose other half is missing is no other format, whatever its columns.
    if any(each.columns >= PAIR for each in allowed) and len(PAIR & record.keys()) == 1:
        what, hint = _half_a_pair(record)
    elif [each.name for each in complete] == ["prompt"]:
        what, renaming = _other_response(record, renaming)
    elif complete:
        what, hint = _other_content(record, complete)
    else:
        what, hint = _other_columns(record, wanted, allowed)
    return NoFormat(what, where=origin, hint=renaming or hint)


def _half_a_pair(record: Record) -> tuple[str, str]:
    (there,), (absent,) = PAIR & record.keys(), PAIR - record.keys()
    what = f"no column `{absent}` beside `{there}` among the columns {_columns(record)}"
    return what, "give both, or rename a column with `columns: {ours: yours}`"


def _other_response(record: Record, renaming: str) -> tuple[str, str]:
    name = min(RESPONSE_COLUMNS & record.keys())
    what = f"`{name}` looks like a response to `prompt`, which no format reads among the columns {_columns(record)}"
    return what, f"{renaming}, or `format: prompt` if it is a fact for a judge"


def _other_content(record: Record, candidates: Sequence[Format]) -> tuple[str, str]:
    columns = sorted(frozenset[str]().union(*(each.columns for each in candidates)))
    values = ", ".join(f"{column}: {shown(record[column])}" for column in columns)
    names = " or ".join(f"`{each.name}`" for each in candidates)
    return f"{values} does not look like {names} among the columns {_columns(record)}", _remedy(record, candidates)


def _remedy(record: Record, candidates: Sequence[Format]) -> str:
    if "label" in record and any("completion" in each.columns for each in candidates):
        return "a `label` rates the response: say `format: rated`, or `format: prompt_completion` to imitate them all"
    return (
        "dialogues are lists of {role, content} or text of `\\n\\nHuman:` and `\\n\\nAssistant:` turns, "
        "and plain responses need a column `prompt`"
    )


def _other_columns(record: Record, wanted: str, allowed: Sequence[Format]) -> tuple[str, str]:
    what = "no format" if wanted == "auto" else f"no format of `{wanted}`"
    shapes = "; ".join(f"{each.name}: {', '.join(sorted(each.columns))}" for each in allowed)
    hint = f"rename columns with `columns: {{ours: yours}}`, or write an adapter; known layouts: {shapes}"
    return f"{what} has the columns {_columns(record)}", hint


def _columns(record: Record) -> str:
    return cut(", ".join(sorted(map(repr, record))))
