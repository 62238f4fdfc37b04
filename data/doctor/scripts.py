"""The script that a text is mostly written in."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

NO_LETTERS = "none"

_ASCII_LETTERS = bytes(code for code in range(128) if chr(code).isalpha())
_WIDTHS = ("FULLWIDTH", "HALFWIDTH")
_HAN = "CJK"


def main_script(text: str) -> str:
    """The script of most letters of a text, `Latin` or another first word of Unicode names, `Han` for ideographs;
    `none` when there is no letter. Latin comes first among equals, then the alphabet decides."""
    in_ascii = text.encode("ascii", "ignore")
    letters = len(in_ascii) - len(in_ascii.translate(None, _ASCII_LETTERS))
    if letters >= len(text) - len(in_ascii):
        return "Latin" if letters else NO_LETTERS
    return _most_letters(text)


def _most_letters(text: str) -> str:
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        counts[_script(character)] += count
    del counts[NO_LETTERS]
    if not counts:
        return NO_LETTERS
    return min(counts, key=lambda script: (-counts[script], script != "Latin", script))


@lru_cache(maxsize=65_536)
def _script(character: str) -> str:
    """The script of a letter; `none` for anything else."""
    if not character.isalpha():
        return NO_LETTERS
    words = unicodedata.name(character, "UNKNOWN").split()
    word = words[1] if words[0] in _WIDTHS and len(words) > 1 else words[0]
    return "Han" if word == _HAN else word.split("-")[0].capitalize()
