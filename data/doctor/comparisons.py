"""What preferences say about each other: pairs that contradict, cycles, and whether the longer response wins.

A ranking of k <= 8 responses counts as its k * (k - 1) / 2 pairs, a longer one as its k - 1 pairs of neighbours: these
lead from every response to every worse one, so that no cycle is missed; a pair that contradicts two responses further
apart is a cycle then. Texts are compared without white space at their ends.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from data.doctor.keys import Indices, Keys, as_numbers, key, messages_key, text_key
from data.schema import Preference, Rated

FEWEST_PAIRS_OF_A_CYCLE = 3
LONGEST_IN_FULL = 8
"""Responses of a ranking up to which all of its pairs count."""

Pair = tuple[int, int]
"""The keys of the better and the worse response."""


@dataclass(frozen=True)
class Contradictions:
    """Pairs of responses that were preferred both ways, or responses that were rated both ways."""

    examples: list[tuple[int, int]]
    """For each, the places of the first row that says the one and the first that says the other; in their order."""
    rows: set[int]
    """Places of all rows with such a pair or response."""


@dataclass(frozen=True)
class Cycles:
    """Prompts whose preferences lead back to where they began, pairs that contradict each other left aside."""

    examples: list[list[int]]
    """For each prompt, the places of the pairs of one cycle, the shortest that was found."""
    rows: set[int]
    """Places of the preferences that break every cycle when they are left out."""


class Verdicts:
    """The thumbs of all rated rows: 17 bytes each."""

    def __init__(self) -> None:
        self._keys = bytearray()
        self._places = array("L")
        self._good = bytearray()

    def add(self, row: Rated, place: int) -> bytes:
        """Take in a rated row; returns a key of the whole row."""
        said = key(messages_key(row.prompt) + text_key(row.response))
        self._keys += said
        self._places.append(place)
        self._good.append(row.good)
        return said + bytes([row.good])

    def contradictions(self) -> Contradictions:
        """Responses that are good and bad for the same prompt."""
        groups = _groups(as_numbers(self._keys).reshape(-1, 1))
        return _contradictions(groups, np.frombuffer(bytes(self._good), np.bool_), self._places)


class Comparisons:
    """The pairs of all preferences: 40 bytes each."""

    def __init__(self) -> None:
        self._keys = bytearray()
        self._places = array("L")
        self._longer_by = array("q")

    def add(self, row: Preference, place: int) -> bytes:
        """Take in a preference; returns a key of the whole row."""
        prompt = messages_key(row.prompt)
        responses = [text_key(response) for response in row.responses]
        for better, worse in _pairs(len(responses)):
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
        groups, forward = self._sides()
        return _contradictions(groups, forward, self._places)

    def cycles(self) -> Cycles:
        """Cycles of three or more responses to the same prompt."""
        groups, forward = self._sides()
        examples: list[list[int]] = []
        rows: set[int] = set()
        for pairs in self._by_prompt(~_both_ways(groups, forward)):
            broken = [[pairs[pair] for pair in cycle] for cycle in _cycles(pairs)]
            if broken:
                examples.append(_from_first([min(places) for places in min(broken, key=len)]))
                rows.update(place for cycle in broken for places in cycle for place in places)
        return Cycles(sorted(examples, key=min), rows)

    def _sides(self) -> tuple[Indices, NDArray[np.bool_]]:
        """Of each preference: the group of its pair of responses, whatever their order, and whether it is the first
        way."""
        prompt, better, worse = self._columns()
        unordered = np.stack([prompt, np.minimum(better, worse), np.maximum(better, worse)], axis=1)
        return _groups(unordered), better < worse

    def _columns(self) -> tuple[Keys, Keys, Keys]:
        prompt, better, worse = as_numbers(self._keys).reshape(-1, 3).T
        return prompt, better, worse

    def _by_prompt(self, wanted: NDArray[np.bool_]) -> Iterator[dict[Pair, list[int]]]:
        """The wanted pairs, with their places, of each prompt that has enough of them for a cycle."""
        prompt, better, worse = self._columns()
        indices = np.flatnonzero(wanted & (better != worse))
        indices = indices[np.argsort(prompt[indices], kind="stable")]
        ends = np.flatnonzero(np.diff(prompt[indices])) + 1
        for group in np.split(indices, ends):
            if len(group) >= FEWEST_PAIRS_OF_A_CYCLE:
                found: dict[Pair, list[int]] = {}
                for index in group:
                    found.setdefault((int(better[index]), int(worse[index])), []).append(self._places[index])
                yield found


def _pairs(responses: int) -> Iterable[Pair]:
    """The pairs that a ranking counts as."""
    everyone = range(responses)
    return combinations(everyone, 2) if responses <= LONGEST_IN_FULL else pairwise(everyone)


def _both_ways(groups: Indices, forward: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether the group of each row has rows of both ways."""
    ways = np.zeros((2, int(groups.max(initial=-1)) + 1), np.bool_)
    ways[forward.astype(np.int64), groups] = True
    found: NDArray[np.bool_] = (ways[0] & ways[1])[groups]
    return found


def _contradictions(groups: Indices, forward: NDArray[np.bool_], places: array[int]) -> Contradictions:
    """What is said both ways, given the group and the way of each row."""
    members = np.flatnonzero(_both_ways(groups, forward))
    firsts: dict[int, dict[bool, int]] = {}
    for index in members:
        firsts.setdefault(int(groups[index]), {}).setdefault(bool(forward[index]), places[index])
    examples = sorted((min(ways.values()), max(ways.values())) for ways in firsts.values())
    return Contradictions(examples, {places[index] for index in members})


def _cycles(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Cycles that share no pair, until none is left without their pairs; in time linear in the number of pairs.

    A walk goes along pairs, each of them once. Where it comes back to itself it has closed a cycle, whose pairs are
    taken out; where it can go no further, the last pair is on no cycle of those that are left.
    """
    onward: dict[int, list[int]] = {}
    for better, worse in pairs:
        onward.setdefault(better, []).append(worse)
    found: list[list[Pair]] = []
    for start in onward:
        walk = {start: 0}
        path = [start]
        while path:
            following = onward.get(path[-1])
            if not following:
                del walk[path.pop()]
                continue
            node = following.pop()
            if node not in walk:
                walk[node] = len(path)
                path.append(node)
                continue
            cycle = path[walk[node] :]
            found.append(list(pairwise([*cycle, node])))
            for each in cycle[1:]:
                del walk[each]
            del path[walk[node] + 1 :]
    return found


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
