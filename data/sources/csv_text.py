"""The records of a CSV text as fields of bytes.

A wrong quote costs the lines that it holds together: where their records begin and end is not known, so each is bad
and none becomes a row. What comes after them is read on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from data.sources.lines import SKIPPED_AT_ONCE, characters
from pipeline.errors import DataError

LINE_ENDS = (b"", b"\n", b"\r\n")


@dataclass(frozen=True, slots=True)
class Fields:
    """A record."""

    line: int
    """Where it begins."""
    values: list[bytes]
    raw: list[bytes]
    """Its lines."""


@dataclass(frozen=True, slots=True)
class Torn:
    """A line at which a record begins that a wrong quote spoils; the next one may begin on the next line."""

    line: int
    what: str


@dataclass(frozen=True, slots=True)
class Flood:
    """A record that is too long to be kept."""

    line: int
    characters: int


class _WrongQuote(Exception):
    """Quotes of a record that do not match; its text says which."""


class _TooLong(Exception):
    """A record that is longer than what may be kept."""


class CsvText:
    """A place in a CSV text, which moves on record by record.

    Args:
        stream: The text.
        limit: Bytes of a record that are kept.
        name: What the file is called in errors.
    """

    def __init__(self, stream: BinaryIO, limit: int, name: str) -> None:
        self.separator = b","
        self._stream = stream
        self._limit = limit
        self._name = name
        self._line = 1
        self._given_back: list[bytes] = []
        self._raw: list[bytes] = []
        self._torn = 0
        """The last line that a wrong quote holds together with one before it."""

    def first_line(self) -> bytes:
        """The first line that is not blank, which is read again afterwards."""
        self._start()
        line = self._raw[0] if self._raw else b""
        self._give_back(self._raw)
        return line

    def fields(self) -> Fields | Torn | Flood | None:
        """The next record; None at the end.

        Raises:
            DataError: a quote is not closed before the file ends, so that nothing after it can be read.
        """
        if not self._start():
            return None
        line = self._line_read()
        try:
            values = self._values()
        except _WrongQuote as wrong:
            self._torn = max(self._torn, self._line_read())
            self._give_back(self._raw[1:])
            return Torn(line, str(wrong))
        except _TooLong:
            return Flood(line, self._flood(line))
        if line <= self._torn:
            return Torn(line, "a quote before this line is not closed where it should be")
        return Fields(line, values, self._raw)

    def _line_read(self) -> int:
        """The number of the line that was read last."""
        return self._line - self._raw[-1].endswith(b"\n")

    def _start(self) -> bool:
        """Read the first line of a record; whether there is one."""
        self._raw = []
        while line := self._next():
            if line not in LINE_ENDS:
                self._raw = [line]
                return True
        return False

    def _next(self) -> bytes:
        line = self._given_back.pop() if self._given_back else self._stream.readline(self._limit)
        self._line += line.endswith(b"\n")
        return line

    def _give_back(self, lines: list[bytes]) -> None:
        self._given_back.extend(reversed(lines))
        self._line -= sum(line.endswith(b"\n") for line in lines)

    def _values(self) -> list[bytes]:
        line = self._raw[0]
        self._refuse_length(len(line), line)
        if b'"' not in line:
            return _without_end(line).split(self.separator)
        values: list[bytes] = []
        at = 0
        while True:
            number = len(values) + 1
            if line.startswith(b'"', at):
                value, at = self._quoted(at + 1, number)
                line = self._raw[-1]
            else:
                value, at = _plain(line, at, self.separator)
            values.append(value)
            if line.startswith(self.separator, at):
                at += 1
            elif line[at : at + 3] in LINE_ENDS:
                return values
            else:
                raise _WrongQuote(f"field {number}: text after the closing quote")

    def _quoted(self, at: int, number: int) -> tuple[bytes, int]:
        """A field whose text begins at `at` in the last line read, and where it ends in what is then the last."""
        parts = []
        before, opened = len(self._raw), self._line_read()
        size = sum(map(len, self._raw))
        while True:
            end = _closing_quote(self._raw[-1], at)
            parts.append(self._raw[-1][at:end])
            if end < len(self._raw[-1]):
                return b"".join(parts).replace(b'""', b'"'), end + 1
            line, at = self._next(), 0
            if not line:
                raise self._unclosed(number, opened, self._raw[before:])
            self._raw.append(line)
            size += len(line)
            self._refuse_length(size, line)

    def _unclosed(self, number: int, opened: int, after: list[bytes]) -> Exception:
        """The error for a quote that no other closes; it costs one line if that is the last."""
        what = f"field {number}: the quote is not closed before the file ends"
        if all(line in LINE_ENDS for line in after):
            return _WrongQuote(what)
        hint = "close it; a quote in a field is written twice"
        return DataError(f"{what}, and nothing after it can be read", where=f"{self._name}:{opened}", hint=hint)

    def _refuse_length(self, size: int, line: bytes) -> None:
        if size > self._limit or (len(line) == self._limit and not line.endswith(b"\n")):
            raise _TooLong

    def _flood(self, line: int) -> int:
        """Read a record to its end, keeping nothing; the number of its characters."""
        pieces, self._raw = self._raw, []
        found = sum(map(characters, pieces))
        quotes = sum(piece.count(b'"') for piece in pieces)
        piece = pieces[-1]
        while quotes % 2 or not piece.endswith(b"\n"):
            piece = self._given_back.pop() if self._given_back else self._stream.readline(SKIPPED_AT_ONCE)
            if not piece:
                break
            self._line += piece.endswith(b"\n")
            found += characters(piece)
            quotes += piece.count(b'"')
        if quotes % 2:
            what = f"a quote is not closed in the {found:,} characters before the file ends"
            raise DataError(what, where=f"{self._name}:{line}", hint="close it; a quote in a field is written twice")
        return found


def _closing_quote(line: bytes, at: int) -> int:
    """Where the quote is that ends a field; the line's end if it goes on in the next line."""
    while (end := line.find(b'"', at)) >= 0:
        if not line.startswith(b'"', end + 1):
            return end
        at = end + 2
    return len(line)


def _plain(line: bytes, at: int, separator: bytes) -> tuple[bytes, int]:
    """A field without quotes, and where it ends."""
    end = line.find(separator, at)
    if end >= 0:
        return line[at:end], end
    value = _without_end(line[at:])
    return value, at + len(value)


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")
