"""Trees on disk: appended one by one, read one by one, so that memory does not grow with their number.

tokens.u4      the tokens of all segments; the highest bit says that a token is read
segments.i8    where each segment ends in `tokens.u4`; a tree's first is its prompt, then come its branches
trees.bin      per tree: where its segments and its origin end, and its numbers
origins.utf8   the origins, end to end
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data.arrays import PLACE, TOKEN, ArrayWriter, mapped
from data.lazy import LazySequence
from data.tree import Branch, Tree

TOKENS, SEGMENTS, TREES, ORIGINS = "tokens.u4", "segments.i8", "trees.bin", "origins.utf8"
READ = 1 << 31
"""Set in the tokens that are read; token ids are below it."""
RECORD = np.dtype(
    [("segments", PLACE), ("origin", PLACE), ("number", PLACE), ("cut", PLACE), ("margin", np.dtype("<f8"))]
)


class TreeWriter:
    """Writes a `TreeStore` into a directory, which it creates; a context manager that closes the files."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._files = ExitStack()
        self._tokens, self._segments, self._trees, self._origins = (
            self._files.enter_context(ArrayWriter(directory / name, kind))
            for name, kind in ((TOKENS, TOKEN), (SEGMENTS, PLACE), (TREES, RECORD), (ORIGINS, "u1"))
        )
        self._written = {"tokens": 0, "segments": 0, "origin": 0}

    def append(self, tree: Tree) -> None:
        """Write one tree.

        Raises:
            OverflowError: A token id is negative or has more than 31 bits.
        """
        self._write_segment(np.asarray(tree.prompt, "<i4"))
        for branch in tree.branches:
            self._write_segment(np.asarray(branch.tokens, "<i4"), np.asarray(branch.read))
        origin = tree.origin.encode("utf-8", "surrogatepass")  # a file's name need not be UTF-8
        self._origins.append(np.frombuffer(origin, "u1"))
        self._written["origin"] += len(origin)
        ends = self._written["segments"], self._written["origin"]
        self._trees.append(np.array((*ends, tree.number, tree.cut, tree.margin), RECORD))

    def extend(self, trees: Iterable[Tree]) -> None:
        """Write trees."""
        for tree in trees:
            self.append(tree)

    def _write_segment(self, tokens: NDArray[np.int32], read: NDArray[np.bool_] | None = None) -> None:
        if tokens.min() < 0:
            raise OverflowError(f"token id {tokens.min()}")
        marked = tokens.astype(TOKEN)
        if read is not None:
            marked[read] |= READ
        self._tokens.append(marked)
        self._written["tokens"] += len(marked)
        self._written["segments"] += 1
        self._segments.append(self._written["tokens"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()


class TreeStore(LazySequence[Tree]):
    """The trees in a directory, equal to those that were written, but for their numbers if `first` says so.

    Args:
        directory: Where a `TreeWriter` wrote.
        first: Added to every tree's number, so that the trees of several stores keep numbers of their own.
    """

    def __init__(self, directory: Path, first: int = 0) -> None:
        self._first = first
        self._tokens = mapped(directory / TOKENS, TOKEN)
        self._segments = mapped(directory / SEGMENTS, PLACE)
        self._trees = mapped(directory / TREES, RECORD)
        self._origins = mapped(directory / ORIGINS, "u1")

    def __len__(self) -> int:
        return len(self._trees)

    def item(self, place: int) -> Tree:
        start, text = self._trees[place - 1][["segments", "origin"]].item() if place else (0, 0)
        stop, text_end, number, cut, margin = self._trees[place].item()
        prompt, *branches = self._read(start, stop)
        return Tree(
            prompt=tuple(prompt.tolist()),
            branches=tuple(map(_branch, branches)),
            number=self._first + number,
            margin=margin,
            origin=self._origins[text:text_end].tobytes().decode("utf-8", "surrogatepass"),
            cut=cut,
        )

    def _read(self, start: int, stop: int) -> list[NDArray[Any]]:
        """The tokens of segments `start` to `stop`."""
        before = int(self._segments[start - 1]) if start else 0
        ends = [before, *self._segments[start:stop].tolist()]
        return [self._tokens[first:last] for first, last in pairwise(ends)]


def _branch(tokens: NDArray[Any]) -> Branch:
    return Branch(tuple((tokens & (READ - 1)).tolist()), tuple((tokens >= READ).tolist()))


__all__ = ["TreeStore", "TreeWriter"]
