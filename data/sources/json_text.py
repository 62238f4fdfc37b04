"""Where the values of a JSON text begin and end, found without holding more than one of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import BinaryIO

from data.sources.lines import characters

CHUNK = 1 << 16
SPACE = re.compile(rb"[ \t\r\n]*+")
SCALAR = re.compile(rb'[^\[\]{}," \t\r\n]*+')
TO_BRACKET = re.compile(rb'(?:[^\[\]{}"]*"[^"\\]*(?:\\.[^"\\]*)*")*+[^\[\]{}"]*+', re.DOTALL)
"""Everything up to the next bracket, or up to a string that goes on after this chunk."""
IN_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Value:
    """The text of one value."""

    content: bytes
    """Its beginning, at least as much as is to be kept."""
    characters: int
    """The length of the whole value."""
    complete: bool
    """Whether it ends before the file does."""


class JsonText:
    """A place in a JSON text, which moves on value by value.

    Args:
        stream: The text.
        size: Bytes that are read at once.
        limit: Bytes of a value that are kept.
    """

    def __init__(self, stream: BinaryIO, size: int, limit: int) -> None:
        self.line = 1
        self._stream = stream
        self._size = size
        self._limit = limit
        self._chunk = b""
        self._at = 0
        self._kept: list[bytes] = []
        self._room = 0
        self._dropped = 0

    def peek(self) -> bytes:
        """The next byte that is not white space; nothing at the end of the file."""
        self._pass(SPACE)
        return self._next()

    def skip(self) -> None:
        """Move past one byte."""
        self._take(self._at + 1)

    def excerpt(self) -> str:
        """The beginning of what comes next, for messages."""
        return self._chunk[self._at : self._at + 20].decode("utf-8", "replace")

    def value(self) -> Value:
        """Move past the value that begins here."""
        self._kept, self._room, self._dropped = [], self._limit, 0
        complete = self._pass_value()
        content = b"".join(self._kept)
        return Value(content, characters(content) + self._dropped, complete)

    def _pass_value(self) -> bool:
        depth = 0
        while mark := self._next():
            if mark == b'"':
                if not self._pass_string():
                    return False
            elif mark in b"[{":
                depth += 1
                self.skip()
            elif mark in b"]}":
                depth -= 1
                self.skip()
            else:
                self._pass(SCALAR)
            if depth <= 0:
                return True
            self._pass(TO_BRACKET)
        return False

    def _pass_string(self) -> bool:
        self.skip()
        self._pass(IN_STRING)
        while self._next() == b"\\":  # the chunk ends between it and what it escapes
            if not self._read_on():
                self.skip()
            self._pass(IN_STRING)
        closed = self._next() == b'"'
        if closed:
            self.skip()
        return closed

    def _next(self) -> bytes:
        if self._at == len(self._chunk):
            self._read_on()
        return self._chunk[self._at : self._at + 1]

    def _pass(self, pattern: re.Pattern[bytes]) -> None:
        """Move past all that a pattern matches, over as many chunks as it goes on for."""
        while True:
            match = pattern.match(self._chunk, self._at)
            assert match is not None  # each of them matches nothing, too
            self._take(match.end())
            if self._at < len(self._chunk) or not self._read_on():
                return

    def _take(self, end: int) -> None:
        piece = self._chunk[self._at : end]
        self._at = end
        self.line += piece.count(b"\n")
        if self._room > 0:
            self._kept.append(piece)
            self._room -= len(piece)
        else:
            self._dropped += characters(piece)

    def _read_on(self) -> bool:
        more = self._stream.read(self._size)
        self._chunk = self._chunk[self._at :] + more
        self._at = 0
        return bool(more)
