"""What preferences say about each other: pairs that contradict, cycles, and whether the longer response wins.

A ranking of k responses counts as its k * (k - 1) / 2 pairs. Texts are compared without white space at their ends.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import combinations, pairwise
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from data.doctor.keys import Indices, Keys, as_numbers, messages_key, text_key
from data.schema import Preference

FEWEST_PAIRS_OF_A_CYCLE = 3

Pair = tuple[int, int]
"""The keys of the better and the worse response."""


@dataclass(frozen=True)
class Contradictions:
    """Pairs of responses that were preferred both ways."""

    examples: list[Pair]
    """For each pair, the places of the first preference one way and the first the other way; in their order."""
    rows: set[int]
    """Places of all preferences with such a pair."""


@dataclass(frozen=True)
class Cycles:
    """Prompts whose preferences lead back to where they began, pairs that contradict each other left aside."""

    examples: list[list[int]]
    """For each prompt, the places of the pairs of one cycle."""
    rows: set[int]
    """Places of the preferences that break every cycle when they are left out."""


class Comparisons:
    """The pairs of all preferences: 36 bytes each."""

    def __init__(self) -> None:
        self._keys = bytearray()
        self._places = array("L")
        self._longer_by = array("q")

    def add(self, row: Preference, place: int) -> bytes:
        """Take in a preference; returns a key of the whole row."""
        prompt = messages_key(row.prompt)
        responses = [text_key(response) for response in row.responses]
        for better, worse in combinations(range(len(responses)), 2):
            self._keys += prompt + responses[better] + responses[worse]
            self._places.append(place)
            self._longer_by.append(len(row.responses[better]) - len(row.responses[worse]))
        return prompt + b"".join(responses)

    def length_bias(self) -> dict[str, float]:
        """By how many characters the better response is longer, and how often the longer one is better.

        `longer_wins` counts pairs of equal length as half; `longer_wins_low` and `longer_wins_high` bound it with
        95% confidence (Wilson's score interval). Empty when there is no pair.
        """
        longer_by = np.array(self._longer_by, np.int64)
        if not len(longer_by):
            return {}
        wins = float((longer_by > 0).sum() + 0.5 * (longer_by == 0).sum())
        low, high = _wilson(wins, len(longer_by))
        return {
            "chosen_longer_mean": float(longer_by.mean()),
            "chosen_longer_median": float(np.median(longer_by)),
            "longer_wins": wins / len(longer_by),
            "longer_wins_low": low,
            "longer_wins_high": high,
        }

    def contradictions(self) -> Contradictions:
        """Pairs that are preferred both ways for the same prompt."""
        groups, forward, both = self._both_ways()
        members = np.flatnonzero(both[groups])
        firsts: dict[int, dict[bool, int]] = {}
        for index in members:
            firsts.setdefault(int(groups[index]), {}).setdefault(bool(forward[index]), self._places[index])
        examples = sorted((min(ways.values()), max(ways.values())) for ways in firsts.values())
        return Contradictions(examples, {self._places[index] for index in members})

    def cycles(self) -> Cycles:
        """Cycles of three or more responses to the same prompt."""
        groups, _, both = self._both_ways()
        examples: list[list[int]] = []
        rows: set[int] = set()
        for indices in self._by_prompt(~both[groups]):
            pairs = self._places_of_pairs(indices)
            broken = [[pairs[pair] for pair in cycle] for cycle in _cycles(pairs)]
            if broken:
                examples.append(_from_first([min(places) for places in broken[0]]))
                rows.update(place for cycle in broken for places in cycle for place in places)
        return Cycles(sorted(examples, key=min), rows)

    def _both_ways(self) -> tuple[Indices, NDArray[np.bool_], NDArray[np.bool_]]:
        """Of each pair of responses, whatever the order: its group; of each preference, whether it is the first way;
        of each group, whether it is preferred both ways."""
        prompt, better, worse = self._columns()
        forward = better < worse
        unordered = np.stack([prompt, np.minimum(better, worse), np.maximum(better, worse)], axis=1)
        groups = _groups(unordered)
        ways = np.zeros((2, int(groups.max(initial=-1)) + 1), np.bool_)
        ways[forward.astype(np.int64), groups] = True
        return groups, forward, ways[0] & ways[1]

    def _columns(self) -> tuple[Keys, Keys, Keys]:
        prompt, better, worse = as_numbers(self._keys).reshape(-1, 3).T
        return prompt, better, worse

    def _by_prompt(self, wanted: NDArray[np.bool_]) -> Iterator[Indices]:
        """Indices of the wanted pairs of each prompt that has enough of them for a cycle."""
        prompt, better, worse = self._columns()
        indices = np.flatnonzero(wanted & (better != worse))
        indices = indices[np.argsort(prompt[indices], kind="stable")]
        ends = np.flatnonzero(np.diff(prompt[indices])) + 1
        for group in np.split(indices, ends):
            if len(group) >= FEWEST_PAIRS_OF_A_CYCLE:
                yield group

    def _places_of_pairs(self, indices: Indices) -> dict[Pair, list[int]]:
        _, better, worse = self._columns()
        found: dict[Pair, list[int]] = {}
        for index in indices:
            found.setdefault((int(better[index]), int(worse[index])), []).append(self._places[index])
        return found


def _cycles(pairs: dict[Pair, list[int]]) -> list[list[Pair]]:
    """Cycles that share no pair, until none is left without their pairs."""
    left = dict.fromkeys(pairs)
    found = []
    while cycle := _cycle(list(left)):
        found.append(cycle)
        for pair in cycle:
            del left[pair]
    return found


def _cycle(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs of a cycle; empty when there is none."""
    sorter: TopologicalSorter[int] = TopologicalSorter()
    for better, worse in pairs:
        sorter.add(worse, better)
    try:
        sorter.prepare()
    except CycleError as error:
        return list(pairwise(error.args[1]))
    return []


def _from_first(places: list[int]) -> list[int]:
    """The places of a cycle, beginning with the first of the file."""
    start = places.index(min(places))
    return places[start:] + places[:start]


def _groups(rows: Keys) -> Indices:
    """The number of each row's group of equal rows."""
    order = np.lexsort(rows.T)
    ordered = rows[order]
    is_new = np.ones(len(rows), np.bool_)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    groups = np.empty(len(rows), np.int64)
    groups[order] = np.cumsum(is_new) - 1
    return groups


def _wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson 1927, doi 10.1080/01621459.1927.10502953, at 95%."""
    z = NormalDist().inv_cdf(0.975)
    share = successes / trials
    scale = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    half = z / scale * sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return centre - half, centre + half
