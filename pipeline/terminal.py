"""What reaches the terminal: text from files made harmless, and consoles that interpret nothing in it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from rich.console import Console

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def printable(text: str, limit: int | None = 80) -> str:
    """Text on one line with every control, bidirectional and invisible character shown as an escape.

    Args:
        text: Anything, also from files nobody checked.
        limit: Cut to this many characters, the last three being dots; None keeps all.
    """
    # No character is shown by fewer than one.
    shown = "".join(map(_shown, text if limit is None else text[: limit + 1]))
    if limit is not None and len(shown) > limit:
        return shown[: limit - 3] + "..."
    return shown


def printable_lines(text: str) -> str:
    """Like `printable` for text of several lines, which stay lines."""
    return "\n".join(printable(line, None) for line in text.split("\n"))


def console(*, stderr: bool = False) -> Console:
    """A console that takes text literally: no markup, no emoji codes, no highlighting. Honours `NO_COLOR`."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text, each as wide as its widest cell."""
    cells = [list(headings), *([printable(cell, 200) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _shown(character: str) -> str:
    if unicodedata.category(character) in _INVISIBLE:
        return character.encode("unicode_escape").decode("ascii")
    return character
