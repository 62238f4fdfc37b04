"""`baton doctor`: what is wrong with data, before anything is trained on it."""

from __future__ import annotations

import shlex
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import loader
from pipeline.config import DataSource, RunSettings, Stage, evaluated
from pipeline.errors import ArtifactError, ConfigError, DataError
from pipeline.origins import Origin, open_template, origin_of
from pipeline.terminal import printable

if TYPE_CHECKING:
    from data.doctor import Cleaned, Diagnosis
    from data.findings import Findings
    from data.read import Reading
    from data.template import ChatTemplate


@dataclass(frozen=True)
class Limit:
    """How long the rows of a source may be for a stage."""

    tokens: int
    """Of a whole row; of the prompt, where the stage reads no more."""
    kinds: tuple[str, ...]
    """Kinds of rows that the stage reads, in order of preference."""


@dataclass(frozen=True)
class Tokens:
    """What tokens are made with, where lengths in tokens are asked for."""

    template: ChatTemplate
    max_length: int | None
    """Instead of the limit of the stages."""


@dataclass(frozen=True)
class Patient:
    """A data source to look at, and what it must not overlap."""

    source: DataSource
    against: list[DataSource]
    """Sources of which the held-out rows count."""
    limit: Limit | None = None
    """The tightest of the stages that read it as anything but text, whose documents are cut into blocks."""
    tokenizers: tuple[Origin, ...] = ()
    """Of the stages that read it, or the one that the user named."""


def patients(data: str, overrides: Sequence[str], tokenizer: str | None = None) -> list[Patient]:
    """The data sources to look at: one, or all that the stages of a configuration read.

    Args:
        data: A data source or a configuration.
        overrides: Settings of either.
        tokenizer: Whose tokenizer to use; by default, that of each stage.

    Raises:
        ConfigError: The configuration or the settings of the source are wrong.
    """
    if not loader.is_configuration(data):
        return [Patient(loader.data_source(data, overrides), [], None, (Origin(tokenizer),) if tokenizer else ())]
    settings = loader.load(Path(data), overrides)
    names = dict.fromkeys(name for stage in settings.stages.values() for name in stage.data_roles().values())
    return [_patient(settings, name, tokenizer) for name in names]


def other(text: str) -> DataSource:
    """Data that a source must not overlap, all of it unless its settings say otherwise.

    Args:
        text: `FILE key=value key=value`, in the words of a shell.

    Raises:
        ConfigError: It is not of this form, or a setting is wrong.
    """
    try:
        name, *overrides = shlex.split(text)
    except ValueError:  # nothing in it, or a quote that is not closed
        hint = "give a file and its settings, as in --against 'FILE columns.prompt=question'"
        raise ConfigError("no data", where=f"--against {printable(text)}", hint=hint) from None
    return loader.data_source(name, ["held_out=1.0", *overrides])


def tokens_of(found: Sequence[Patient], max_length: int | None, *, named: bool) -> list[Tokens | None]:
    """What makes the tokens of each source: the first of its tokenizers that is there.

    Args:
        found: The sources.
        max_length: Instead of the limits of the stages.
        named: Whether the user named the tokenizer, which then is downloaded where needed, and must be there.

    Raises:
        ArtifactError: The tokenizer that was named cannot be used.
        ConfigError: There is a `max_length`, but no tokenizer.
    """
    opened = cache(open_template if named else _if_there)
    templates = [next(filter(None, map(opened, patient.tokenizers)), None) for patient in found]
    if max_length is not None and not any(templates):
        raise ConfigError("`--max-length` counts tokens", hint="add `--tokenizer`")
    return [Tokens(template, max_length) if template else None for template in templates]


def diagnose(patient: Patient, tokens: Tokens | None, against: Sequence[DataSource]) -> Diagnosis:
    """Read a source to the end and say what was found.

    Args:
        patient: The source.
        tokens: Makes the tokens; None says nothing about lengths in tokens.
        against: Other data of which no row may be in the source.

    Raises:
        DataError: A source is unreadable or broken, or changed while it was read.
    """
    from data.doctor import Examination, examined

    source = patient.source
    examination = Examination(source.name, held_out=source.held_out, **_measures(patient, tokens))
    deque(examined(source, examination, [*patient.against, *against], _readings), maxlen=0)
    return examination.diagnose()


def clean(patient: Patient, diagnosis: Diagnosis, destination: Path) -> Cleaned:
    """Write what can stay of a source.

    Raises:
        StorageError: The file exists already, or cannot be written.
        DataError: The source changed while it was read.
    """
    from data.doctor import write_cleaned
    from data.findings import Findings

    source = patient.source
    return write_cleaned(_readings(source, Findings()), diagnosis.drops, destination, source.columns)


def written(cleaned: Cleaned) -> str:
    """Where the rows went, for the terminal."""
    lines = [f"wrote {cleaned.kept:,} rows to {cleaned.path}; {cleaned.dropped:,} left out: {cleaned.dropped_path}"]
    if cleaned.columns_left_out:
        names = ", ".join(map(printable, cleaned.columns_left_out))
        lines.append(f"left out the columns {names}, which JSON cannot hold")
    return "\n".join(lines)


def described(found: Sequence[Patient], tokens: Sequence[Tokens | None], diagnoses: Sequence[Diagnosis]) -> list[str]:
    """What was found, for the terminal, and of which sources of a configuration nothing is known in tokens."""
    from data.doctor import describe

    unmeasured = [each.source.name for each, made in zip(found, tokens, strict=True) if each.limit and not made]
    names = ", ".join(map(printable, unmeasured))
    line = [f"lengths in tokens need `--tokenizer`: that of the stages is not there yet, for {names}"]
    return [*map(describe, diagnoses), *(line if unmeasured else [])]


def records(diagnoses: Sequence[Diagnosis], cleaned: Cleaned | None) -> list[dict[str, Any]]:
    """The diagnoses as JSON; one that was cleaned says in `written` where the rows went."""
    found = [diagnosis.record() for diagnosis in diagnoses]
    return [{**each, "written": cleaned.record()} for each in found] if cleaned else found


def only(found: Sequence[Patient]) -> Patient:
    """The one source that there is.

    Raises:
        ConfigError: There are several.
    """
    if len(found) > 1:
        names = ", ".join(printable(each.source.name) for each in found)
        raise ConfigError(f"`--fix` writes one source, and there are {len(found)}: {names}", hint="name one of them")
    return found[0]


def _readings(source: DataSource, findings: Findings) -> Iterator[Reading]:
    """The rows of a source, whose files must be the same at the end."""
    from data.read import scan
    from data.sources import stamps

    before = stamps(source)
    yield from scan(source, findings)
    if stamps(source) != before:
        hint = "run again when nothing writes to it"
        raise DataError("changed while it was read", where=printable(source.name), hint=hint)


def _if_there(origin: Origin) -> ChatTemplate | None:
    try:
        return open_template(origin, download=False)
    except ArtifactError:
        return None


def _measures(patient: Patient, tokens: Tokens | None) -> dict[str, Any]:
    """What an examination needs to measure rows in tokens."""
    if tokens is None:
        return {}
    limit = patient.limit
    return {
        "encoder": tokens.template,
        "max_length": tokens.max_length or (limit.tokens if limit else None),
        "kinds": limit.kinds if limit else (),
        "control_tokens": list(tokens.template.control.values()),
    }


def _patient(settings: RunSettings, name: str, tokenizer: str | None) -> Patient:
    source = settings.data[name]
    readers = [stage for stage in settings.stages.values() if name in stage.data_roles().values()]
    names = dict.fromkeys(each for stage in readers for each in evaluated(settings, stage))
    others = [settings.data[each] for each in names if settings.data[each] != source]
    limits = [limit for stage in readers for limit in _limits(stage, name)]
    tightest = min(limits, key=lambda limit: limit.tokens, default=None)
    origins = [origin_of(settings, stage) for stage in readers]
    if tokenizer is not None:
        origins = [replace(each, tokenizer=tokenizer) if each else Origin(tokenizer) for each in origins]
    return Patient(source, others, tightest, tuple(filter(None, origins)))


def _limits(stage: Stage, name: str) -> Iterator[Limit]:
    """The limits of a stage for a source in each of its roles but those of text."""
    fields: dict[str, Any] = dict(stage)
    for role, source in stage.data_roles().items():
        kinds = stage.kinds(role)
        if source == name and kinds != ("text",):
            # A prompt leaves room for its answer.
            room = fields.get("max_new_tokens", 0) if kinds == ("prompt",) else 0
            yield Limit(fields["max_length"] - room, kinds)


__all__ = [
    "Limit",
    "Patient",
    "Tokens",
    "clean",
    "described",
    "diagnose",
    "only",
    "other",
    "patients",
    "records",
    "tokens_of",
    "written",
]
