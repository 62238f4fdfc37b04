"""`baton tokens`: exactly the tokens that a model will see of data, and which of them it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import loader
from pipeline.config import DataSource, RunSettings, StageSettings
from pipeline.doctor import is_configuration
from pipeline.errors import ConfigError
from pipeline.store import RunDirectory
from pipeline.suggestion import suggest
from pipeline.terminal import printable

if TYPE_CHECKING:
    from rich.text import Text as Drawing

    from data.findings import BadRow
    from data.read import Reading
    from data.template import ChatTemplate
    from data.view import View, Viewer

DEFAULT_LENGTH = 1024
KINDS = ("preference", "conversation", "prompt", "text")
"""Kinds that stages read, the richest first."""


@dataclass(frozen=True)
class Subject:
    """Data to show, as a stage would read it."""

    source: DataSource
    kinds: tuple[str, ...]
    """Kinds of rows that will do, in order of preference."""
    max_length: int | None
    tokenizer: str | None
    """Where the stage takes its tokenizer from."""


def subject(data: str, overrides: Sequence[str], stage: str | None, kind: str | None) -> Subject:
    """What to show: a data source, or what a stage of a configuration reads.

    Raises:
        ConfigError: The configuration or the settings of the source are wrong, or there is no such stage.
    """
    if not is_configuration(data):
        if stage is not None:
            raise ConfigError("`--stage` needs a configuration", where=printable(data), hint="name a .yaml file")
        return Subject(loader.data_source(data, overrides), _kinds(kind), None, None)
    settings = loader.load(Path(data), overrides)
    if stage is None:
        hint = f"add `--stage`, one of {', '.join(settings.stages)}"
        raise ConfigError("which stage's data?", where=printable(data), hint=hint)
    if stage not in settings.stages:
        raise ConfigError(f"no stage `{printable(stage)}`{suggest(stage, settings.stages)}")
    return _of_stage(settings, settings.stages[stage])


def views(
    subject: Subject, template: ChatTemplate, max_length: int | None, rows: int
) -> tuple[list[View], list[BadRow]]:
    """The first rows as the model sees them, and those of them that a stage would refuse or drop.

    Raises:
        DataError: The data cannot be read, or not as the kind that was asked for.
    """
    from data.findings import BadRow, Findings
    from data.read import scan
    from data.view import Viewer

    viewer = Viewer(template, max_length or subject.max_length or DEFAULT_LENGTH)
    found: list[View] = []
    refused: list[BadRow] = []
    for reading in islice(scan(subject.source, Findings()), rows):
        try:
            found.append(_view(viewer, reading, subject.kinds))
        except BadRow as problem:
            refused.append(problem)
    return found, refused


def legend() -> str:
    """How to read a drawing."""
    from data.view import LEGEND

    return LEGEND


def drawn(view: View) -> Drawing:
    """A row's tokens for the terminal."""
    from data.view import draw

    return draw(view)


def tokenizer_of(settings: RunSettings, stage: StageSettings) -> str | None:
    """The directory or reference that a stage's tokenizer comes from; None for a tokenizer stage."""
    roles = stage.roles()
    reference = roles.get("policy") or roles.get("tokenizer") or roles.get("models.0")
    if reference in settings.stages:
        return str(RunDirectory.of(settings).stage(reference))
    return reference


def _view(viewer: Viewer, reading: Reading, kinds: tuple[str, ...]) -> View:
    from data.read import convert, target
    from data.schema import Rated

    if reading.problem:
        raise reading.problem
    assert reading.row is not None
    row = convert(reading.row, target(reading, kinds), reading.layout)
    assert not isinstance(row, Rated)  # no stage reads such rows, so none of `kinds` is theirs
    return viewer.view(row)


def _of_stage(settings: RunSettings, stage: StageSettings) -> Subject:
    found = stage.data_roles()
    if not found:
        raise ConfigError("the stage reads no data", hint="name another stage")
    role, name = next(iter(found.items()))
    fields: dict[str, Any] = dict(stage)
    longest = fields.get("max_length")
    if longest is not None and "max_new_tokens" in fields:
        longest -= fields["max_new_tokens"]
    kinds = stage.DATA[role.partition(".")[0]]
    return Subject(settings.data[name], kinds, longest, tokenizer_of(settings, stage))


def _kinds(kind: str | None) -> tuple[str, ...]:
    if kind is None:
        return KINDS
    if kind not in KINDS:
        raise ConfigError(f"no kind of rows `{printable(kind)}` to show{suggest(kind, KINDS)}")
    return (kind,)
