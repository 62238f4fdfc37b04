"""What the doctor remembers of rows: short keys that stand for texts, and places, both in little memory.

A key is a 64-bit BLAKE2b hash. Among a million texts, two different ones share a key with a chance of one in forty
million.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from data.schema import Message
from data.split import canonical

Keys = NDArray[np.uint64]
Indices = NDArray[np.int64]
NONE = np.iinfo(np.int64).max
"""Stands for no index."""

_DIGITS = "0123456789"
_MOST_DIGITS = 18


def key(data: bytes) -> bytes:
    """Eight bytes that stand for any number of bytes."""
    return blake2b(data, digest_size=8).digest()


def text_key(text: str) -> bytes:
    """The key of a text, whatever white space stands at its ends."""
    return key(text.strip().encode("utf-8", "surrogatepass"))


def messages_key(messages: Iterable[Message]) -> bytes:
    """The key of turns: their roles and texts."""
    return key(b"".join(message.role.encode() + b"\0" + text_key(message.content) for message in messages))


def turn_key(message: Message) -> bytes:
    """The key of a turn, however it is composed and spaced."""
    return key(message.role.encode() + b"\0" + canonical(message.content).encode("utf-8", "surrogatepass"))


def as_numbers(keys: bytes | bytearray) -> Keys:
    """Keys that were written one after the other, as numbers; later ones do not show in it."""
    return np.frombuffer(bytes(keys), "<u8")


def repeats(keys: Keys) -> tuple[Indices, Indices]:
    """Where keys occur again.

    Returns:
        Indices of keys that occurred before, ascending, and for each the index of its first occurrence.
    """
    firsts, again = _first_of_each(keys)
    later = np.flatnonzero(firsts[again] != np.arange(len(keys)))
    return later, firsts[again][later]


class Lookup:
    """Keys among which others are looked for."""

    def __init__(self, keys: Keys) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._ordered = keys[self._order]

    def find(self, keys: Keys) -> Indices:
        """For each key, the index of the first equal one, or `NONE`."""
        if not len(self._ordered):
            return np.full(len(keys), NONE)
        nearest = np.minimum(np.searchsorted(self._ordered, keys), len(self._ordered) - 1)
        return np.where(self._ordered[nearest] == keys, self._order[nearest], NONE)


def _first_of_each(keys: Keys) -> tuple[Indices, Indices]:
    _, firsts, groups = np.unique(keys, return_index=True, return_inverse=True)
    return firsts.astype(np.int64), groups.astype(np.int64)


class Places:
    """Places of rows, `file:line` or `file:row N`, in the order in which they were added: 24 bytes each.

    Attributes:
        numbers: The rows' numbers, counted from 1 over their source.
    """

    def __init__(self) -> None:
        self.numbers = array("Q")
        self._heads: dict[str, int] = {}
        self._head_of = array("L")
        self._line_of = array("Q")

    def __len__(self) -> int:
        return len(self._head_of)

    def __getitem__(self, index: int) -> str:
        line = self._line_of[index]
        return list(self._heads)[self._head_of[index]] + (str(line) if line else "")

    def add(self, origin: str, number: int) -> int:
        """Keep a place; returns its index."""
        self.numbers.append(number)
        head = origin.rstrip(_DIGITS)
        line = origin[len(head) :]
        if line.startswith("0") or len(line) > _MOST_DIGITS:
            head, line = origin, ""
        self._head_of.append(self._heads.setdefault(head, len(self._heads)))
        self._line_of.append(int(line or 0))
        return len(self) - 1

    def together(self, indices: Sequence[int]) -> str:
        """Several places as one text: `a.jsonl:3 and b.jsonl:17`."""
        *first, last = (self[index] for index in indices)
        return f"{', '.join(first)} and {last}" if first else last
