"""`baton doctor`: what is wrong with data, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import inputs, loader
from pipeline.config import DataSource, RunSettings, evaluated
from pipeline.errors import ConfigError, DataError
from pipeline.store import RunDirectory
from pipeline.terminal import printable

if TYPE_CHECKING:
    from data.doctor import Cleaned, Diagnosis
    from data.findings import Findings
    from data.read import Reading
    from data.template import ChatTemplate

CONFIGURATIONS = (".yaml", ".yml")


@dataclass(frozen=True)
class Tokens:
    """What tokens are made with, where lengths in tokens are asked for."""

    template: ChatTemplate
    max_length: int | None


@dataclass(frozen=True)
class Patient:
    """A data source to look at, and what it must not overlap."""

    source: DataSource
    against: list[DataSource]
    """Sources of which the held-out rows count."""
    max_length: int | None = None
    """Of the stages that read it, the shortest."""


def is_configuration(data: str) -> bool:
    """Whether the user named a configuration rather than data."""
    return Path(data).suffix in CONFIGURATIONS


def patients(data: str, overrides: Sequence[str]) -> list[Patient]:
    """The data sources to look at: one, or all that the stages of a configuration read.

    Raises:
        ConfigError: The configuration or the settings of the source are wrong.
    """
    if not is_configuration(data):
        return [Patient(loader.data_source(data, overrides), [])]
    settings = loader.load(Path(data), overrides)
    names = dict.fromkeys(name for stage in settings.stages.values() for name in stage.data_roles().values())
    return [_patient(settings, name) for name in names]


def open_template(reference: str) -> ChatTemplate:
    """The chat template and tokenizer of a stage directory, a model directory or a hub model.

    Raises:
        ArtifactError: It is none of these, or damaged.
    """
    from data.template import ChatTemplate
    from data.tokenizer import load_tokenizer

    artifact = inputs.resolve(reference, RunDirectory(Path()), (), download=True)
    return ChatTemplate(load_tokenizer(artifact.directory))


def diagnose(patient: Patient, tokens: Tokens | None, against: Sequence[str]) -> Diagnosis:
    """Read a source to the end and say what was found.

    Args:
        patient: The source.
        tokens: Makes the tokens; None says nothing about lengths in tokens.
        against: Other data of which no row may be in the source.

    Raises:
        DataError: A source is unreadable or broken, or changed while it was read.
    """
    from data.doctor import Examination
    from data.findings import Findings

    source = patient.source
    examination = Examination(
        source.name,
        held_out=source.held_out,
        encoder=tokens.template if tokens else None,
        max_length=(tokens.max_length or patient.max_length) if tokens else None,
        control_tokens=list(tokens.template.control.values()) if tokens else (),
    )
    for reading in _readings(source, examination.findings):
        examination.see(reading)
    for other in patient.against:
        examination.against(_readings(other, Findings()), other.name, held_out=other.held_out)
    for name in against:
        examination.against(_readings(loader.data_source(name), Findings()), name)
    return examination.diagnose()


def describe(diagnosis: Diagnosis) -> str:
    """What was found, for the terminal."""
    from data.doctor import describe

    return describe(diagnosis)


def clean(patient: Patient, diagnosis: Diagnosis, destination: Path) -> Cleaned:
    """Write what can stay of a source.

    Raises:
        StorageError: The file exists already, or cannot be written.
        DataError: The source changed while it was read.
    """
    from data.doctor import write_cleaned
    from data.findings import Findings

    return write_cleaned(_readings(patient.source, Findings()), diagnosis.drops, destination)


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


def _patient(settings: RunSettings, name: str) -> Patient:
    source = settings.data[name]
    others = [settings.data[each] for each in evaluated(settings) if settings.data[each] != source]
    stages = [stage for stage in settings.stages.values() if name in stage.data_roles().values()]
    lengths = [stage.max_length for stage in stages if hasattr(stage, "max_length")]
    return Patient(source, others, min(lengths, default=None))


__all__ = [
    "Patient",
    "Tokens",
    "clean",
    "describe",
    "diagnose",
    "is_configuration",
    "only",
    "open_template",
    "patients",
]
