"""How trees stand in one packed row, and the groups of similar length in which attention is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from data.tree import Tree

MULTIPLE = 32
"""Widths are rounded up to it: products of matrices are up to twice as fast per element."""
SIMILAR = 0.8
"""A tree joins a group whose longest tree is not longer than its own length over this."""


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

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> Packing:
        """Trees one after another."""
        stops = accumulate(tree.length for tree in trees)
        return cls(tuple(_span(tree, stop - tree.length) for tree, stop in zip(trees, stops, strict=True)))

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
        return tuple(Group(tuple(group), -(-group[0].length // MULTIPLE) * MULTIPLE) for group in found)


def _span(tree: Tree, start: int) -> Span:
    return Span(start, len(tree.prompt), tuple(len(branch.tokens) for branch in tree.branches))


__all__ = ["Group", "Packing", "Span"]
