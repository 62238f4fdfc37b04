"""The picture under the verdict: every model's gain over its parent and its interval, all on one scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.figures import GAIN
from pipeline.report.inputs import ModelEvaluation
from pipeline.report.wording import with_interval

_WIDTH, _EDGE = 100.0, 2.0


@dataclass(frozen=True)
class Gain:
    """One row; low, value and high are percent of the picture's width."""

    name: str
    parent: str
    low: float
    value: float
    high: float
    written: str
    direction: str
    """`up` or `down` when the interval excludes 0, else `level`."""


@dataclass(frozen=True)
class Forest:
    """Rows on one scale; zero is percent of the picture's width."""

    metric: str
    zero: float
    rows: tuple[Gain, ...]


def compare(models: Mapping[str, ModelEvaluation], metric: str) -> Forest | None:
    """Gains in `metric` of all models that have one with an interval; None when there is none."""
    name = f"{metric}{GAIN}"
    measured = [
        (model, found.parent, gain.low, gain, gain.high)
        for model, found in models.items()
        if found.parent is not None
        and (gain := found.metrics.get(name)) is not None
        and gain.low is not None
        and gain.high is not None
    ]
    if not measured:
        return None
    least = min(0.0, *(low for _, _, low, _, _ in measured))
    span = max(0.0, *(high for *_, high in measured)) - least or 1.0

    def place(value: float) -> float:
        return round(_EDGE + (_WIDTH - 2 * _EDGE) * (value - least) / span, 2)

    rows = [
        Gain(
            model,
            parent,
            place(low),
            place(gain.value),
            place(high),
            with_interval(metric, gain, signed=True),
            direction(low, high),
        )
        for model, parent, low, gain, high in measured
    ]
    return Forest(metric, place(0.0), tuple(rows))


def direction(low: float | None, high: float | None, *, neutral: float = 0.0) -> str:
    """The side of `neutral` that an interval lies on: `up`, `down`, or `level` when it holds it."""
    if low is not None and low > neutral:
        return "up"
    if high is not None and high < neutral:
        return "down"
    return "level"
