"""The report as one static page: what each section shows; `page.j2` says how, `page.css` in which colours.

The page runs no script and loads nothing. Its policy admits one stylesheet, by its hash. Everything printed
is escaped, and characters that would hide or reorder text are written out: models wrote the responses.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.figures import GAIN, LENGTH_CONTROLLED, RATIO, SCORE, SETTINGS, SUITE, WIN_RATE
from pipeline.manifest import Metric
from pipeline.report import lineage, wording
from pipeline.report.cell import Cell
from pipeline.report.curves import Curve, draw_curves
from pipeline.report.forest import compare, direction
from pipeline.report.frontier import draw_frontiers
from pipeline.report.health import health
from pipeline.report.inputs import Evaluation, ModelEvaluation, RunRecord, Sample
from pipeline.report.marks import Piece, marked
from pipeline.report.suites import suites
from pipeline.report.summary import elsewhere, evaluated
from pipeline.report.wins import described, wins
from pipeline.terminal import printable_lines

_HERE = Path(__file__).parent
_COLUMNS = (*SETTINGS, "accuracy", "pair_accuracy", "perplexity", "bits_per_byte", "kl", "length")
_ELSEWHERE = ("frontier_gap", SUITE, WIN_RATE, LENGTH_CONTROLLED)
"""What the names begin with of figures that are shown in a table of their own."""
_BETTER_IF_HIGH = (*SETTINGS, "accuracy", SCORE.rstrip("."))
"""Metrics, up to a dot, whose gains are shown and coloured."""
_BETTER_IF_LOW = ("perplexity", "bits_per_byte")
"""Metrics whose ratios to the parent's are coloured; that of lengths is shown as it is."""


@dataclass(frozen=True)
class Line:
    """One model's row in a table of metrics."""

    name: str
    parent: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Answer:
    """One model's response to a prompt and its scores, already worded."""

    model: str
    pieces: tuple[Piece, ...]
    scores: tuple[str, ...]
    parent: str = ""
    """The model whose answer this one is marked against; empty where there is none."""


def render(run: RunRecord, summary: Mapping[str, Any]) -> str:
    """The page as HTML; the same run gives the same bytes."""
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    models = evaluated(run)
    return (
        _environment()
        .get_template("page.j2")
        .render(
            run=run,
            summary=summary,
            style=Markup(style),
            style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
            warnings=[(name, text) for name, stage in summary["stages"].items() for text in stage["warnings"]],
            forest=compare(models, summary["verdict"]["metric"] or "gold"),
            drawing=_lineage(run),
            box=(lineage.BOX_WIDTH, lineage.BOX_HEIGHT),
            requirements=[each for checks in summary["requirements"].values() for each in checks],
            comparison=_table(models, _columns(models)),
            elsewhere=elsewhere(run),
            tasks=_table(models, _tasks(models)),
            suites=suites(run),
            tested=any(model.comparison and model.comparison.tests for model in models.values()),
            wins=wins(models),
            judges=described(run),
            measured=_measured(run),
            frontiers=draw_frontiers(run),
            health=health(run),
            curves=_curves(run),
            samples=_samples(run),
            cards=[(name, card) for name, record in run.stages.items() for card in record.manifest.data],
            cost=_cost(run),
            environment=_settings_of_machines(run),
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for worded in (
        *(wording.duration, wording.size, wording.label, wording.brief, wording.excerpt, wording.remarks),
        wording.found,
    ):
        environment.filters[worded.__name__] = worded
    return environment


def _printed(value: Any) -> Any:
    return printable_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _lineage(run: RunRecord) -> lineage.Drawing:
    roles: dict[tuple[str, str], list[str]] = {}
    for name, record in run.stages.items():
        for role, each in record.manifest.inputs.items():
            roles.setdefault((each.source, name), []).append(role.partition(".")[0])
    outside = sorted({source for source, _ in roles} - run.stages.keys())
    edges = {edge: ", ".join(dict.fromkeys(found)) for edge, found in sorted(roles.items())}
    return lineage.lay_out(edges, [*outside, *run.stages])


def _columns(models: Mapping[str, ModelEvaluation]) -> list[str]:
    present = {name for model in models.values() for name in model.metrics}
    known = [name for name in _COLUMNS if name in present]
    others = present - {*known, *_tasks(models)}
    shown = sorted(name for name in others if not name.startswith(_ELSEWHERE) and not name.endswith((GAIN, RATIO)))
    return [*known, *shown]


def _tasks(models: Mapping[str, ModelEvaluation]) -> list[str]:
    present = {name for model in models.values() for name in model.metrics}
    return sorted(name for name in present if name.startswith("accuracy.") and not name.endswith(GAIN))


def _table(models: Mapping[str, ModelEvaluation], columns: list[str]) -> list[Line]:
    """A line for every model that has a figure in one of the columns."""
    return [
        Line(name, model.parent or "", tuple(_cell(column, model) for column in columns))
        for name, model in models.items()
        if not model.metrics.keys().isdisjoint(columns)
    ]


def _cell(column: str, model: ModelEvaluation) -> Cell:
    label = wording.label(column.removeprefix("accuracy."))
    measured = model.metrics.get(column)
    if measured is None:
        return Cell(label)
    gain = model.metrics.get(f"{column}{GAIN}") if column.partition(".")[0] in _BETTER_IF_HIGH else None
    cell = Cell(label, wording.number(column, measured.value), wording.interval(column, measured))
    if gain is not None:
        test = model.test(column)
        return replace(
            cell,
            gain=wording.number(column, gain.value, signed=True),
            gain_interval=wording.interval(column, gain, signed=True),
            direction=direction(gain.low, gain.high) if test is None or test.clear else "level",
            remark=wording.significance(test),
        )
    if f"{column}{RATIO}" in model.metrics:
        return _with_ratio(cell, column, model.metrics[f"{column}{RATIO}"])
    return cell


def _with_ratio(cell: Cell, column: str, ratio: Metric) -> Cell:
    """The cell with how many times the parent's its figure is."""
    side = direction(ratio.low, ratio.high, neutral=1.0)
    better = {"up": "down", "down": "up", "level": "level"}[side] if column in _BETTER_IF_LOW else "level"
    return replace(
        cell,
        gain=f"\N{MULTIPLICATION SIGN} {wording.number('ratio', ratio.value)}",
        gain_interval=wording.interval("ratio", ratio),
        direction=better,
    )


def _measured(run: RunRecord) -> list[tuple[str, list[tuple[Cell, int | None]]]]:
    """What stages other than evaluations measured of themselves, each figure with how many it is from."""
    return [
        (
            name,
            [(_own_cell(metric, each), each.n) for metric, each in sorted(own.items())],
        )
        for name, own in ((name, record.manifest.metrics) for name, record in run.stages.items())
        if own and run.stages[name].evaluation is None
    ]


def _own_cell(metric: str, measured: Metric) -> Cell:
    """A stage's own figure. Its `reward` is what it trains for, by models and rules, and not what an evaluation's judge
    says."""
    cell = _cell(metric, ModelEvaluation(metrics={metric: measured}))
    return replace(cell, label="reward trained for") if metric == "reward" else cell


def _curves(run: RunRecord) -> list[tuple[str, str, list[Curve]]]:
    drawn = [
        (name, record.manifest.stage_kind, draw_curves(name, record.steps))
        for name, record in run.stages.items()
        if record.steps
    ]
    return [each for each in drawn if each[2]]


def _samples(run: RunRecord) -> list[tuple[Sample, str, list[Answer]]]:
    return [
        (sample, _expected(sample), _answers(sample, record.evaluation))
        for record in run.stages.values()
        for sample in record.samples
    ]


def _expected(sample: Sample) -> str:
    if sample.answer is None:
        return ""
    return sample.answer if isinstance(sample.answer, str) else json.dumps(sample.answer, sort_keys=True)


def _answers(sample: Sample, evaluation: Evaluation | None) -> list[Answer]:
    models = evaluation.models if evaluation else {}
    names = [name for name in models if name in sample.responses]
    others = sorted(sample.responses.keys() - names)
    return [_answer(sample, name, models) for name in (*names, *others)]


def _answer(sample: Sample, name: str, models: Mapping[str, ModelEvaluation]) -> Answer:
    """An answer, marked where it differs from the parent's."""
    text, scores = wording.excerpt(sample.responses[name]), tuple(_scores(sample, name))
    parent = models[name].parent if name in models else None
    if parent not in sample.responses:
        return Answer(name, (Piece("same", text),), scores)
    return Answer(name, tuple(marked(wording.excerpt(sample.responses[parent]), text)), scores, parent)


def _scores(sample: Sample, name: str) -> Iterable[str]:
    for metric, scores in (("gold", sample.gold), ("reward", sample.reward), *sample.scores.items()):
        score = scores.get(name)
        if score is not None:
            yield f"{metric} {wording.brief(score, decimals=2)}"


def _cost(run: RunRecord) -> dict[str, Any]:
    costs = {name: record.manifest.cost for name, record in run.stages.items()}
    return {
        "rows": costs,
        "seconds": sum(cost.seconds for cost in costs.values()),
        "tokens": sum(cost.tokens for cost in costs.values()),
        "peak_memory_bytes": max(cost.peak_memory_bytes for cost in costs.values()),
    }


def _settings_of_machines(run: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """Setting -> its values, each with the stages that had it; the stages are left out where all agree."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, record in run.stages.items():
        for setting, value in record.manifest.environment.items():
            found.setdefault(setting, {}).setdefault(wording.compact(value), []).append(name)
    return [(setting, _by_stage(values)) for setting, values in sorted(found.items())]


def _by_stage(values: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    return [(value, ", ".join(stages) if len(values) > 1 else "") for value, stages in values.items()]
