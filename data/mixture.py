"""Mixtures of sources: how often each is gone through, which of its items a pass takes, and in what order.

Nothing here remembers what was taken before: a pass follows from the seed, the source's name and the pass's number,
so a training that goes on at item k takes what an uninterrupted one would have taken. Items are never copied.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

from data.lazy import LazySequence
from pipeline.config import Share
from pipeline.errors import DataError

Item = TypeVar("Item")
Given = TypeVar("Given", covariant=True)
FINEST = 10**9
"""Largest denominator of an exact number of epochs: a weight's 0.30000000000000004 is taken for three tenths."""


class Passes(Protocol[Given]):
    """What training goes over, pass after pass; the first pass is not empty, and its length is `len`."""

    def __len__(self) -> int: ...
    def pass_(self, number: int) -> Sequence[Given]:
        """What a pass takes, before it is shuffled; the same at every call."""


def epochs(sizes: Mapping[str, int], shares: Mapping[str, Share] | None) -> dict[str, float]:
    """Passes over each source in one pass over the mixture.

    By weight, the mixture is as long as all sources together, and a source is repeated until it has its share of it.

    Args:
        sizes: Size of each source, in examples or in tokens: what weights are shares of.
        shares: Share of each source, all `epochs` or all `weight`; None takes every source whole.

    Raises:
        DataError: A source that has a share is empty.
    """
    if shares is None:
        return dict.fromkeys(sizes, 1.0)
    for name in shares:
        if not sizes[name]:
            raise DataError("no usable rows for the mixture", where=name, hint="leave this source out, or check it")
    weights = {name: share.weight for name, share in shares.items() if share.weight is not None}
    unit = sum(sizes[name] for name in shares) / sum(weights.values()) if weights else 0.0
    by_weight = {name: weight * unit / sizes[name] for name, weight in weights.items()}
    return {name: share.epochs or by_weight[name] for name, share in shares.items()}


def draws(count: int, epochs: float, number: int, seed: int, name: str) -> Sequence[int]:
    """Indices that a pass takes from a source.

    Every whole epoch takes each row once. A fraction takes the next part of a permutation and goes on where the pass
    before ended, so that after n passes each row was taken floor(n * epochs) or ceil(n * epochs) times.

    Args:
        count: Rows of the source.
        epochs: Times the source is gone through in a pass.
        number: Number of the pass, from 0.
        seed: The run's.
        name: The source's; sources of one mixture are permuted differently.

    Returns:
        The whole epochs' indices in order, then the fraction's. With `epochs == 1`, `range(count)`.
    """
    rate = _exact(epochs)
    whole = rate.numerator // rate.denominator
    start, stop = (_position(count, rate - whole, each) for each in (number, number + 1))
    if whole == 1 and start == stop:
        return range(count)
    taken = array("q", range(count)) * whole
    for permutation in range(start // count, -(-stop // count)):
        order = shuffled(count, f"{seed} {name} permutation {permutation}")
        first = permutation * count
        taken.extend(order[max(start - first, 0) : min(stop - first, count)])
    return taken


def shuffled(count: int, seed: str) -> array[int]:
    """The numbers 0 to `count` - 1 in an order that depends on the seed only; 8 bytes each."""
    order = array("q", range(count))
    random.Random(seed).shuffle(order)
    return order


class Mixture(Generic[Item]):
    """Several sequences of items, of each of which a pass takes its share.

    Its length is that of its first pass; other passes may be longer or shorter by one item for every source.

    Args:
        sources: Name -> items, which are indexed when they are needed.
        shares: Name -> share; weights are shares of the items. None takes every source whole.
        seed: What the parts of sources depend on that a pass does not take whole.

    Raises:
        DataError: A source is empty, or nothing is left of all in a pass.
    """

    def __init__(self, sources: Mapping[str, Sequence[Item]], shares: Mapping[str, Share] | None, seed: int) -> None:
        self.epochs = epochs({name: len(items) for name, items in sources.items()}, shares)
        self._sources = {name: sources[name] for name in self.epochs}
        self._seed = seed
        if not len(self):
            hint = "raise `epochs`, or give more data"
            raise DataError("a pass over the mixture takes no row", where=", ".join(self._sources), hint=hint)

    def __len__(self) -> int:
        return len(self.pass_(0))

    def pass_(self, number: int) -> Sequence[Item]:
        """The items of a pass, in the order of the sources."""
        return _Joined([self._part(name, number) for name in self._sources])

    def _part(self, name: str, number: int) -> _Part[Item]:
        source, rate = self._sources[name], self.epochs[name]
        draw = partial(draws, len(source), rate, number, self._seed, name)
        return _Part(source, _drawn(len(source), rate, number), draw)


def joined(sequences: Iterable[Sequence[Item]]) -> Sequence[Item]:
    """Sequences one after the other; their items are indexed when they are needed."""
    return _Joined([_Part(each, len(each), partial(range, len(each))) for each in sequences])


def stream(items: Passes[Item] | Sequence[Item], seed: int, start: int = 0) -> Iterator[Item]:
    """Pass after pass without end, each in an order of its own that depends on the seed and the pass only.

    Args:
        items: A mixture, or a sequence that every pass takes whole; not empty.
        seed: The run's.
        start: Items to leave out at the beginning; they are not looked at.
    """
    number, skipped = 0, start
    while True:
        taken = items if isinstance(items, Sequence) else items.pass_(number)
        if skipped < len(taken):
            order = shuffled(len(taken), f"{seed} pass {number}")
            yield from (taken[index] for index in order[skipped:])
        skipped = max(skipped - len(taken), 0)
        number += 1


@dataclass
class _Part(Generic[Item]):
    """Items of one source; which ones is worked out when the first is asked for."""

    source: Sequence[Item]
    count: int
    draw: Callable[[], Sequence[int]]

    @cached_property
    def indices(self) -> Sequence[int]:
        return self.draw()


class _Joined(LazySequence[Item]):
    """Parts one after the other."""

    def __init__(self, parts: Sequence[_Part[Item]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(part.count for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def item(self, place: int) -> Item:
        number = bisect_right(self._ends, place)
        part = self._parts[number]
        return part.source[part.indices[place - self._ends[number] + part.count]]


def _exact(epochs: float) -> Fraction:
    return Fraction(epochs).limit_denominator(FINEST)


def _position(count: int, fraction: Fraction, passes: int) -> int:
    """Rows that the fractions of this many passes took, rounded half up."""
    return (2 * passes * fraction * count + 1) // 2


def _drawn(count: int, epochs: float, number: int) -> int:
    """How many rows `draws` gives."""
    rate = _exact(epochs)
    return _position(count, rate, number + 1) - _position(count, rate, number)
