"""How the diagnostics of a stage that samples and learns went: where each began, where it ended, and whether that is
healthy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import COMPARED_ROUNDS
from pipeline.diagnostics import DIAGNOSTICS, Diagnostic, Side, is_round
from pipeline.report.curves import Curve, draw_each
from pipeline.report.inputs import Look, RunRecord

POINTS = 120
"""Of a curve; there are many of them, and a long run should not make a heavy page."""


@dataclass(frozen=True)
class Trend:
    """One diagnostic over the rounds that have it.

    Attributes:
        first, last: Means of as many values as alarms compare, or of half of all where there are fewer than ten.
        least, most: Of all values that are finite.
        rounds: That have one.
    """

    diagnostic: Diagnostic
    first: float
    last: float
    least: float
    most: float
    rounds: int

    @property
    def side(self) -> Side | None:
        """Where the last value lies, seen from the healthy range; None where there is no range."""
        return self.diagnostic.side(self.last, self.first)

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        figures = {"first": self.first, "last": self.last, "least": self.least, "most": self.most}
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        return {**finite, "rounds": self.rounds, "healthy": self.diagnostic.healthy, "side": self.side}


@dataclass(frozen=True)
class Health:
    """What one stage logged of its rounds, and its looks at held-out prompts."""

    stage: str
    kind: str
    trends: tuple[Trend, ...]
    looks: tuple[Look, ...]
    curves: tuple[Curve, ...]


def health(run: RunRecord) -> list[Health]:
    """That of each stage that has any."""
    found = [
        Health(
            name,
            record.manifest.stage_kind,
            tuple(trends(record.steps)),
            record.looks,
            tuple(draw_each(f"{name}/health", _rounds(record.steps), [each.name for each in DIAGNOSTICS], POINTS)),
        )
        for name, record in run.stages.items()
    ]
    return [each for each in found if each.trends or each.looks]


def trends(steps: Iterable[Mapping[str, Any]]) -> list[Trend]:
    """The diagnostics that were logged, in their order.

    Args:
        steps: Records of `metrics.jsonl`, of which those of rounds count.
    """
    rounds = _rounds(steps)
    # Numbers that JSON has none for are logged as text: `nan`, `inf`.
    logged = [
        (each, [float(record[each.name]) for record in rounds if record.get(each.name) is not None])
        for each in DIAGNOSTICS
    ]
    return [_trend(diagnostic, values) for diagnostic, values in logged if values]


def _trend(diagnostic: Diagnostic, values: Sequence[float]) -> Trend:
    # No value is both at first and at last, but where there is only one.
    count = min(COMPARED_ROUNDS, max(1, len(values) // 2))
    first, last = sum(values[:count]) / count, sum(values[-count:]) / count
    finite = [each for each in values if math.isfinite(each)] or [math.nan]
    return Trend(diagnostic, first, last, min(finite), max(finite), len(values))


def _rounds(steps: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [record for record in steps if is_round(record)]
