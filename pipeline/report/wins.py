"""The table of wins against the parent: a line for each model and judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pipeline.figures import LENGTH_CONTROLLED, WIN_RATE
from pipeline.report import wording
from pipeline.report.cell import Cell
from pipeline.report.forest import direction
from pipeline.report.inputs import ModelEvaluation, RunRecord


@dataclass(frozen=True)
class WinLine:
    """What one judge says of one model beside its parent."""

    model: str
    parent: str
    judge: str
    cells: tuple[Cell, ...]


def wins(models: Mapping[str, ModelEvaluation]) -> list[WinLine]:
    """A line for every judge of every model that has a win rate."""
    return [
        WinLine(name, model.parent or "", judge, tuple(_cells(model, judge)))
        for name, model in models.items()
        for judge in (each.removeprefix(WIN_RATE) for each in model.metrics if each.startswith(WIN_RATE))
    ]


def described(run: RunRecord) -> list[str]:
    """Every judge of the run's evaluations, and what it is."""
    found = [
        f"{judge} is {what}"
        for record in run.stages.values()
        if record.evaluation
        for judge, what in record.evaluation.judges.items()
    ]
    return list(dict.fromkeys(found))


def _cells(model: ModelEvaluation, judge: str) -> list[Cell]:
    rate, at_equal_lengths = f"{WIN_RATE}{judge}", f"{LENGTH_CONTROLLED}{judge}"
    comparison, test = model.comparison, model.test(rate)
    won = _cell(model, rate, "win rate")
    if test and not test.clear:
        won = replace(won, direction="level")
    tally = comparison.judges.get(judge) if comparison else None
    needed = comparison.needed.get(rate) if comparison else None
    return [
        replace(won, remark=wording.significance(test)),
        _cell(model, at_equal_lengths, "at equal lengths"),
        Cell("prompts", wording.tally(tally) if tally else ""),
        Cell("prompts needed", f"{needed:,}" if needed else ""),
    ]


def _cell(model: ModelEvaluation, metric: str, label: str) -> Cell:
    measured = model.metrics.get(metric)
    if measured is None:
        return Cell(label)
    side = direction(measured.low, measured.high, neutral=0.5)
    return Cell(label, wording.number(metric, measured.value), wording.interval(metric, measured), direction=side)
