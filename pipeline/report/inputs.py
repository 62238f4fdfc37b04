"""What a report reads: the configuration, and finished stages' manifests, logs, evaluations and samples."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from pipeline.errors import ArtifactError
from pipeline.manifest import FILE_NAME, Manifest, Metric
from pipeline.terminal import printable

SAMPLES_SHOWN = 6
LEVEL = 0.05
"""Of significance, after the correction for the number of tests."""
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

Model = TypeVar("Model", bound=BaseModel)


class _Log(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Turn(_Log):
    """One message of a prompt."""

    role: str
    content: str


class Sample(_Log):
    """One prompt and what every model answered."""

    prompt: list[Turn]
    responses: dict[str, str]
    gold: dict[str, float | None] = {}
    reward: dict[str, float | None] = {}
    scores: dict[str, dict[str, float | None]] = {}
    """Of other judges, by name."""
    answer: Any = None


class AccuracyTest(_Log):
    """McNemar's test of an accuracy, a win rate, or a suite of yes and no, against the parent's."""

    p: float
    adjusted: float
    """For all that were tested together, by Holm's correction."""

    @property
    def clear(self) -> bool:
        """Whether the difference stays significant."""
        return self.adjusted < LEVEL


class Tally(_Log):
    """How often a judge preferred a model to its parent, neither, or the parent, and how often it said nothing."""

    won: int
    tied: int
    lost: int
    unread: int = 0


class Comparison(_Log):
    """What a model's figures do not say of how it compares with its parent."""

    judges: dict[str, Tally] = {}
    needed: dict[str, int] = {}
    """Metric whose change is not clear -> prompts that would show it, if it is as large as it seems."""
    tests: dict[str, AccuracyTest] = {}


class ModelEvaluation(_Log):
    """What was measured of one model, and against which parent."""

    parent: str | None = None
    metrics: dict[str, Metric] = {}
    comparison: Comparison | None = None

    def test(self, metric: str) -> AccuracyTest | None:
        """That of one metric against the parent's."""
        return self.comparison.tests.get(metric) if self.comparison else None


class FrontierPoint(_Log):
    """What the best of n of a model's responses is worth, and how far choosing it diverges from the model in nats."""

    n: int = Field(ge=1)
    kl: float = Field(ge=0)
    gold: Metric | None = None
    reward: Metric | None = None


class CalibrationBin(_Log):
    """Pairs that a reward model was about equally sure of."""

    confidence: float
    accuracy: float
    n: int


class SuiteRecord(_Log):
    """What an evaluation suite measures, and how its figures are read."""

    method: str
    measures: str
    better: Literal["higher", "lower"] = "higher"
    share: bool = True
    """Whether figures are shares, from 0 to 1."""
    observations: int
    calibration: dict[str, list[CalibrationBin]] = {}
    """By reward model."""


class Evaluation(_Log):
    """`evaluation.json` of one evaluate stage."""

    models: dict[str, ModelEvaluation]
    frontier: dict[str, list[FrontierPoint]] = {}
    """By the model that the responses are of, n rising."""
    suites: dict[str, SuiteRecord] = {}
    """By name; their figures are among the models' metrics."""
    gold: str = "none"
    judges: dict[str, str] = {}
    """By name, what each is, in words."""


class Look(_Log):
    """A policy on held-out prompts after some rounds of its training."""

    round: int
    score: float
    """By a rule that it is not trained on, where there is one."""
    reward: float
    """What it is trained for."""
    kl: float
    """Divergence from the reference, nats a response."""


class _Looks(RootModel[list[Look]]):
    """`looks.json` of one stage that samples and learns in turns."""


@dataclass(frozen=True)
class StageRecord:
    """One finished stage."""

    manifest: Manifest
    manifest_sha256: str
    steps: tuple[Mapping[str, Any], ...] = ()
    evaluation: Evaluation | None = None
    samples: tuple[Sample, ...] = ()
    looks: tuple[Look, ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """All finished stages, parents before children, and the configuration as it was written."""

    name: str
    stages: Mapping[str, StageRecord]
    config: str = ""


def read(run_directory: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        ArtifactError: When it holds no finished stage, or a file of one is damaged.
    """
    found = {path.name: _read_stage(path) for path in _stage_directories(run_directory / "stages")}
    if not found:
        raise ArtifactError("no finished stage", where=run_directory, hint="run it first: baton run CONFIG")
    config = run_directory / "config.yaml"
    return RunRecord(
        name=run_directory.resolve().name,
        stages=_parents_first(found, run_directory),
        config=config.read_text(encoding="utf-8", errors="backslashreplace") if config.is_file() else "",
    )


def _stage_directories(stages: Path) -> list[Path]:
    """Names with a dot are temporary; a directory without a manifest never happened."""
    if not stages.is_dir():
        return []
    return sorted(
        path for path in stages.iterdir() if _STAGE_NAME.fullmatch(path.name) and (path / FILE_NAME).is_file()
    )


def _read_stage(directory: Path) -> StageRecord:
    path = directory / FILE_NAME
    content = _bytes(path)
    return StageRecord(
        manifest=_validated(Manifest, content, str(path)),
        manifest_sha256=hashlib.sha256(content).hexdigest(),
        steps=tuple(_steps(directory / "metrics.jsonl")),
        evaluation=_evaluation(directory / "evaluation.json"),
        samples=tuple(islice(_samples(directory / "samples.jsonl"), SAMPLES_SHOWN)),
        looks=_looks(directory / "looks.json"),
    )


def _evaluation(path: Path) -> Evaluation | None:
    return _validated(Evaluation, _bytes(path), str(path)) if path.is_file() else None


def _looks(path: Path) -> tuple[Look, ...]:
    return tuple(_validated(_Looks, _bytes(path), str(path)).root) if path.is_file() else ()


def _samples(path: Path) -> Iterator[Sample]:
    for place, line in _lines(path):
        yield _validated(Sample, line, place)


def _steps(path: Path) -> Iterator[Mapping[str, Any]]:
    for place, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise _damaged(place, "not JSON") from error
        if not isinstance(record, dict):
            raise _damaged(place, "not a JSON object")
        yield record


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _damaged(str(path), f"cannot be read: {error.strerror}") from error


def _validated(kind: type[Model], content: bytes, place: str) -> Model:
    try:
        # Python's parser, because pydantic's refuses the lone surrogates that a model's output may hold.
        return kind.model_validate(json.loads(content, parse_float=_finite, parse_constant=_finite))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise _damaged(place, printable(f"{field}: {first['msg']}", 160)) from error
    except ValueError as error:
        raise _damaged(place, f"not JSON: {printable(str(error))}") from error


def _finite(written: str) -> float:
    value = float(written)
    if not math.isfinite(value):
        raise ValueError(f"{written[:20]} is not a finite number")
    return value


def _damaged(place: str, what: str) -> ArtifactError:
    hint = "`baton verify RUN` names the damaged files; rerun the stage with --force"
    return ArtifactError(what, where=place, hint=hint)


def _parents_first(found: Mapping[str, StageRecord], run_directory: Path) -> dict[str, StageRecord]:
    graph = {
        name: sorted({each.source for each in record.manifest.inputs.values()} & found.keys())
        for name, record in found.items()
    }
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise ArtifactError(
            f"stages are their own ancestors: {', '.join(error.args[1])}",
            where=run_directory,
            hint="these manifests do not come from one run; rerun the stages with --force",
        ) from error
    return {name: found[name] for name in order}
