"""One pass over the rows of a data source, after which all is known that the doctor tells."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from data.doctor.columns import ColumnCheck
from data.doctor.comparisons import Comparisons, Verdicts
from data.doctor.content import ContentCheck, fields, odd_preference
from data.doctor.diagnosis import Diagnosis, Drop
from data.doctor.keys import Places, as_numbers, key, messages_key, repeats, text_key
from data.doctor.lengths import Encoder, Lengths
from data.doctor.overlap import Overlap
from data.doctor.scripts import main_script
from data.findings import (
    CONTRADICTION,
    CYCLE,
    DUPLICATE_ID,
    DUPLICATE_ROW,
    LEAK_NGRAMS,
    LONGER_WINS,
    Findings,
    Kind,
)
from data.formats import FORMATS, Record
from data.read import Reading, kind_of, scan
from data.schema import Preference, Prompt, Rated, Row, Text
from data.split import is_held_out
from pipeline.config import DataSource

MANY_DUPLICATES = 0.01
"""Share of the rows above which duplicates are worth a warning."""
FAIR_SHARES = (0.4, 0.6)
"""How often the longer response may win before it counts as a bias."""


class Examination:
    """Looks at the rows of a data source, one by one, in at most some hundred bytes each.

    Args:
        source: The data source's name.
        held_out: Share of the prompts that is kept from training.
        encoder: Makes the tokens; without one, nothing is said about lengths in tokens.
        max_length: Longest example in tokens.
        kinds: Kinds of rows as which they are measured in tokens, in order of preference; as they are when there is
            none.
        control_tokens: Control tokens of the tokenizer in use.
        labels: Columns that are read beside the row.

    Attributes:
        findings: What was found; also for those that read the source to add to.
    """

    def __init__(
        self,
        source: str = "",
        *,
        held_out: float,
        encoder: Encoder | None = None,
        max_length: int | None = None,
        kinds: Sequence[str] = (),
        control_tokens: Collection[str] = (),
        labels: Collection[str] = (),
    ) -> None:
        self.findings = Findings()
        self._source, self._share = source, held_out
        self._content, self._columns = ContentCheck(control_tokens), ColumnCheck(labels)
        self._lengths = Lengths(encoder, max_length, kinds) if encoder else None
        self._comparisons, self._verdicts, self._overlap = Comparisons(), Verdicts(), Overlap()
        self._places = Places()
        self._others: list[tuple[range, str]] = []
        self._ids, self._rows = _Seen(), _Seen()
        self._scripts: Counter[str] = Counter()
        self._drops: dict[int, Drop] = {}
        self._read = self._held_out = 0
        self._unfit: Counter[bool] = Counter()  # held out or not -> rows that cannot be used as tokens
        self._first: Reading | None = None

    def see(self, reading: Reading) -> None:
        """Look at one row."""
        self._read += 1
        place = self._places.add(reading.origin, reading.number)
        if reading.record is not None:
            self._see_record(reading.record, reading, place)
        if reading.problem is not None:
            self.findings.add_row(reading.problem)
        elif reading.row is not None:
            self._first = self._first or reading
            self._see_row(reading.row, reading.origin, place)

    def against(self, readings: Iterable[Reading], name: str, *, held_out: float = 1.0) -> None:
        """Look at other data, whose prompts must not be trained on.

        Args:
            readings: Its rows.
            name: What it is called.
            held_out: Share of its prompts that must not be trained on, chosen as those that are held out.
        """
        start = len(self._places)
        for reading in readings:
            if reading.row is None:
                continue
            if is_held_out(reading.row, held_out):
                self._overlap.add(reading.row, self._places.add(reading.origin, reading.number), kept=True)
        self._others.append((range(start, len(self._places)), name))

    def diagnose(self) -> Diagnosis:
        """What was found; call it once, at the end."""
        self._find_repeats()
        self._find_disagreements()
        self._find_leaks()
        figures = self._figures()
        first = self._first
        return Diagnosis(
            source=self._source,
            rows=self._read,
            usable=len(self._rows) - sum(self._unfit.values()),
            held_out=self._held_out - self._unfit[True],
            kind=kind_of(first.row) if first and first.row else "",
            format=first.layout if first else "",
            columns=_deciding_columns(first) if first else (),
            example=first.row if first else None,
            findings=self.findings,
            figures=figures,
            scripts=dict(sorted(self._scripts.items(), key=lambda each: (-each[1], each[0]))),
            lengths=self._lengths.quantiles() if self._lengths else {},
            drops=self._drops,
        )

    def _see_record(self, record: Record, reading: Reading, place: int) -> None:
        for kind, what in self._columns(record, reading.layout, reading.origin):
            self.findings.add(kind, reading.origin, what)
        identity = record.get("id")
        if identity is not None:
            self._ids.add(text_key(str(identity)), place)

    def _see_row(self, row: Row, origin: str, place: int) -> None:
        named = fields(row)
        whole = "\n".join(text for _, text in named)
        odd = odd_preference(row) if isinstance(row, Preference) else ()
        for kind, what in chain(self._content(named, whole), odd):
            self.findings.add(kind, origin, what)
        self._scripts[main_script(whole)] += 1
        self._rows.add(self._row_key(row, place), place)
        self._see_prompt(row, place)
        if self._lengths:
            self._measure(row, self._lengths, origin, place)

    def _see_prompt(self, row: Row, place: int) -> None:
        kept = is_held_out(row, self._share)
        self._held_out += kept
        self._overlap.add(row, place, kept=kept)

    def _measure(self, row: Row, lengths: Lengths, origin: str, place: int) -> None:
        problem = lengths.measure(row)
        if problem is None:
            return
        kind, what = problem
        self.findings.add(kind, origin, what)
        if kind.severity in ("error", "dropped"):
            self._unfit[is_held_out(row, self._share)] += 1
            self._drop(place, kind, what)

    def _row_key(self, row: Row, place: int) -> bytes:
        """The key of what a row says, whatever its id and other columns."""
        if isinstance(row, Preference):
            return key(self._comparisons.add(row, place))
        if isinstance(row, Text):
            return text_key(row.text)
        if isinstance(row, Prompt):
            facts = {name: value for name, value in row.facts.items() if name != "id"}
            return key(messages_key(row.prompt) + text_key(json.dumps(facts, sort_keys=True, default=str)))
        if isinstance(row, Rated):
            return key(self._verdicts.add(row, place))
        return messages_key(row.messages)

    def _find_repeats(self) -> None:
        for first, again in self._ids.repeats():
            self.findings.add(DUPLICATE_ID, self._places.together([first, again]))
        repeated = self._rows.repeats()
        many = len(repeated) > MANY_DUPLICATES * len(self._rows)
        kind = DUPLICATE_ROW if many else replace(DUPLICATE_ROW, severity="note")
        for first, again in repeated:
            self.findings.add(kind, self._places.together([first, again]))
            self._drop(again, kind, self._places[first])

    def _find_disagreements(self) -> None:
        pairs, thumbs = self._comparisons.contradictions(), self._verdicts.contradictions()
        cycles = self._comparisons.cycles()
        for kind, what, examples, rows in (
            (CONTRADICTION, "", pairs.examples, pairs.rows),
            (CONTRADICTION, "good and bad", thumbs.examples, thumbs.rows),
            (CYCLE, "", cycles.examples, cycles.rows),
        ):
            for places in examples:
                self.findings.add(kind, self._places.together(places), what)
            for place in rows:
                self._drop(place, kind)

    def _find_leaks(self) -> None:
        for leak in self._overlap.leaks():
            where = self._places.together([leak.trained, leak.kept])
            self.findings.add(leak.kind, where, self._name_of_other(leak.kept))
            # Prompts that are made from one pattern share runs of words, and are no copies: a person has to look.
            if leak.kind is not LEAK_NGRAMS:
                self._drop(leak.trained, leak.kind, self._places[leak.kept])

    def _name_of_other(self, place: int) -> str:
        """Which of the other data a place is in; empty for the source itself."""
        return next((f"in {name}" for places, name in self._others if place in places), "")

    def _figures(self) -> dict[str, float]:
        bias = self._comparisons.length_bias()
        least, most = FAIR_SHARES
        if bias and not (bias["longer_wins_low"] <= most and bias["longer_wins_high"] >= least):
            what = f"the longer response wins in {bias['longer_wins']:.1%} of the pairs"
            self.findings.add(LONGER_WINS, self._source or "all rows", what)
        return {**bias, **(self._lengths.figures() if self._lengths else {})}

    def _drop(self, place: int, kind: Kind, what: str = "") -> None:
        self._drops.setdefault(self._places.numbers[place], Drop(kind, what))


def examined(
    source: DataSource,
    examination: Examination,
    others: Iterable[DataSource] = (),
    read: Callable[[DataSource, Findings], Iterable[Reading]] = scan,
) -> Iterator[Reading]:
    """The rows of a source, each looked at on its way; after the last one, the examination knows the others, too.

    Args:
        source: The data source.
        examination: Looks at the rows.
        others: Sources whose held-out prompts must not be trained on.
        read: Reads a source.

    Raises:
        DataError: a source is unreadable or broken.
    """
    for reading in read(source, examination.findings):
        examination.see(reading)
        yield reading
    for other in others:
        examination.against(read(other, Findings()), other.name, held_out=other.held_out)


class _Seen:
    """Keys of rows with their places."""

    def __init__(self) -> None:
        self._keys = bytearray()
        self._places = array("L")

    def __len__(self) -> int:
        return len(self._places)

    def add(self, row_key: bytes, place: int) -> None:
        """Keep the key of a row."""
        self._keys += row_key
        self._places.append(place)

    def repeats(self) -> list[tuple[int, int]]:
        """Places of the first row with a key, and of each later one."""
        later, first = repeats(as_numbers(self._keys))
        return [(self._places[a], self._places[b]) for a, b in zip(first, later, strict=True)]


def _deciding_columns(reading: Reading) -> tuple[str, ...]:
    """The columns that a format needs, in the order of the record."""
    needed = next((each.columns for each in FORMATS if each.name == reading.layout), frozenset[str]())
    return tuple(name for name in reading.record or () if name in needed)
