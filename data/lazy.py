"""Sequences whose items are made when they are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

Item = TypeVar("Item", covariant=True)


class LazySequence(Sequence[Item]):
    """A sequence that knows how to make the item at a place, counted from 0; a slice is a list."""

    @abstractmethod
    def item(self, place: int) -> Item:
        """Make an item."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        place = range(len(self))[index]
        return self.item(place) if isinstance(place, int) else [self.item(each) for each in place]
