"""JSON as RFC 8259 has it, without what other readers change in silence: a key given twice, numbers that a float
cannot hold, bytes that are not UTF-8."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from data.findings import (
    BROKEN_JSON,
    CUT_SHORT,
    DUPLICATE_KEY,
    HUGE_NUMBER,
    NOT_AN_OBJECT,
    NOT_FINITE,
    NOT_UTF8,
    BadRow,
    Kind,
    cut,
    shown,
)
from data.sources.record import Record

LARGEST = 2**64 - 1
"""Integers up to this size are exact as floats."""
DEEPEST = 64
"""Levels of nesting; no format has as many, and code that follows them need not fear for its stack."""
BEGINNINGS = {word[:length] for word in ("true", "false", "null") for length in range(len(word))}
UNFINISHED = re.compile(r"[-.]|[eE][+-]?|\\?u[0-9a-fA-F]{0,4}")
TYPES = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


class _Refused(Exception):
    """Well-formed JSON that is not taken."""

    def __init__(self, kind: Kind, what: str) -> None:
        self.kind = kind
        super().__init__(what)


def parse_object(content: bytes, origin: str, *, last: bool = False) -> Record:
    """The object that a piece of a file holds.

    Args:
        content: UTF-8.
        origin: Where it begins.
        last: The file ends with it, so that it may be cut short.

    Raises:
        BadRow: it is broken, or something else than an object.
    """
    value = _value(content, origin, last)
    if not isinstance(value, dict):
        raise BadRow(NOT_AN_OBJECT, f"{TYPES[type(value)]}, {shown(value)} (expected an object)", where=origin)
    return value


def _value(content: bytes, origin: str, last: bool) -> Any:
    text = _decoded(content, origin, last)
    try:
        value = _parsed(text)
    except _Refused as error:
        raise BadRow(error.kind, str(error), where=origin) from error
    except json.JSONDecodeError as error:
        raise _broken(error, origin, last) from error
    except RecursionError as error:
        raise BadRow(BROKEN_JSON, f"nested more than {DEEPEST} levels deep", where=origin) from error
    return value


def _parsed(text: str) -> Any:
    try:
        value = _DECODER.decode(text)
    except _Refused:
        # Only a second reading, which goes on, knows in which field it is.
        raise next(_refusals(_FORGIVING.decode(text), "")) from None
    if text.count("[") + text.count("{") > DEEPEST:
        _refuse_depth(value)
    return value


def _refusals(value: Any, path: str) -> Iterator[_Refused]:
    """What is not taken of a value of `_FORGIVING`, with its place in the row."""
    if isinstance(value, _Refused):
        yield _Refused(value.kind, f"{cut(path)}: {value}" if path else str(value))
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _refusals(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _refusals(inner, f"{path}[{index}]")


def _decoded(content: bytes, origin: str, last: bool) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if last and error.reason == "unexpected end of data":
            raise BadRow(CUT_SHORT, "the file ends inside a character", where=origin) from error
        raise BadRow(NOT_UTF8, undecodable(error), where=origin) from error


def undecodable(error: UnicodeDecodeError) -> str:
    """Which byte is wrong, counted from 1."""
    return f"byte {error.start + 1}: not UTF-8 (0x{error.object[error.start]:02x})"


def _broken(error: json.JSONDecodeError, origin: str, last: bool) -> BadRow:
    if last and _at_the_end(error):
        inside = "a string" if error.msg.startswith("Unterminated string") else "a row"
        return BadRow(CUT_SHORT, f"the file ends inside {inside}", where=origin)
    line = f"line {error.lineno} of the row, " if error.lineno > 1 else ""
    excerpt = shown(error.doc[max(error.pos - 30, 0) : error.pos + 30])
    what = f"broken JSON at {line}column {error.colno}: {error.msg[:1].lower()}{error.msg[1:]} near {excerpt}"
    return BadRow(BROKEN_JSON, what, where=origin)


def _at_the_end(error: json.JSONDecodeError) -> bool:
    """Whether more text could have made it right."""
    rest = error.doc[error.pos :].strip()
    unfinished = rest in BEGINNINGS or UNFINISHED.fullmatch(rest) is not None
    return unfinished or error.msg.startswith("Unterminated string")


def _refuse_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise _Refused(BROKEN_JSON, f"nested more than {DEEPEST} levels deep")
        inner = (each for each in level if isinstance(each, dict | list))
        level = [each for outer in inner for each in (outer.values() if isinstance(outer, dict) else outer)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Refused(DUPLICATE_KEY, f"duplicate key {shown(twice)}")
    return found


def _no_constant(name: str) -> NoReturn:
    raise _Refused(NOT_FINITE, f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > len(str(-LARGEST)) or abs(int(digits)) > LARGEST:
        raise _Refused(HUGE_NUMBER, f"{cut(digits)} does not fit in 64 bits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Refused(NOT_FINITE, f"{cut(digits)} is larger than any float")
    return value


def _kept(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same, but what it refuses stands in the value."""

    def reading(found: Any) -> Any:
        try:
            return read(found)
        except _Refused as refused:
            return refused

    return reading


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer, parse_float=_float
)
_FORGIVING = json.JSONDecoder(
    object_pairs_hook=_kept(_unique),
    parse_constant=_kept(_no_constant),
    parse_int=_kept(_integer),
    parse_float=_kept(_float),
)
