"""How different several responses to one prompt are, by the runs of words in them; from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from data.ngrams import words


def distinct(responses: Sequence[str], n: int) -> float:
    """The share of runs of `n` words, of all responses together, that are different ones (Li et al. 2016, arXiv
    1510.03055); 0 where no response has a run."""
    runs = [run for response in responses for run in _runs(response, n)]
    return len(set(runs)) / len(runs) if runs else 0.0


def dissimilarity(responses: Sequence[str], n: int) -> float:
    """1 minus the mean Jaccard similarity of two responses' sets of runs of `n` words; two without a run are alike.

    Raises:
        ValueError: There are fewer than two responses.
    """
    sets = [set(_runs(response, n)) for response in responses]
    if len(sets) < 2:
        raise ValueError("one response is not similar to any other")
    similar = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in combinations(sets, 2)]
    return 1.0 - sum(similar) / len(similar)


def _runs(response: str, n: int) -> list[tuple[str, ...]]:
    found = words(response)
    return [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]
