"""How much of a text repeats itself (Rae et al. 2021, arXiv 2112.11446, section A.1.1).

Repeated is what occurs a second time or later: the share is what would go if every repetition were cut.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.ngrams import Hashes, runs, word_hashes, words

RUN = 10


def repeated_share(text: str) -> float:
    """The larger of the shares of repeated lines and of repeated runs of ten words, in [0, 1]."""
    return max(repeated_lines(text), repeated_runs(text))


def repeated_lines(text: str) -> float:
    """Share of the characters that stand in lines which occurred before. White space at either end of a line and
    blank lines do not count."""
    seen: set[str] = set()
    total = repeated = 0
    for line in filter(None, map(str.strip, text.splitlines())):
        total += len(line)
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated / total if total else 0.0


def repeated_runs(text: str) -> float:
    """Share of the words' characters that stand in a run of ten words which occurred before, each character counted
    once. Case, punctuation and spacing do not count."""
    found = words(text)
    starts = _repeated(runs(word_hashes(found), RUN))
    if not len(starts):
        return 0.0
    # +1 where a run starts and -1 behind its end: the running sum is positive inside of runs.
    edges = np.zeros(len(found) + 1, np.int64)
    edges[starts] += 1
    edges[starts + RUN] -= 1
    inside = edges.cumsum()[:-1] > 0
    lengths = np.array([len(word) for word in found])
    return float(lengths[inside].sum() / lengths.sum())


def _repeated(hashes: Hashes) -> NDArray[np.intp]:
    """Indices of the hashes that occurred before."""
    again = np.ones(len(hashes), np.bool_)
    again[np.unique(hashes, return_index=True)[1]] = False
    return np.flatnonzero(again)
