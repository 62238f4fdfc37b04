"""A JSON file that holds one list of objects, read element by element.

Where an element ends is found by its brackets and quotes alone, so that memory does not grow with the file and an
element that is wrong costs nothing but itself; `strict_json` then reads the element.
"""

from __future__ import annotations

from data.findings import CUT_SHORT, BadRow, Findings, shown
from data.sources.files import opened_text
from data.sources.json_text import CHUNK, JsonText
from data.sources.lines import bytes_kept, too_large
from data.sources.record import Located, Records, place
from data.sources.strict_json import parse_object
from pipeline.errors import DataError


def read(path: str, max_chars: int, findings: Findings, *, chunk: int = CHUNK) -> Records:
    """The records of a `.json` file, which may be compressed.

    Args:
        path: The file.
        max_chars: The longest record.
        findings: Where notes on the file go.
        chunk: Bytes that are read at once.

    Raises:
        DataError: the file cannot be read, is damaged, is not a list, or is broken between two elements.
    """
    name = place(path)
    with opened_text(path, findings) as stream:
        text = JsonText(stream, chunk, bytes_kept(max_chars))
        if _enter_list(text, name):
            yield from _rows(text, name, max_chars)
            _refuse_more(text, name)


def _enter_list(text: JsonText, name: str) -> bool:
    """Whether there is an element."""
    first = text.peek()
    if first == b"[":
        text.skip()
        return text.peek() != b"]"
    if first == b"{":
        raise _no_list(text, name)
    if first:
        what = f"begins with {shown(text.excerpt())}, not with a list"
        raise DataError(what, where=f"{name}:{text.line}", hint="write the rows as one list of objects")
    return False


def _no_list(text: JsonText, name: str) -> DataError:
    text.value()
    if text.peek() == b"{":
        return DataError("holds one object after the other: this is JSONL", where=name, hint="name the file .jsonl")
    hint = (
        "write the rows as one list of objects, or one object per line in a .jsonl file; "
        'of `{"data": [...]}`, keep the list alone: jq .data'
    )
    return DataError("holds one object (expected a list of rows; one row alone is JSONL)", where=name, hint=hint)


def _rows(text: JsonText, name: str, max_chars: int) -> Records:
    number, line, more = 0, 0, True
    while more:
        number += 1
        text.peek()
        origin = f"{name}:{text.line}" + (f" (row {number})" if text.line == line else "")
        line = text.line
        found = _row(text, origin, max_chars)
        more = _goes_on(text, name, found)
        yield found


def _row(text: JsonText, origin: str, max_chars: int) -> Located | BadRow:
    mark = text.peek()
    if not mark:
        return BadRow(CUT_SHORT, "the file ends inside the list", where=origin)
    if mark in b",]}":
        raise DataError(f"broken list: expected a row, found {shown(text.excerpt())}", where=origin, hint="correct it")
    value = text.value()
    if value.complete and value.characters > max_chars:
        return too_large(value.characters, max_chars, origin)
    try:
        return Located(origin, parse_object(value.content, origin, last=not value.complete))
    except BadRow as problem:
        if not value.complete and problem.kind is not CUT_SHORT:
            raise _torn(problem) from problem
        return problem


def _goes_on(text: JsonText, name: str, found: Located | BadRow) -> bool:
    """Whether another element follows; its absence at the end of the file is for the next call of `_row` to say."""
    mark = text.peek()
    if not mark:
        return not (isinstance(found, BadRow) and found.kind is CUT_SHORT)
    if mark == b",":
        text.skip()
    elif mark != b"]":
        if isinstance(found, BadRow):
            raise _torn(found)
        what = f"broken list: expected `,` or `]` after a row, found {shown(text.excerpt())}"
        raise DataError(what, where=f"{name}:{text.line}", hint="correct it; nothing after it can be read")
    return mark == b","


def _torn(problem: BadRow) -> DataError:
    """A wrong quote or bracket in an element, after which it is not known where elements begin."""
    return DataError(problem.what, where=problem.where, hint="correct it; nothing after it can be read")


def _refuse_more(text: JsonText, name: str) -> None:
    if text.peek() != b"]":
        return
    text.skip()
    if text.peek():
        what = f"goes on after the end of the list: {shown(text.excerpt())}"
        raise DataError(what, where=f"{name}:{text.line}", hint="write one list of all rows")
