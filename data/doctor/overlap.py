"""Prompts that stand on both sides: among those that are trained on, and among those that are kept from training.

A prompt is kept from training when it is held out, or when other data, such as an evaluation suite, has it. What stands
before each of the assistant's turns of a conversation is a prompt of its own, because each of these turns is trained
on. Two prompts are compared as a whole, by their words, and by runs of 13 words; turns of the system do not count. All
runs are written to a temporary file, 12 bytes each, so that memory does not grow with their number. Documents are
compared as a whole only; `prepare.decontaminate` looks for runs of words in them.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from data import ngrams
from data.doctor.keys import NONE, Indices, Lookup, as_numbers, key, turn_key
from data.findings import LEAK_EXACT, LEAK_NGRAMS, LEAK_NORMALISED, Kind
from data.schema import Conversation, Message, Row, Text
from pipeline.errors import StorageError

PARTS = 64
RUNS_AT_ONCE = 200_000

_RECORD = np.dtype([("run", "<u8"), ("place", "<u4")])
_EDGES = np.array([part << 58 for part in range(1, PARTS)], np.uint64)

Records = NDArray[np.void]


@dataclass(frozen=True)
class Leak:
    """A prompt that is trained on although it is kept from training elsewhere; places as indices."""

    kind: Kind
    trained: int
    kept: int


class Overlap:
    """Prompts of both sides: 24 bytes each, and their runs of words on disk."""

    def __init__(self) -> None:
        self._trained, self._kept = _Side(), _Side()

    def add(self, row: Row, place: int, *, kept: bool) -> None:
        """Take in a row's prompts.

        Args:
            row: The row.
            place: Index of the row's place.
            kept: Whether it is kept from training.
        """
        side = self._kept if kept else self._trained
        said = side.add(*_turns(row), place)
        if not isinstance(row, Text):
            side.runs.add(ngrams.runs(ngrams.word_hashes(said), ngrams.RUN), place)

    def leaks(self) -> list[Leak]:
        """Prompts that are trained on and kept from training: each once, by its gravest kind, with the first that it
        was found in."""
        trained, kept = self._trained, self._kept
        found: dict[int, Leak] = {}
        for kind, ours, theirs in (
            (LEAK_EXACT, trained.exact, kept.exact),
            (LEAK_NORMALISED, trained.normalised, kept.normalised),
        ):
            partner = Lookup(as_numbers(theirs)).find(as_numbers(ours))
            for index in np.flatnonzero(partner != NONE):
                place = trained.places[index]
                found.setdefault(place, Leak(kind, place, kept.places[partner[index]]))
        for place, other in _shared(trained.runs, kept.runs).items():
            found.setdefault(place, Leak(LEAK_NGRAMS, place, other))
        return [found[place] for place in sorted(found)]


def prompt_keys(row: Row) -> Iterator[bytes]:
    """A key of each of a row's prompts, by which two that are the same word for word are known."""
    return _exact(*_turns(row))


class _Side:
    """Prompts of one side."""

    def __init__(self) -> None:
        self.places = array("L")
        self.exact = bytearray()
        self.normalised = bytearray()
        self.runs = _Runs()

    def add(self, turns: list[Message], ends: set[int], place: int) -> list[str]:
        """Take in the prompts that consist of the first so many turns each; returns the words of all turns."""
        self.exact += b"".join(_exact(turns, ends))
        normalised = blake2b(digest_size=8)
        said: list[str] = []
        for count, turn in enumerate(turns, start=1):
            words = ngrams.words(turn.content)
            normalised.update("".join(words).encode("utf-8", "surrogatepass"))
            said += words
            if count in ends:
                self.places.append(place)
                # Prompts without a word are equal to nothing but themselves.
                self.normalised += normalised.digest() if said else key(b"\0%d" % place)
        return said


class _Runs:
    """Runs of words with their places, on disk, in pieces that are sorted by the runs."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._waiting: list[Records] = []
        self._waiting_runs = 0
        self._written = 0
        self._bounds: list[Indices] = []

    def add(self, hashes: ngrams.Hashes, place: int) -> None:
        """Take in the runs of one text."""
        if not len(hashes):
            return
        records = np.empty(len(hashes), _RECORD)
        records["run"], records["place"] = hashes, place
        self._waiting.append(records)
        self._waiting_runs += len(records)
        if self._waiting_runs >= RUNS_AT_ONCE:
            self._write()

    def part(self, number: int) -> Iterator[Records]:
        """The runs of one of the parts that their values are divided into, piece by piece."""
        self._write()
        for bounds in self._bounds:
            start, end = int(bounds[number]), int(bounds[number + 1])
            self._file.seek(start * _RECORD.itemsize)
            yield np.frombuffer(self._file.read((end - start) * _RECORD.itemsize), _RECORD)

    def _write(self) -> None:
        if not self._waiting:
            return
        records = np.concatenate(self._waiting)
        records = records[np.argsort(records["run"], kind="stable")]
        inner = np.searchsorted(records["run"], _EDGES)
        self._bounds.append(self._written + np.concatenate([[0], inner, [len(records)]]))
        self._append(records.tobytes())
        self._written += len(records)
        self._waiting.clear()
        self._waiting_runs = 0

    def _append(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            self._file.seek(0, os.SEEK_END)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            what = f"temporary file cannot be written: {error.strerror}"
            hint = "make space, or set TMPDIR to a directory with more"
            raise StorageError(what, where=tempfile.gettempdir(), hint=hint) from error


def _turns(row: Row) -> tuple[list[Message], set[int]]:
    """The turns of a row's prompts without those of the system, and after how many of them a prompt ends."""
    if isinstance(row, Text):
        return [Message("user", row.text)], {1}
    turns = [message for message in row.prompt if message.role != "system"]
    ends = {len(turns)}
    if isinstance(row, Conversation):
        ends.update(before for before, turn in enumerate(turns) if turn.role == "assistant")
    return turns, ends


def _exact(turns: list[Message], ends: set[int]) -> Iterator[bytes]:
    digest = blake2b(digest_size=8)
    for count, turn in enumerate(turns, start=1):
        digest.update(turn_key(turn))
        if count in ends:
            yield digest.digest()


def _shared(trained: _Runs, kept: _Runs) -> dict[int, int]:
    """Places of trained texts with a run that a kept text has, and for each the first such text."""
    found: dict[int, int] = {}
    for part in range(PARTS):
        theirs = np.concatenate([np.empty(0, _RECORD), *kept.part(part)])
        if not len(theirs):
            continue
        lookup = Lookup(theirs["run"])
        for ours in trained.part(part):
            partner = lookup.find(ours["run"])
            hits = np.flatnonzero(partner != NONE)
            for place, other in zip(ours["place"][hits].tolist(), theirs["place"][partner[hits]].tolist(), strict=True):
                found[place] = min(other, found.get(place, other))
    return found
