"""How a message about an unknown name ends."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from pipeline.terminal import printable


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or the list of what is known when nothing is close."""
    candidates = sorted(known)
    close = get_close_matches(word, candidates, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{printable(close[0])}`?"
    return f" (known: {', '.join(printable(each) for each in candidates) or 'none'})"
