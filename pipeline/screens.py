"""Where a chat happens: a terminal with a person before it, or a pipe.

What a model says is shown as everything else that comes from nobody knows where: control, bidirectional and invisible
characters as escapes, each by itself, so that a sequence which comes in pieces is none either.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping
from typing import NoReturn, Protocol

from rich.table import Table
from rich.text import Text

from pipeline import terminal
from pipeline.errors import DataError
from pipeline.terminal import printable, printable_lines

NARROWEST = 24
"""Characters of a column below which answers stand one below another."""

Answers = Mapping[str, Iterator[str]]
"""Model -> its answer, piece by piece."""


class Screen(Protocol):
    """What a chat needs."""

    def lines(self) -> Iterator[str]:
        """What is said, line by line, until the input ends."""

    def show(self, answers: Answers) -> list[str]:
        """Show the answers to one question; returns them whole.

        Raises:
            KeyboardInterrupt: The user stops them.
        """

    def say(self, text: str) -> None:
        """Tell the user something."""

    def refuse(self, text: str) -> None:
        """Tell the user that the last line cannot be answered."""

    def stopped(self, text: str) -> None:
        """Tell the user that answers were stopped."""


class Terminal:
    """A person asks, and sees one answer as it comes, or several side by side."""

    def __init__(self, greeting: str) -> None:
        self._console = terminal.console()
        self._greeting = greeting

    def lines(self) -> Iterator[str]:
        """What is typed; ctrl-C drops a line that is being typed."""
        with contextlib.suppress(ImportError):  # it is not everywhere, and lets lines be edited
            import readline  # noqa: F401
        _be_lenient(sys.stdin)
        self.say(self._greeting)
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                self._console.print()
            except EOFError:
                self._console.print()
                return

    def show(self, answers: Answers) -> list[str]:
        """The answers as people read them."""
        if len(answers) == 1:
            return [self._stream(*answers.values())]
        texts = {name: self._whole(name, pieces) for name, pieces in answers.items()}
        if self._console.width >= NARROWEST * len(texts):
            self._console.print(_columns(texts), soft_wrap=False)
        else:
            for name, text in texts.items():
                self._console.print(f"{printable(name)}: {printable_lines(text)}")
        return list(texts.values())

    def say(self, text: str) -> None:
        """A line in parentheses."""
        self._console.print(f"({printable(text, None)})")

    refuse = say

    def stopped(self, text: str) -> None:
        """The same, on a line of its own."""
        self._console.print()
        self.say(text)

    def _stream(self, pieces: Iterator[str]) -> str:
        told = []
        for piece in pieces:
            told.append(piece)
            sys.stdout.write(printable_lines(piece))
            sys.stdout.flush()
        self._console.print()
        return "".join(told)

    def _whole(self, name: str, pieces: Iterator[str]) -> str:
        with self._console.status(Text(f"{printable(name)} answers")):
            return "".join(pieces)


class Pipe:
    """One answer a line for every question; with several models, each line begins with the name and a tab."""

    def __init__(self) -> None:
        self._read = 0

    def lines(self) -> Iterator[str]:
        """The lines of standard input."""
        _be_lenient(sys.stdin)
        for line in sys.stdin:
            self._read += 1
            yield line.rstrip("\n")

    def show(self, answers: Answers) -> list[str]:
        """The answers, line breaks escaped."""
        texts = []
        for name, pieces in answers.items():
            texts.append("".join(pieces))
            prefix = f"{printable(name)}\t" if len(answers) > 1 else ""
            sys.stdout.write(f"{prefix}{printable(texts[-1], None)}\n")
            sys.stdout.flush()
        return texts

    def say(self, text: str) -> None:
        """A line that is no answer."""
        terminal.console(stderr=True).print(printable(text, None))

    def refuse(self, text: str) -> NoReturn:
        """A script that goes on would take the next answer for this one's.

        Raises:
            DataError: Always.
        """
        raise DataError(text, where=f"standard input:{self._read}")

    def stopped(self, text: str) -> NoReturn:
        """End.

        Raises:
            KeyboardInterrupt: Always.
        """
        raise KeyboardInterrupt


def _be_lenient(stream: object) -> None:
    """Bytes that are no text become replacement characters, instead of an error."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def _columns(texts: Mapping[str, str]) -> Table:
    table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0))
    for name in texts:
        table.add_column(Text(printable(name)), ratio=1, overflow="fold")
    table.add_row(*(Text(printable_lines(text)) for text in texts.values()))
    return table
