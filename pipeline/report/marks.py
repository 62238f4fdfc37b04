"""Where two answers differ, word by word."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

ALIKE = 0.35
"""Share of words in common below which marks would cover everything: the answer is then shown as it is."""

_WORDS = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")
"""A word or a mark with the white space before it."""


@dataclass(frozen=True)
class Piece:
    """A run of words that both answers have, or only the new one, or only the old one."""

    kind: Literal["same", "new", "gone"]
    text: str


def marked(old: str, new: str) -> list[Piece]:
    """The new answer in pieces, what it lost of the old one in between; one piece where they have little in common.

    The pieces that are not `gone` are the new answer; those that are not `new` the old one, but for white space.
    """
    before, after = _WORDS.findall(old), _WORDS.findall(new)
    bare = [[word.strip() for word in words] for words in (before, after)]
    matcher = SequenceMatcher(None, bare[0], bare[1], autojunk=False)
    if old == new or matcher.ratio() < ALIKE:
        return [Piece("same", new)]
    pieces: list[Piece] = []
    for what, start, end, from_, to in matcher.get_opcodes():
        lost, found = "".join(before[start:end]), "".join(after[from_:to])
        parts = [Piece("same", found)] if what == "equal" else [Piece("gone", lost), Piece("new", found)]
        pieces += [part for part in parts if part.text]
    return pieces
