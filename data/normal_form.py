"""Unicode normalisation forms in time proportional to the text.

`unicodedata.normalize` puts the combining marks after a letter into their order by insertion: a million marks in the
wrong order, which is one hostile row, take it most of an hour. Long runs of marks are sorted here beforehand.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

SHORT = 2_000
"""Characters; marks of a shorter text are in order within milliseconds."""
_RUN = re.compile(r"[^\w\x00-\u02ff]{50,}")
"""Where many marks can stand in a row: no mark is a letter or a digit, and none stands below U+0300."""
_SPLIT = {0x0F73: "\u0f71\u0f72", 0x0F75: "\u0f71\u0f74", 0x0F81: "\u0f71\u0f80"}
_SPLIT_WIDE = {**_SPLIT, 0xFF9E: "\u3099", 0xFF9F: "\u309a"}
"""Characters that are no marks themselves but become some; the last two under NFKC only."""


def normal_form(text: str, form: Literal["NFC", "NFKC"]) -> str:
    """The text in a Unicode normalisation form (Unicode Standard Annex 15)."""
    if len(text) > SHORT and not text.isascii():
        text = _RUN.sub(_ordered, text.translate(_SPLIT_WIDE if form == "NFKC" else _SPLIT))
    return unicodedata.normalize(form, text)


def _ordered(found: re.Match[str]) -> str:
    """A run with the marks between two other characters by combining class, which changes no normal form."""
    ordered: list[str] = []
    marks: list[str] = []
    for character in found[0]:
        if unicodedata.combining(character):
            marks.append(character)
            continue
        ordered += sorted(marks, key=unicodedata.combining)
        ordered.append(character)
        marks.clear()
    return "".join([*ordered, *sorted(marks, key=unicodedata.combining)])
