"""Documents laid end to end and cut into blocks of equal length: the examples of pretraining.

The documents that a pass takes from all sources are laid in one shuffled order. Where every source is taken whole,
or a whole number of times, the blocks of all passes are the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.document_store import DocumentStore
from data.lazy import LazySequence
from data.mixture import draws, epochs, shuffled
from data.tree import Branch, Tree
from pipeline.config import Share

NAMED = 4
"""Documents of a block whose origin is told."""


class DocumentMixture:
    """The documents of several sources, of each of which a pass takes its share.

    Args:
        stores: Name -> documents.
        shares: Name -> share; weights are shares of the tokens. None takes every source whole, also an empty one.
        seed: What the order of documents depends on.

    Raises:
        DataError: A source that has a share is empty.
    """

    def __init__(self, stores: Mapping[str, DocumentStore], shares: Mapping[str, Share] | None, seed: int) -> None:
        self.epochs = epochs({name: store.tokens for name, store in stores.items()}, shares)
        self._counts = {name: len(stores[name]) for name in self.epochs}
        self._documents = _Documents(stores[name] for name in self.epochs)
        self._seed = seed

    def blocks(self, length: int, apart: bool = False) -> BlockPasses:
        """The mixture's passes in blocks of `length` tokens; with `apart` they say where documents begin."""
        return BlockPasses(self, length, apart)

    def pass_(self, number: int, length: int, apart: bool = False) -> Blocks:
        """A pass in blocks of `length` tokens, from which shuffling may choose."""
        taken = self._taken(number)
        laid = taken[shuffled(len(taken), f"{self._seed} documents")]
        return Blocks(self._documents, laid, length, apart)

    def _taken(self, number: int) -> NDArray[np.int64]:
        """Numbers of the documents that a pass takes, counted over all sources."""
        first = 0
        taken = [np.empty(0, np.int64)]
        for name, count in self._counts.items():
            rows = draws(count, self.epochs[name], number, self._seed, name) if count else ()
            taken.append(first + np.asarray(rows, np.int64))
            first += count
        return np.concatenate(taken)


class BlockPasses:
    """Passes over blocks; of these the one last asked for is kept."""

    def __init__(self, documents: DocumentMixture, length: int, apart: bool = False) -> None:
        self._documents = documents
        self._length = length
        self._apart = apart
        self._last: tuple[int, Blocks] | None = None

    def __len__(self) -> int:
        return len(self.pass_(0))

    def pass_(self, number: int) -> Blocks:
        """The blocks of a pass in the order in which they are laid."""
        if self._last is None or self._last[0] != number:
            self._last = number, self._documents.pass_(number, self._length, self._apart)
        return self._last[1]


class Blocks(LazySequence[Tree]):
    """Blocks as trees, each cut when it is asked for: the first token is the prompt, the rest is read.

    The last block is left out when it is incomplete. No token is padding.

    Args:
        documents: The documents of all sources.
        order: Numbers of documents in the order they are laid; one may come several times, or not at all.
        length: Tokens of a block, at least 2.
        apart: Whether the trees say where documents begin.
    """

    def __init__(self, documents: _Documents, order: NDArray[np.int64], length: int, apart: bool = False) -> None:
        self._documents = documents
        self._apart = apart
        self._order = order
        self._ends = np.cumsum(documents.lengths[order])
        self._length = length

    def __len__(self) -> int:
        return int(self._ends[-1]) // self._length if len(self._ends) else 0

    def item(self, place: int) -> Tree:
        start = place * self._length
        prompt, *rest = self._tokens(start)
        starts = self._starts(start) if self._apart else ()
        return Tree((prompt,), (Branch.of(rest),), place, origin=self._origin(start), starts=starts)

    def _origin(self, start: int) -> str:
        """Where the documents are from that have tokens in the block that begins at `start`; of many the first few."""
        first, last = np.searchsorted(self._ends, (start, start + self._length - 1), side="right")
        named = [self._documents.origin(int(number)) for number in self._order[first : first + NAMED]]
        named = named[: last + 1 - first]
        more = [f"{last + 1 - first - NAMED} more"] if last + 1 - first > NAMED and any(named) else []
        return " + ".join([*filter(None, named), *more])

    def _starts(self, start: int) -> tuple[int, ...]:
        """Where documents begin after the first token of the block that begins at `start`."""
        first, last = np.searchsorted(self._ends, (start, start + self._length - 1), side="right")
        return tuple((self._ends[first:last] - start).tolist())

    def _tokens(self, start: int) -> Iterator[int]:
        """The tokens of the block that begins at `start`, from as many documents as it takes."""
        stop = start + self._length
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            document = self._documents[int(self._order[place])]
            end = int(self._ends[place])
            skipped = len(document) - (end - start)
            yield from document[skipped : skipped + stop - start].tolist()
            start, place = end, place + 1


class _Documents:
    """The documents of several stores, numbered on from one store to the next."""

    def __init__(self, stores: Iterable[DocumentStore]) -> None:
        self._stores = list(stores)
        self._ends = list(accumulate(map(len, self._stores)))
        self.lengths = np.concatenate([store.lengths for store in self._stores])

    def __getitem__(self, number: int) -> NDArray[Any]:
        store, document = self._place(number)
        return store[document]

    def origin(self, number: int) -> str:
        """Where a document is from."""
        store, document = self._place(number)
        return store.origin(document)

    def _place(self, number: int) -> tuple[DocumentStore, int]:
        """The store of a document, and its number there."""
        which = bisect_right(self._ends, number)
        return self._stores[which], number - self._ends[which] + len(self._stores[which])


__all__ = ["BlockPasses", "Blocks", "DocumentMixture"]
