"""Training curves as small pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeGuard

from markupsafe import Markup

from pipeline.report.picture import ACCENT, TRACE, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTITIES = ("loss", "reward", "kl", "accuracy", "margin", "entropy", "clip_fraction", "value_loss")
"""What is drawn, the first four that a stage logged."""
PANELS_PER_STAGE = 4
ALWAYS = ("policy_loss",)
"""What is drawn besides: the loss of a stage whose records have losses of several roles."""
MOST_POINTS = 240


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps of one stage."""

    quantity: str
    picture: Markup
    first: float
    last: float


def draw_curves(stage: str, steps: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """A picture of each known quantity that was logged at two steps or more, four at most and the loss of a policy.

    Args:
        stage: Its name, which keeps the identifiers of pictures on one page apart.
        steps: Records of `metrics.jsonl`.
    """
    logged = [quantity for quantity in QUANTITIES if len(_points(steps, quantity)) > 1]
    return draw_each(stage, steps, (*logged[:PANELS_PER_STAGE], *ALWAYS))


def draw_each(
    salt: str, steps: Sequence[Mapping[str, Any]], quantities: Iterable[str], most: int = MOST_POINTS
) -> list[Curve]:
    """A picture of each of these quantities that was logged at two steps or more.

    Args:
        salt: Keeps the identifiers of pictures on one page apart.
        steps: Records of `metrics.jsonl`.
        quantities: Names of their fields.
        most: Points of a curve.
    """
    logged = [(quantity, _thinned(_points(steps, quantity), most)) for quantity in quantities]
    return [
        Curve(quantity, _picture(points, f"{salt}/{quantity}"), first=points[0][1], last=points[-1][1])
        for quantity, points in logged
        if len(points) > 1
    ]


def _points(steps: Iterable[Mapping[str, Any]], quantity: str) -> list[tuple[float, float]]:
    points = [(record.get("step"), record.get(quantity)) for record in steps]
    return [(x, y) for x, y in points if _is_finite(x) and _is_finite(y)]


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Means of consecutive points, so that a long run does not make a heavy page."""
    width = math.ceil(len(points) / most) if points else 1
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _running_mean(values: list[float]) -> list[float]:
    """Centred, over a fifteenth of the points, so that it does not lag; over fewer at both ends."""
    reach = len(values) // 30
    return [fmean(values[max(0, index - reach) : index + reach + 1]) for index in range(len(values))]


def _picture(points: list[tuple[float, float]], salt: str) -> Markup:
    def plot(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        steps, values = [x for x, _ in points], [y for _, y in points]
        axes.plot(steps, values, color=TRACE, linewidth=0.8)
        axes.plot(steps, _running_mean(values), color=ACCENT, linewidth=1.6)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.margins(x=0.01)

    return draw(plot, (3.3, 1.65), salt)
