"""From the records of a data source to rows: the layout is recognised once, then every record is parsed.

A reading is what was found at one place, a row or the problem with it; what is done about problems is decided by
those who read (`data/intake.py` for stages, `data/doctor` for users).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from data import adapters, sources
from data.findings import EMPTY_PROMPT, MIXED_LAYOUT, THUMBS_DOWN, BadRow, Findings
from data.formats import Format, Record, final_answer
from data.recognition import Numbered, recognise, refuse_mixture
from data.schema import Conversation, Message, Preference, Prompt, Rated, Row, RowKind, Text
from data.sources import Located
from pipeline import fingerprint as fingerprints
from pipeline.config import DataSource
from pipeline.errors import DataError

CHECKED_ROWS = 16
WORLD = "world"
KINDS: dict[type[Row], RowKind] = {
    Text: "text",
    Conversation: "conversation",
    Prompt: "prompt",
    Preference: "preference",
    Rated: "rated",
}
SIMPLER: dict[str, tuple[RowKind, ...]] = {
    "text": ("text",),
    "prompt": ("prompt",),
    "conversation": ("conversation", "prompt", "text"),
    "preference": ("preference", "conversation", "prompt", "text"),
    "rated": ("rated", "conversation", "prompt", "text"),
}
"""Row kind -> kinds that it can be read as."""


@dataclass(frozen=True)
class Reading:
    """One row as it was found: either `row` or `problem` is set."""

    origin: str
    number: int
    """Counted from 1 over the whole source."""
    layout: str
    """The format's name; empty before one was recognised."""
    record: Record | None = None
    """As it stands in the file; None if it could not be read, and in the embedded world, but for its suites."""
    row: Row | None = None
    problem: BadRow | None = None


def fingerprint(source: DataSource, known: Mapping[str, DataSource]) -> str:
    """The sha256 that stands for what a source yields: its content, and the code and data that it is read with.

    Args:
        source: The data source.
        known: The run's data sources by name, which `decontaminate` refers to.

    Raises:
        DataError: the source is missing, unreadable or malformed.
        ConfigError: its adapter is not allowed.
    """
    content = sources.fingerprint(source)
    adapter = adapters.digest(source.format) if adapters.is_adapter(source.format) else None
    others = source.prepare.decontaminate if source.prepare else []
    if adapter is None and not others:
        return content
    against = {name: [known[name].model_dump(mode="json"), fingerprint(known[name], known)] for name in others}
    return fingerprints.digest([content, adapter, against])


def scan(source: DataSource, findings: Findings) -> Iterator[Reading]:
    """Every row of a source, at most `source.rows` deep, in its order.

    Args:
        source: The data source.
        findings: Takes what is odd about the files themselves.

    Raises:
        DataError: the source is unreadable or broken, its files have several layouts, or its first records none.
    """
    if source.scheme == WORLD:
        yield from _world(source)
        return
    refuse_mixture(source)
    found = enumerate(sources.records(source, findings), start=1)
    for number, each in found:
        if isinstance(each, BadRow):
            yield Reading(each.where, number, "", problem=each)
        else:
            yield from _parsed(chain([(number, each)], found), source)


def check(source: DataSource, kinds: tuple[str, ...]) -> None:
    """Read the first rows and see that they can serve as one of `kinds`.

    Hub datasets are checked when they are loaded.

    Raises:
        DataError: the source is missing, empty or broken, a row is malformed, or the rows are of another kind.
    """
    if source.scheme == "hub":
        sources.fingerprint(source)
        return
    limited = source.model_copy(update={"rows": min(CHECKED_ROWS, source.rows or CHECKED_ROWS)})
    for reading in scan(limited, Findings()):
        problem = reading.problem
        if problem and problem.kind.severity == "error" and source.on_bad_row == "stop":
            raise problem
        if reading.row:
            target(reading, kinds)


def prompts(source: DataSource) -> Iterator[Prompt]:
    """The usable rows of a source that can be read as prompts, with what they say of the answers.

    Raises:
        DataError: the source is missing, unreadable or malformed.
    """
    for reading in scan(source, Findings()):
        if reading.row is None:
            continue
        try:
            row = convert(reading.row, "prompt", reading.layout)
        except BadRow:  # those who use the rows say what is wrong with them
            continue
        assert isinstance(row, Prompt)
        yield row


def target(reading: Reading, kinds: tuple[str, ...]) -> RowKind:
    """The first of `kinds` that a row can be read as.

    Raises:
        DataError: it can be read as none of them.
    """
    assert reading.row is not None
    kind = kind_of(reading.row)
    for each in kinds:
        if each in SIMPLER[kind]:
            return each
    raise DataError(
        f"the rows are of kind `{kind}` (format `{reading.layout}`); needed: {' or '.join(kinds)}",
        where=reading.origin,
        hint=f"such rows can be read as {', '.join(SIMPLER[kind])}; give other data",
    )


def kind_of(row: Row) -> RowKind:
    """The name of a row's kind."""
    return KINDS[type(row)]


def convert(row: Row, kind: RowKind, layout: str = "") -> Row:
    """A row as a simpler kind: preferences keep their best response, a prompt's facts its final answer.

    Args:
        row: The row.
        kind: One of `SIMPLER[kind_of(row)]`.
        layout: The format it was read in; `hh` dialogues become text in their own form again.

    Raises:
        BadRow: nothing of that kind is in the row: a response that was rated badly, a prompt without words.
    """
    if kind == kind_of(row):
        return row
    if isinstance(row, Rated) and not row.good:
        if kind == "prompt":
            return Prompt(row.prompt, origin=row.origin)
        raise BadRow(THUMBS_DOWN, where=row.origin)
    if not isinstance(row, Conversation):
        row = _spoken(row)
    if kind == "conversation":
        return row
    if kind == "prompt":
        return Prompt(row.prompt, {"answer": final_answer(row.messages[-1].content)}, row.origin)
    assert kind == "text"
    return Text(_plain(row.messages, layout), row.origin)


def _spoken(row: Row) -> Conversation:
    assert isinstance(row, Preference | Rated)
    if not row.prompt[-1].content.strip():
        raise BadRow(EMPTY_PROMPT, where=row.origin)
    response = row.responses[0] if isinstance(row, Preference) else row.response
    return Conversation((*row.prompt, Message("assistant", response)), row.origin)


def _plain(messages: tuple[Message, ...], layout: str) -> str:
    if layout != "hh":
        return "\n\n".join(f"{message.role}: {message.content}" for message in messages)
    speakers = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{speakers[message.role]}: {message.content}" for message in messages)


def _parsed(found: Iterator[Numbered], source: DataSource) -> Iterator[Reading]:
    """Readings from the first record on."""
    layout, (*passed, decisive) = recognise(found, source)
    for number, each in passed:
        yield _without_layout(_reading(number, each, layout))
    believed = layout.name == source.format  # the user knows what later columns mean
    for number, each in chain([decisive], found):
        reading = _reading(number, each, layout)
        yield reading if believed else _of_layout(reading, layout)


def _of_layout(reading: Reading, layout: Format) -> Reading:
    """The reading, unless its record has columns by which it is in another layout, as scores or a verdict."""
    if reading.row is None or reading.record is None:
        return reading
    given = {column: value for column, value in reading.record.items() if value is not None}
    if layout.fits(given):
        return reading
    what = f"its columns are not those of `{layout.name}`, in which the rows before it are"
    return replace(reading, row=None, problem=BadRow(MIXED_LAYOUT, what, where=reading.origin))


def _reading(number: int, found: Located | BadRow, layout: Format) -> Reading:
    if isinstance(found, BadRow):
        return Reading(found.where, number, layout.name, problem=found)
    try:
        row = layout.parse(found.record, found.origin)
    except BadRow as problem:
        return Reading(found.origin, number, layout.name, found.record, problem=problem)
    return Reading(found.origin, number, layout.name, found.record, row)


def _without_layout(reading: Reading) -> Reading:
    """The reading of a record that no format fits, which is no row even if the layout of the rows after it can read
    some of it."""
    if reading.row is None:
        return reading
    what = f"no format fits it; the rows after it are in `{reading.layout}`"
    return replace(reading, row=None, problem=BadRow(MIXED_LAYOUT, what, where=reading.origin))


def _world(source: DataSource) -> Iterator[Reading]:
    from data import instruction_prompts, world, world_suites

    part = sources.world_part(source)
    if part in world_suites.PARTS:
        records = world_suites.generate(part, source.seed)[: source.rows]
        found = (Located(f"{source.name}:{number}", each) for number, each in enumerate(records, start=1))
        yield from _parsed(enumerate(found, start=1), source)
        return
    generated: Iterator[Row]
    if part == instruction_prompts.PART:
        generated = instruction_prompts.generate(source.rows or instruction_prompts.DEFAULT_ROWS, source.seed)
    else:
        generated = world.generate(part, source.rows or world.DEFAULT_ROWS[part], source.seed)
    for number, row in enumerate(generated, start=1):
        origin = row.origin or f"{source.name}:row {number}"
        yield Reading(origin, number, WORLD, row=replace(row, origin=origin))
