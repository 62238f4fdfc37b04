"""Evaluation suites: a table of each, with a line for each figure and a column for each model, and the reward models'
reliability diagrams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pipeline.figures import CALIBRATION_ERROR, GAIN, SUITE
from pipeline.report import wording
from pipeline.report.cell import Cell
from pipeline.report.forest import direction
from pipeline.report.inputs import ModelEvaluation, RunRecord, SuiteRecord
from pipeline.report.reliability import Reliability, draw_reliability


@dataclass(frozen=True)
class SuiteLine:
    """One figure of a suite, by model."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class SuiteTable:
    """One suite: its own figure first, then those by category and what else was measured."""

    name: str
    measures: str
    note: str
    lines: tuple[SuiteLine, ...]
    calibration: tuple[Reliability, ...]


def suites(run: RunRecord) -> list[SuiteTable]:
    """A table of each suite of each evaluation; where several have a suite of the same name, with the evaluation's."""
    found = [
        (stage, name, suite, record.evaluation.models)
        for stage, record in run.stages.items()
        if record.evaluation
        for name, suite in record.evaluation.suites.items()
    ]
    times = Counter(name for _, name, _, _ in found)
    return [
        SuiteTable(
            f"{name} ({stage})" if times[name] > 1 else name,
            suite.measures,
            f"{suite.observations:,} observations" + ("; lower is better" if suite.better == "lower" else ""),
            tuple(_lines(name, suite, models)),
            tuple(_calibration(name, suite, models, f"{stage}/calibration/{place}")),
        )
        for place, (stage, name, suite, models) in enumerate(found)
    ]


def _lines(name: str, suite: SuiteRecord, models: Mapping[str, ModelEvaluation]) -> Iterator[SuiteLine]:
    whole = f"{SUITE}{name}"
    present = dict.fromkeys(each for model in models.values() for each in model.metrics)
    parts = [each for each in present if each.startswith((f"{whole}.", f"{whole}_")) and not each.endswith(GAIN)]
    measured = {label: model for label, model in models.items() if whole in model.metrics}
    for each in (whole, *parts):
        yield SuiteLine(
            _label(each, whole), tuple(_cell(label, each, suite, model) for label, model in measured.items())
        )


def _calibration(
    name: str, suite: SuiteRecord, models: Mapping[str, ModelEvaluation], salt: str
) -> Iterator[Reliability]:
    """A diagram for each reward model."""
    for number, (model, bins) in enumerate(sorted(suite.calibration.items())):
        error = models[model].metrics.get(f"{SUITE}{name}{CALIBRATION_ERROR}") if model in models else None
        yield draw_reliability(model, bins, error, f"{salt}/{number}")


def _label(metric: str, whole: str) -> str:
    return metric.removeprefix(whole)[1:].replace("_", " ") or "all"


def _cell(model: str, metric: str, suite: SuiteRecord, found: ModelEvaluation) -> Cell:
    measured = found.metrics.get(metric)
    if measured is None:
        return Cell(model)
    kind = "accuracy" if suite.share else metric
    cell = Cell(model, wording.number(kind, measured.value), wording.interval(kind, measured))
    gain, test = found.metrics.get(f"{metric}{GAIN}"), found.test(metric)
    if gain is None:
        return cell
    low, high = gain.low, gain.high
    if suite.better == "lower" and low is not None and high is not None:
        low, high = -high, -low
    return replace(
        cell,
        gain=wording.number(kind, gain.value, signed=True),
        gain_interval=wording.interval(kind, gain, signed=True),
        direction=direction(low, high) if test is None or test.clear else "level",
        remark=wording.significance(test),
    )
