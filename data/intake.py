"""What a stage takes in from a data source: examined, prepared, converted, and split into the sides of training.

Rows flow one by one, so memory does not grow with the source. Malformed rows are read to the end before they stop
a stage, so that one error names them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from data.doctor import Examination
from data.doctor.overlap import prompt_keys
from data.findings import LEAK_EXACT, BadRow, Finding, Findings
from data.formats import Record
from data.ngrams import NgramSet
from data.preparation import Preparer
from data.read import Reading, convert, fingerprint, scan, target
from data.schema import Conversation, Preference, Rated, Row, RowKind, Text
from data.split import is_held_out
from data.template import ChatTemplate
from pipeline.config import DataSource
from pipeline.errors import DataError
from pipeline.suites import LikelihoodSuite, Suite

REFUSALS_SHOWN = 10


@dataclass(frozen=True)
class Placed:
    """A usable row and the side it falls on."""

    row: Row
    held_out: bool
    record: Record | None = None
    """As it stands in the file, for what is no part of the row."""


class Intake:
    """The rows of one data source for one stage; iterated once, to the end.

    Args:
        source: The data source.
        kinds: Kinds of rows the stage takes, in order of preference.
        known: The run's data sources by name.
        evaluated: Names of those whose held-out rows the run's models are evaluated on.
        encoder: Makes the tokens that the doctor counts; None for text.
        max_length: Longest example in tokens.
        labels: Columns that the stage reads beside the row.

    Attributes:
        digest: What stands for the content, taken before the first row was read.
        format: The format that was recognised or named; `world` for the embedded world. Set by the first row.
        dropped: Reason -> rows that were left out, skipped ones included.
        prepared: What preparation did -> documents.
        record: The doctor's findings, as JSON; complete at the end.

    Raises:
        DataError: malformed rows, no usable row, rows of another kind, prompts to train on that are evaluated on, or a
            source that changed while it was read.
    """

    def __init__(
        self,
        source: DataSource,
        kinds: tuple[str, ...],
        known: Mapping[str, DataSource] | None = None,
        evaluated: Collection[str] = (),
        encoder: ChatTemplate | None = None,
        max_length: int | None = None,
        labels: Collection[str] = (),
    ) -> None:
        self._source, self._kinds, self._known = source, kinds, known or {}
        self._labels = labels
        self._encoder, self._max_length = encoder, max_length
        self._refused = _Refusals()
        self._kind: RowKind | None = None
        self._evaluated = [self._known[name] for name in evaluated if self._known[name] != source]
        self.digest = fingerprint(source, self._known)
        self.format = ""
        self.dropped: Counter[str] = Counter()
        self.prepared: dict[str, int] = {}
        self.record: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Placed]:
        examination, preparer = self._examination(), self._preparer()
        taken = 0
        for found in scan(self._source, examination.findings):
            self._refused.rows += 1
            reading = self._as_taken(found)
            examination.see(reading)
            try:
                row = _usable(reading, preparer)
            except BadRow as problem:
                self.refuse(problem)
            else:
                # The side is the prompt's, decided before a conversion can hide it in a text.
                assert found.row is not None
                taken += 1
                yield Placed(row, is_held_out(found.row, self._source.held_out), found.record)
        self.prepared = dict(preparer.steps) if preparer else {}
        self._conclude(examination, taken)

    def refuse(self, problem: BadRow) -> None:
        """Count a row that cannot be used; at the end it stops the stage, if its kind and the source say so."""
        self.dropped[problem.kind.name] += 1
        self._refused.add(problem)

    def _examination(self) -> Examination:
        return Examination(
            self._source.name,
            held_out=self._source.held_out,
            encoder=self._encoder,
            max_length=self._max_length,
            control_tokens=list(self._encoder.control.values()) if self._encoder else (),
            labels=self._labels,
        )

    def _as_taken(self, reading: Reading) -> Reading:
        """The reading with its row in the stage's kind, or with the reason why there is none of it."""
        if reading.row is None:
            return reading
        if self._kind is None:
            self._kind, self.format = target(reading, self._kinds), reading.layout
        try:
            return replace(reading, row=convert(reading.row, self._kind, reading.layout))
        except BadRow as problem:
            return replace(reading, row=None, problem=problem)

    def _preparer(self) -> Preparer | None:
        settings = self._source.prepare
        if settings is None:
            return None
        if self._kinds != ("text",):
            raise DataError(
                "`prepare` is for text, and this stage reads other rows",
                where=self._source.name,
                hint="leave `prepare` out, or name the source twice",
            )
        return Preparer(settings, _contamination(self._known[name] for name in settings.decontaminate))

    def _conclude(self, examination: Examination, taken: int) -> None:
        """What is known at the end: the doctor's findings, and whether the stage may go on."""
        if self._source.on_bad_row == "stop":
            self._refused.stop()
        if not taken:
            reasons = "".join(f"; {count} x {reason}" for reason, count in sorted(self.dropped.items()))
            raise DataError(f"no usable row{reasons}", where=self._source.name, hint="give a file that holds data")
        if fingerprint(self._source, self._known) != self.digest:
            hint = "run again when nothing writes to it"
            raise DataError("changed while it was read", where=self._source.name, hint=hint)
        for other in self._evaluated:
            examination.against(scan(other, Findings()), other.name, held_out=other.held_out)
        self.record = examination.diagnose().record()
        _refuse_leaks(examination.findings[LEAK_EXACT])


def refuse_trained(data: Iterable[DataSource], trained: Collection[DataSource], texts: Collection[DataSource]) -> None:
    """See that nothing an evaluation asks is trained on.

    Args:
        data: What it reads; test sets and suites are looked at, since other sources are split by their prompts.
        trained: Sources of which the run's stages learn the answers to prompts.
        texts: Those that they read as text, in which documents of suites are looked for.

    Raises:
        DataError: a prompt or document stands in both.
    """
    unseen = [each for each in data if each.held_out == 1.0 or isinstance(each, Suite)]
    refuse_repeats(unseen, trained)
    refuse_repeats([each for each in unseen if isinstance(each, LikelihoodSuite)], texts)


def refuse_repeats(tests: Collection[DataSource], trained: Iterable[DataSource]) -> None:
    """See that no prompt of a test set is trained on; the test set may be younger than the training.

    Args:
        tests: Sources whose held-out prompts models are tested on.
        trained: Sources that are trained on.

    Raises:
        DataError: a prompt stands in both.
    """
    kept = {
        key: (reading.origin, test.name)
        for test in tests
        for reading in scan(test, Findings())
        if reading.row and is_held_out(reading.row, test.held_out)
        for key in prompt_keys(reading.row)
    }
    for source in trained if kept else ():
        leaks = Findings()
        for reading in scan(source, Findings()):
            if reading.row and not is_held_out(reading.row, source.held_out):
                for key in kept.keys() & set(prompt_keys(reading.row)):
                    origin, name = kept[key]
                    leaks.add(LEAK_EXACT, f"{reading.origin} and {origin}", f"in {name}")
        _refuse_leaks(leaks[LEAK_EXACT])


def _usable(reading: Reading, preparer: Preparer | None) -> Row:
    if reading.problem:
        raise reading.problem
    assert reading.row is not None
    return preparer.prepare(reading.row) if preparer and isinstance(reading.row, Text) else reading.row


class _Refusals:
    """Malformed rows, the first of them word for word."""

    def __init__(self) -> None:
        self.rows = 0
        self._count = 0
        self._first: list[BadRow] = []

    def add(self, problem: BadRow) -> None:
        """Note the problem if it is one that stops a stage."""
        if problem.kind.severity != "error":
            return
        self._count += 1
        if len(self._first) < REFUSALS_SHOWN:
            self._first.append(problem)

    def stop(self) -> None:
        """Raise one error for all of them."""
        if not self._count:
            return
        first, *others = self._first
        lines = [first.what, *(f"  {each.where}: {each.what}" for each in others)]
        rejected = f"{self._count:,} of {self.rows:,} rows rejected"
        what = f"{first.what}; {rejected}" if not others else "\n".join([*lines, f"  {rejected}"])
        hint = f"{first.hint}; `baton doctor` lists all, `on_bad_row: skip` leaves such rows out and counts them"
        raise DataError(what, where=first.where, hint=hint)


def _refuse_leaks(found: Finding) -> None:
    """Whoever trains on the questions of the evaluation learns nothing from it."""
    if not found.count:
        return
    (where, what), *_ = found.examples
    example = f": {what}" if what else ""
    raise DataError(f"{found.kind.name}, {found.count:,} times{example}", where=where, hint=found.kind.fix)


def _contamination(sources: Iterable[DataSource]) -> NgramSet:
    """What the held-out rows of other sources say."""
    found = NgramSet()
    for source in sources:
        for reading in scan(source, Findings()):
            if reading.row and is_held_out(reading.row, source.held_out):
                for text in _texts(reading.row):
                    found.add(text)
    return found


def _texts(row: Row) -> list[str]:
    if isinstance(row, Text):
        return [row.text]
    turns = row.messages if isinstance(row, Conversation) else row.prompt
    # A system prompt is the same everywhere, and says nothing about the row.
    said = [message.content for message in turns if message.role != "system"]
    if isinstance(row, Preference):
        return [*said, *row.responses]
    return [*said, row.response] if isinstance(row, Rated) else said
