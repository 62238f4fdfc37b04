"""Reliability diagrams: how often a reward model is right against how sure it is (Guo et al. 2017, arXiv
1706.04599)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from markupsafe import Markup

from pipeline.manifest import Metric
from pipeline.report import wording
from pipeline.report.inputs import CalibrationBin
from pipeline.report.picture import ACCENT, BAND, INK, draw
from reward.calibration import BINS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 0.5
"""Confidence in a favourite among two."""


@dataclass(frozen=True)
class Reliability:
    """The diagram of one reward model, its expected calibration error as it is written, and its bins."""

    model: str
    picture: Markup
    error: str
    bins: Sequence[CalibrationBin]

    @property
    def pairs(self) -> int:
        """In all bins."""
        return sum(each.n for each in self.bins)


def draw_reliability(model: str, bins: Sequence[CalibrationBin], error: Metric | None, salt: str) -> Reliability:
    """The diagram of a reward model.

    Args:
        model: Its name.
        bins: Those that hold a pair.
        error: Expected calibration error, where it is known.
        salt: Different for each picture of a page.
    """
    written = wording.with_interval("accuracy", error) if error else ""
    return Reliability(model, draw(partial(_plot, bins), (4.0, 2.9), salt), written, bins)


def _plot(bins: Sequence[CalibrationBin], axes: Axes) -> None:
    width = (1 - LEAST) / BINS
    middles = [LEAST + (_place(each) + 0.5) * width for each in bins]
    axes.bar(middles, [each.accuracy for each in bins], width * 0.92, color=BAND, linewidth=0)
    axes.plot([LEAST, 1], [LEAST, 1], color=INK, linewidth=0.8)
    axes.plot(
        [each.confidence for each in bins],
        [each.accuracy for each in bins],
        color=ACCENT,
        linewidth=1.3,
        marker="o",
        markersize=3.5,
    )
    for middle, each in zip(middles, bins, strict=True):
        axes.annotate(f"{each.n:,}", (middle, 0), (0, 3), textcoords="offset points", ha="center", color=INK)
    axes.set_xlim(LEAST, 1)
    axes.set_ylim(0, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("confidence, and pairs at the foot of each bar", color=INK)
    axes.set_ylabel("share right", color=INK)


def _place(found: CalibrationBin) -> int:
    """Which bin it is, by its mean confidence."""
    return min(int((found.confidence - LEAST) / (1 - LEAST) * BINS), BINS - 1)
