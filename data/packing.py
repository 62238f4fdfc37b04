"""How trees stand in one packed row, and the groups of similar length in which attention is computed.

Some libraries make a kernel for every new shape of a product, which takes longer than the product. A packing may
therefore be `rounded`: the row ends with padding and groups have sizes such that few shapes occur.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from data.tree import Tree

MULTIPLE = 32
"""Widths are rounded up to it: products of matrices are up to twice as fast per element."""
DIGITS = 4
"""Binary digits of a rounded number: eight numbers between one power of two and the next, 4% too much on average and
12.5% at most."""
SIMILAR = 0.8
"""A tree joins a group whose longest tree is not longer than its own length over this."""


def rounded_up(count: int) -> int:
    """The next of few numbers: a multiple of 32 that needs no more than four binary digits but for zeros behind."""
    step = max(MULTIPLE, 1 << max(0, count.bit_length() - DIGITS))
    return -(-count // step) * step


@dataclass(frozen=True)
class Span:
    """Where one tree stands in a packed row: its prompt, then its branches, without a gap."""

    start: int
    prompt: int
    branches: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the prompt and all branches."""
        return self.prompt + sum(self.branches)

    @property
    def stop(self) -> int:
        """One past its last token."""
        return self.start + self.length

    @property
    def causal(self) -> bool:
        """Whether plain causal attention serves: there is one branch only."""
        return len(self.branches) == 1


@dataclass(frozen=True, eq=False)
class Group:
    """Trees that are padded to one width."""

    spans: tuple[Span, ...]
    width: int

    @property
    def causal(self) -> bool:
        """Whether plain causal attention serves all of them."""
        return all(span.causal for span in self.spans)


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the trees stand in a packed row. Equal to itself only, so that what is made of it can be kept by it."""

    spans: tuple[Span, ...]
    padding: int = 0
    """Tokens behind the last tree that nothing is read of."""
    rounded: bool = False
    """Whether groups have few sizes."""

    @classmethod
    def of(cls, trees: Sequence[Tree], width: int | None = None) -> Packing:
        """Trees one after another; in a row of a given width, rounded.

        Raises:
            ValueError: The trees do not fit the width.
        """
        stops = list(accumulate(tree.length for tree in trees))
        if width is not None and width < stops[-1]:
            raise ValueError(f"{stops[-1]} tokens do not fit a row of {width}")
        spans = tuple(_span(tree, stop - tree.length) for tree, stop in zip(trees, stops, strict=True))
        return cls(spans) if width is None else cls(spans, width - stops[-1], rounded=True)

    @property
    def width(self) -> int:
        """Tokens of the row, padding included."""
        return self.spans[-1].stop + self.padding

    @property
    def sequences(self) -> tuple[Span, ...]:
        """The trees' spans, and one for the padding."""
        return (*self.spans, Span(self.spans[-1].stop, self.padding, ())) if self.padding else self.spans

    @property
    def causal(self) -> bool:
        """Whether all trees have one branch."""
        return all(span.causal for span in self.spans)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Spans of similar length together, so that padding a group to its longest wastes little.

        Trees with one branch are kept apart from those with several, since they need no mask.
        """
        found: list[list[Span]] = []
        for span in sorted(self.spans, key=lambda span: (span.causal, -span.length, span.start)):
            longest = found[-1][0] if found else None
            if longest and longest.causal == span.causal and span.length >= SIMILAR * longest.length:
                found[-1].append(span)
            else:
                found.append([span])
        return tuple(Group(tuple(part), self._width(part)) for group in found for part in self._parts(group))

    def _parts(self, group: list[Span]) -> Iterator[list[Span]]:
        """Rounded, a group is taken apart into powers of two."""
        while self.rounded and group:
            count = 1 << (len(group).bit_length() - 1)
            yield group[:count]
            group = group[count:]
        if group:
            yield group

    def _width(self, group: list[Span]) -> int:
        longest = group[0].length
        return rounded_up(longest) if self.rounded else -(-longest // MULTIPLE) * MULTIPLE


def _span(tree: Tree, start: int) -> Span:
    return Span(start, len(tree.prompt), tuple(len(branch.tokens) for branch in tree.branches))


__all__ = ["Group", "Packing", "Span"]
