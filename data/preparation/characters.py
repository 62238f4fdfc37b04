"""Characters that stay in a text: one form of each, and none that cannot be seen but has no effect worth keeping."""

from __future__ import annotations

import re
from typing import Literal

from data.normal_form import normal_form

_LINE_BREAK = re.compile("\r\n|[\r\v\f\x85]")
# C0 and C1, zero-width space, word joiner, byte order mark, and what embeds, overrides or isolates a direction.
_INVISIBLE = "\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069"
_REMOVED = re.compile(f"[{_INVISIBLE}]+")
# From Hebrew to the scripts of Asia, and from arrows to emoji: the joiners change how these are drawn.
_JOINED = "\u0590-\u1cff\u2190-\U000effff"
_USELESS_JOINER = re.compile(f"(?<![{_JOINED}\u200c\u200d])[\u200c\u200d]++(?![{_JOINED}])")
# Most texts hold none of these, and one search for all is faster than a substitution of each.
_AFFECTED = re.compile(f"[\r\v\f{_INVISIBLE}\u200c\u200d]")


def normalised(text: str, form: Literal["none", "NFC", "NFKC"]) -> str:
    """The text in a Unicode normalisation form (Unicode Standard Annex 15)."""
    return text if form == "none" else normal_form(text, form)


def without_control_characters(text: str) -> str:
    """The text without control characters other than tab and line break, and without invisible characters.

    Carriage return, vertical tab, form feed and next line become a line break, CR LF a single one. Zero-width space,
    word joiner, byte order mark and the embeddings, overrides and isolates of direction are removed; zero-width
    joiner and non-joiner too, unless one of their neighbours is from a script that needs them (Persian, Hindi) or an
    emoji. The marks of direction U+200E, U+200F and U+061C stay: right-to-left text is written with them.
    """
    if not _AFFECTED.search(text):
        return text
    return _USELESS_JOINER.sub("", _REMOVED.sub("", _LINE_BREAK.sub("\n", text)))
