"""What reaches the terminal: text from files made harmless, and consoles that interpret nothing in it.

Nobody need remember to ask for that: a console makes whatever text it is given harmless, and so does what Python prints
of an error that nobody expected.
"""

from __future__ import annotations

import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from pipeline.redaction import LONGEST_SECRET, redacted

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def printable(text: str, limit: int | None = 80) -> str:
    """Text on one line with every control, bidirectional and invisible character shown as an escape, and no secret.

    Args:
        text: Anything, also from files nobody checked.
        limit: Cut to this many characters, the last three being dots; None keeps all.
    """
    # A secret that the cut would go through is replaced before it; of a long text no more is looked at than that takes.
    text = redacted(text if limit is None else text[: limit + LONGEST_SECRET])
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
    return _Harmless(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


def guard_warnings() -> None:
    """From now on, what Python prints of warnings is harmless, too."""
    warnings.formatwarning = _format_warning


def print_trace(error: BaseException) -> None:
    """Print an error that nobody expected as Python would."""
    sys.stderr.write(printable_lines("".join(traceback.format_exception(error)).rstrip("\n")) + "\n")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text, each as wide as its widest cell."""
    cells = [list(headings), *([printable(cell, 200) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


class _Harmless(Console):
    """Text is printed as `printable_lines` has it; what is more than text was made so by whoever drew it."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable_lines(each) if isinstance(each, str) else each for each in objects), **options)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return printable(f"{filename}:{lineno}: {category.__name__}: {message}", None) + "\n"


def _shown(character: str) -> str:
    if unicodedata.category(character) in _INVISIBLE:
        return character.encode("unicode_escape").decode("ascii")
    return character
