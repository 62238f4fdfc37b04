"""`baton tokens`: exactly the tokens that a model will see of data, and which of them it is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import loader, manifest
from pipeline.config import DataSource, RunSettings, Stage
from pipeline.errors import ArtifactError, ConfigError, DataError
from pipeline.origins import Encoder, Origin, origin_of
from pipeline.store import RunDirectory
from pipeline.suggestion import suggest
from pipeline.terminal import printable

if TYPE_CHECKING:
    from rich.text import Text as Drawing

    from data.findings import BadRow
    from data.preparation import Preparer
    from data.read import Reading
    from data.schema import Row
    from data.view import View, Viewer

DEFAULT_LENGTH = 1024
KINDS = ("preference", "conversation", "prompt", "text")
"""Kinds that stages read, the richest first."""


@dataclass(frozen=True)
class Part:
    """A data source as one data role reads it; outside a stage, the role has no name."""

    source: DataSource
    kinds: tuple[str, ...]
    """Kinds of rows that will do, in order of preference."""
    role: str = ""
    max_length: int = DEFAULT_LENGTH
    reserved: int = 0
    """Of `max_length`, what is kept for the answer to a prompt."""
    layout: str = ""
    """Which of a preference's responses are laid out, where it is not all: `pair`, `triple` or `verdict`."""


@dataclass(frozen=True)
class Subject:
    """What to show, and in whose tokens."""

    parts: tuple[Part, ...]
    origin: Origin
    stage: str = ""
    """The kind of the stage."""

    @property
    def evaluates(self) -> bool:
        """Whether the stage trains on nothing, and reads held-out rows only."""
        return self.stage == "evaluate"


@dataclass(frozen=True)
class LeftOut:
    """A document that preparation leaves out."""

    origin: str
    reason: str

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"origin": self.origin, "left_out": self.reason}


@dataclass(frozen=True)
class Shown:
    """The first rows of a part."""

    part: Part
    rows: list[View | LeftOut]
    refused: list[BadRow]
    """Those that the stage would refuse, or leave out because nothing can be learnt from them."""


def subject(data: str, overrides: Sequence[str], stage: str | None, kind: str | None, tokenizer: str | None) -> Subject:
    """What to show: a data source, or what a stage of a configuration reads.

    Args:
        data: The data source or the configuration.
        overrides: Settings of either.
        stage: The stage's name.
        kind: Without a stage: the kind of rows to read.
        tokenizer: Whose tokens to show; by default, the stage's.

    Raises:
        ConfigError: The configuration or the settings of the source are wrong, there is no such stage, or a stage that
            makes its tokenizer has to run first.
    """
    if not loader.is_configuration(data):
        if stage is not None:
            raise ConfigError("`--stage` needs a configuration", where=printable(data), hint="name a .yaml file")
        if tokenizer is None:
            raise _whose_tokens()
        return Subject((Part(loader.data_source(data, overrides), _kinds(kind)),), Origin(tokenizer))
    settings = loader.load(Path(data), overrides)
    if stage is None:
        hint = f"add `--stage`, one of {', '.join(settings.stages)}"
        raise ConfigError("which stage's data?", where=printable(data), hint=hint)
    if stage not in settings.stages:
        raise ConfigError(f"no stage `{printable(stage)}`{suggest(stage, settings.stages)}")
    if kind is not None:
        raise ConfigError("a stage reads rows as the kind it needs", where=printable(data), hint="leave out `--as`")
    return _of_stage(settings, settings.stages[stage], tokenizer)


def shown(subject: Subject, encoder: Encoder, max_length: int | None, rows: int) -> list[Shown]:
    """The first rows of each part, as the stage makes tokens of them.

    Args:
        subject: What to show.
        encoder: In whose tokens.
        max_length: Instead of the stage's, and of the positions of the model.
        rows: How many rows of each part.

    Raises:
        DataError: The data cannot be read, or not as the kind that was asked for.
    """
    from data.findings import BadRow
    from data.tree import pair_tree, preference_tree, triple_tree
    from data.view import Viewer

    trees = {"pair": pair_tree, "triple": triple_tree, "verdict": pair_tree}
    found = []
    for part in subject.parts:
        room = min(part.max_length, encoder.positions or part.max_length) - part.reserved
        tree = trees.get(part.layout, preference_tree)
        viewer = Viewer(encoder.template, max_length or max(1, room), tree=tree, blocks=not subject.evaluates)
        first = list(islice(_views(viewer, part, held_out_only=subject.evaluates), rows))
        usable = [each for each in first if not isinstance(each, BadRow)]
        found.append(Shown(part, usable, [each for each in first if isinstance(each, BadRow)]))
    return found


def drawings(subject: Subject, found: Sequence[Shown]) -> Iterator[Drawing]:
    """What was found for the terminal: how to read it, and the rows of each part under its role and source."""
    from rich.text import Text as Drawing

    from data.view import LEGEND, draw

    yield Drawing(LEGEND)
    if subject.evaluates:
        yield Drawing("held-out rows only; what is marked is scored, not trained on")
    for each in found:
        source = each.part.source
        if each.part.role:
            yield Drawing(f"{each.part.role}: {printable(source.name, None)}", "bold")
        if source.prepare and source.prepare.decontaminate:
            yield Drawing("`decontaminate` is not applied here: a stage may leave out more documents")
        for row in each.rows:
            yield _why(row) if isinstance(row, LeftOut) else draw(row)
        if not each.rows and not each.refused:
            yield Drawing("no rows\n")


def records(found: Sequence[Shown]) -> list[dict[str, Any]]:
    """What was found as JSON."""
    return [
        {"role": each.part.role, "source": each.part.source.name, **row.record()} for each in found for row in each.rows
    ]


def _why(row: LeftOut) -> Drawing:
    from rich.text import Text as Drawing

    return Drawing(f"{printable(row.origin, None)}: left out: {printable(row.reason)}\n")


def _of_stage(settings: RunSettings, stage: Stage, tokenizer: str | None) -> Subject:
    roles = stage.data_roles()
    if not roles:
        raise ConfigError("the stage reads no data", hint="name another stage")
    parts = tuple(_part(stage, role, settings.data[name]) for role, name in roles.items())
    origin = origin_of(settings, stage)
    if tokenizer is not None:
        return Subject(parts, replace(origin or Origin(""), tokenizer=tokenizer), stage.kind)
    if origin is None:
        raise _whose_tokens()
    _require_published(settings, origin)
    return Subject(parts, origin, stage.kind)


def _part(stage: Stage, role: str, source: DataSource) -> Part:
    fields: dict[str, Any] = dict(stage)
    kinds = stage.kinds(role)
    reserved = fields["max_new_tokens"] if kinds == ("prompt",) else 0
    layout = "pair" if stage.kind == "dpo" else stage.method.layout if stage.kind == "trl" else ""
    return Part(source, kinds, role, fields.get("max_length", DEFAULT_LENGTH), reserved, layout)


def _require_published(settings: RunSettings, origin: Origin) -> None:
    """A tokenizer that a stage is still to make cannot be shown."""
    run = RunDirectory.of(settings)
    for name in settings.stages:
        directory = run.stage(name)
        if origin.tokenizer == str(directory) and not (directory / manifest.FILE_NAME).is_file():
            hint = f"run it first, with `--until {name}`, or name another tokenizer with `--tokenizer`"
            raise ConfigError(f"the tokenizer's stage, `{name}`, has not run", hint=hint)


def _whose_tokens() -> ConfigError:
    return ConfigError("whose tokens?", hint="add `--tokenizer`: a stage, a model directory or hub:owner/name@revision")


def _views(viewer: Viewer, part: Part, *, held_out_only: bool) -> Iterator[View | LeftOut | BadRow]:
    """Each row of a source as the stage sees it, or why it does not; outside a stage, no row is held out."""
    from data.findings import Findings
    from data.read import scan
    from data.split import is_held_out

    preparer = _preparer(part.source)
    for reading in scan(part.source, Findings()):
        row = _taken(reading, part.kinds, preparer)
        held_out = bool(part.role and reading.row and is_held_out(reading.row, part.source.held_out))
        if held_out or reading.problem or not held_out_only:
            yield _viewed(viewer, row, held_out)


def _taken(reading: Reading, kinds: tuple[str, ...], preparer: Preparer | None) -> Row | LeftOut | BadRow:
    """A row in the kind that is asked for, prepared."""
    from data.findings import BadRow
    from data.read import convert, target
    from data.schema import Text

    if reading.problem:
        return reading.problem
    assert reading.row is not None
    try:
        row = convert(reading.row, target(reading, kinds), reading.layout)
    except BadRow as problem:
        return problem
    if preparer is None:
        return row
    if not isinstance(row, Text):
        raise DataError("`prepare` is for text, and these are other rows", where=row.origin, hint="leave it out")
    try:
        return preparer.prepare(row)
    except BadRow as problem:
        return LeftOut(row.origin, problem.what)


def _preparer(source: DataSource) -> Preparer | None:
    if source.prepare is None:
        return None
    from data.preparation import Preparer

    return Preparer(source.prepare.model_copy(update={"decontaminate": []}))


def _viewed(viewer: Viewer, row: Row | LeftOut | BadRow, held_out: bool) -> View | LeftOut | BadRow:
    from data.findings import TEMPLATE_REFUSES, BadRow

    if isinstance(row, LeftOut | BadRow):
        return row
    try:
        return replace(viewer.view(row), held_out=held_out)
    except BadRow as problem:
        return problem
    except ArtifactError as error:
        return BadRow(TEMPLATE_REFUSES, error.what, where=row.origin, hint=error.hint)


def _kinds(kind: str | None) -> tuple[str, ...]:
    if kind is None:
        return KINDS
    if kind not in KINDS:
        raise ConfigError(f"no kind of rows `{printable(kind)}` to show{suggest(kind, KINDS)}")
    return (kind,)


__all__ = [
    "LeftOut",
    "Part",
    "Shown",
    "Subject",
    "drawings",
    "records",
    "shown",
    "subject",
]
