"""Reward against divergence: what policies gained for how far they went, beside best-of-n of where they started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import TYPE_CHECKING

from markupsafe import Markup

from pipeline.manifest import Metric
from pipeline.report import wording
from pipeline.report.forest import direction
from pipeline.report.inputs import Evaluation, FrontierPoint, ModelEvaluation, RunRecord, StageRecord
from pipeline.report.picture import BAND, CLASSES, INK, SERIES, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = ("gold", "reward")
"""What is drawn against divergence, a panel each: what the policy should do, and what it was trained for."""
COLUMNS = ("kl", *METRICS, "frontier_gap")
SHAPES = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M-3.6-3.6h7.2v7.2h-7.2z",
    "^": "M0-4.4 4.4 3.4h-8.8z",
    "D": "M0-4.8 4.8 0 0 4.8-4.8 0z",
    "v": "M0 4.4 4.4-3.4h-8.8z",
}
"""Marker in a panel -> the same as a path around 0, for the key."""

Path = tuple[tuple[float, float], ...]
"""Divergences and values, in the order of training."""


@dataclass(frozen=True)
class Policy:
    """A model, what was measured of it, and the way it took there."""

    name: str
    metrics: Mapping[str, Metric]
    paths: Mapping[str, Path]
    """Metric -> the looks, where they were with the judge of that panel."""
    colour: str
    marker: str

    @property
    def key(self) -> tuple[str, str]:
        """Class of its colour and path of its marker."""
        return f"fill-{CLASSES[self.colour]}", SHAPES[self.marker]


@dataclass(frozen=True)
class Entry:
    """A figure in the table, already worded."""

    label: str
    value: str = ""
    interval: str = ""
    direction: str = "level"


@dataclass(frozen=True)
class Chart:
    """All policies that were trained from one model."""

    parent: str
    best_of: int
    """The last n of best-of-n; 1 where it was not measured."""
    policies: tuple[Policy, ...]
    panels: tuple[tuple[str, Markup], ...]
    """Metric and picture."""
    lines: tuple[tuple[str, tuple[Entry, ...]], ...]
    """Best-of-n and the policies, for those who do not see the panels."""


def draw_frontiers(run: RunRecord) -> list[Chart]:
    """A chart for each model from which policies with a measured divergence were trained, in each evaluation."""
    return [
        _chart(run, judged, parent, f"{name}/{number}")
        for name, judged in run.stages.items()
        if judged.evaluation
        for number, parent in enumerate(_parents(judged.evaluation))
    ]


def _parents(evaluation: Evaluation) -> list[str]:
    return list(dict.fromkeys(each.parent for each in evaluation.models.values() if each.parent and _drawn(each)))


def _drawn(model: ModelEvaluation) -> bool:
    return "kl" in model.metrics and not model.metrics.keys().isdisjoint(METRICS)


def _chart(run: RunRecord, judged: StageRecord, parent: str, salt: str) -> Chart:
    assert judged.evaluation
    points = _points(judged.evaluation, parent)
    policies = tuple(_policies(run, judged, parent))
    shown = [metric for metric in METRICS if any(metric in each.metrics for each in policies)]
    panels = [
        (metric, draw(partial(_plot, metric, points, policies), (4.0, 2.6), f"{salt}/{metric}")) for metric in shown
    ]
    return Chart(parent, points[-1].n, policies, tuple(panels), tuple(_lines(parent, points, policies)))


def _points(evaluation: Evaluation, parent: str) -> list[FrontierPoint]:
    """Best-of-n's; where it was not measured, the model itself, which is the best of one."""
    itself = evaluation.models.get(parent, ModelEvaluation()).metrics
    alone = FrontierPoint(n=1, kl=0.0, gold=itself.get("gold"), reward=itself.get("reward"))
    return evaluation.frontier.get(parent) or [alone]


def _policies(run: RunRecord, judged: StageRecord, parent: str) -> Iterator[Policy]:
    assert judged.evaluation
    models = judged.evaluation.models.items()
    trained = [(name, each) for name, each in models if each.parent == parent and _drawn(each)]
    for number, (name, model) in enumerate(trained):
        colour, marker = SERIES[number % len(SERIES)], list(SHAPES)[number % len(SHAPES)]
        stage = run.stages.get(name)
        known = stage if stage and _is_evaluated(name, stage, judged) else None
        yield Policy(name, model.metrics, _paths(known, judged) if known else {}, colour, marker)


def _is_evaluated(name: str, stage: StageRecord, judged: StageRecord) -> bool:
    """Whether the model of that name is this stage's as it is now."""
    return (name, stage.manifest.digest) in {(each.source, each.digest) for each in judged.manifest.inputs.values()}


def _paths(stage: StageRecord, judged: StageRecord) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    if not _sampled_alike(stage, judged):
        return paths
    if judged.evaluation and stage.manifest.settings.get("gold", "none") == judged.evaluation.gold != "none":
        paths["gold"] = tuple((look.kl, look.score) for look in stage.looks)
    if _rewarded_alike(stage, judged):
        paths["reward"] = tuple((look.kl, look.reward) for look in stage.looks)
    return paths


def _sampled_alike(stage: StageRecord, judged: StageRecord) -> bool:
    """Whether looks and evaluation sample alike: at another temperature or length, a policy has another divergence."""
    own, other = stage.manifest.settings, judged.manifest.settings
    return all(own.get(name) == other.get(name) for name in ("temperature", "max_new_tokens"))


def _rewarded_alike(stage: StageRecord, judged: StageRecord) -> bool:
    """Whether what a stage trained for is the evaluation's reward model, and nothing else."""
    own, other = (each.manifest.inputs.get("reward") for each in (stage, judged))
    settings = stage.manifest.settings
    alone = not settings.get("rules") and settings.get("reward_weight", 1.0) == 1.0
    return alone and own is not None and other is not None and own.digest == other.digest


def _lines(
    parent: str, points: Sequence[FrontierPoint], policies: Sequence[Policy]
) -> Iterator[tuple[str, tuple[Entry, ...]]]:
    rows: list[tuple[str, Mapping[str, Metric]]] = []
    for each in points:
        measured = {"kl": Metric(value=each.kl), "gold": each.gold, "reward": each.reward}
        name = parent if each.n == 1 else f"{parent}, best of {each.n}"
        rows.append((name, {metric: value for metric, value in measured.items() if value}))
    rows += [(each.name, each.metrics) for each in policies]
    shown = [column for column in COLUMNS if any(column in metrics for _, metrics in rows)]
    for name, metrics in rows:
        yield name, tuple(_entry(column, metrics.get(column)) for column in shown)


def _entry(column: str, measured: Metric | None) -> Entry:
    label = wording.label(column)
    if measured is None:
        return Entry(label)
    signed = column == "frontier_gap"
    written = wording.number(column, measured.value, signed=signed)
    side = direction(measured.low, measured.high) if signed else "level"
    return Entry(label, written, wording.interval(column, measured, signed=signed), side)


def _plot(metric: str, points: Sequence[FrontierPoint], policies: Sequence[Policy], axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    _plot_frontier(axes, [(each.n, _place(each.kl), found) for each in points if (found := getattr(each, metric))])
    for policy in policies:
        path = policy.paths.get(metric, ())
        places, values = [_place(kl) for kl, _ in path], [value for _, value in path]
        axes.plot(places, values, color=policy.colour, linewidth=0.9, marker=policy.marker, markersize=1.8)
        if metric in policy.metrics:
            _plot_policy(axes, policy, policy.metrics[metric])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("\N{SQUARE ROOT}KL, KL in nats a response", color=INK)


def _plot_frontier(axes: Axes, points: Sequence[tuple[int, float, Metric]]) -> None:
    places, values = [place for _, place, _ in points], [metric.value for *_, metric in points]
    lows, highs = zip(*(_bounds(metric) for *_, metric in points), strict=True) if points else ((), ())
    axes.fill_between(places, lows, highs, color=BAND, linewidth=0)
    axes.plot(places, values, color=INK, linewidth=1.3, marker=".", markersize=5)
    for n, place, metric in points[1:]:
        axes.annotate(str(n), (place, metric.value), (0, 4), textcoords="offset points", ha="center", color=INK)


def _plot_policy(axes: Axes, policy: Policy, measured: Metric) -> None:
    """Its point, with the intervals of both figures."""
    kl = policy.metrics["kl"]
    place, value = _place(kl.value), measured.value
    axes.plot([place, place], _bounds(measured), color=policy.colour, linewidth=1.3)
    axes.plot([_place(bound) for bound in _bounds(kl)], [value, value], color=policy.colour, linewidth=1.3)
    axes.plot([place], [value], color=policy.colour, marker=policy.marker, markersize=6)


def _bounds(metric: Metric) -> tuple[float, float]:
    """The interval; of no width where there is none."""
    low, high = metric.low, metric.high
    return metric.value if low is None else low, metric.value if high is None else high


def _place(kl: float) -> float:
    """Where a divergence stands; an estimate that is below zero stands at zero."""
    return sqrt(max(0.0, kl))
