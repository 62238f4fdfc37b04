"""Single values of a record: text, numbers, verdicts and lists, each checked before it is used."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from data.findings import HUGE_NUMBER, NOT_FINITE, NUL, SURROGATE, WRONG_TYPE, BadRow, shown

EXACT = 2**53
"""Up to here, every integer is a float of its own."""
NUMBER = re.compile(r"\s*+[+-]?+(\d++(\.\d*+)?+|\.\d++)([eE][+-]?+\d++)?+\s*+", re.ASCII)
INFINITE = re.compile(r"\s*[+-]?(nan|inf|infinity)\s*", re.IGNORECASE)
VERDICTS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def wrong(field: str, expected: str, value: object, origin: str, hint: str = "") -> BadRow:
    """The error for a value of another type: `chosen: null (expected text)`."""
    return BadRow(WRONG_TYPE, f"{field}: {shown(value)} (expected {expected})", where=origin, hint=hint)


def text(value: object, field: str, origin: str) -> str:
    """A text that a tokenizer takes.

    Raises:
        BadRow: not a text, or one with NUL characters or lone surrogates.
    """
    if not isinstance(value, str):
        raise wrong(field, "text", value, origin)
    if "\0" in value:
        raise BadRow(NUL, f"{field}: {shown(value)} (NUL at character {value.index(chr(0)) + 1})", where=origin)
    if not value.isascii():
        _refuse_surrogates(value, field, origin)
    return value


def number(value: object, field: str, origin: str) -> float:
    """A number, or a text that is one.

    Raises:
        BadRow: not a number, not finite, or beyond 2**53.
    """
    if isinstance(value, str) and (NUMBER.fullmatch(value) or INFINITE.fullmatch(value)):
        return _in_range(float(value), field, value, origin)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(field, "a number", value, origin)
    return _in_range(value, field, value, origin)


def verdict(value: object) -> bool | None:
    """True or false, 1 or 0, also as text in any case; None for anything else."""
    if isinstance(value, str):
        return VERDICTS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def sequence(value: object, field: str, expected: str, origin: str) -> Sequence[Any]:
    """A list.

    Raises:
        BadRow: anything else.
    """
    if not isinstance(value, list | tuple):
        raise wrong(field, expected, value, origin)
    return value


def _in_range(value: float, field: str, given: object, origin: str) -> float:
    # Compared as it came: an integer may be too large for a float.
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(NOT_FINITE, f"{field}: {shown(given)} (expected a finite number)", where=origin)
    if abs(value) > EXACT:
        raise BadRow(HUGE_NUMBER, f"{field}: {shown(given)} (expected a number within 2**53)", where=origin)
    return float(value)


def _refuse_surrogates(value: str, field: str, origin: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        place = f"lone surrogate U+{ord(value[error.start]):04X} at character {error.start + 1}"
        raise BadRow(SURROGATE, f"{field}: {shown(value)} ({place})", where=origin) from error
