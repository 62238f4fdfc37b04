"""Training curves as small SVG pictures, coloured by the page and the same bytes every time."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeGuard
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTITIES = ("loss", "reward", "kl", "accuracy", "margin", "entropy", "clip_fraction", "value_loss")
"""What is drawn, the first four that a stage logged."""
PANELS_PER_STAGE = 4
_MOST_POINTS = 240
_COLOURS = {"#000001": "ink", "#000002": "accent", "#000003": "rule", "#000004": "trace"}
"""Stand-ins that become the page's classes, so that a curve is readable in light and dark."""
_ATTRIBUTES = frozenset(
    ("fill", "stroke", "stroke-width", "stroke-linecap", "stroke-linejoin", "font-size", "text-anchor")
)


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps of one stage."""

    quantity: str
    picture: Markup
    first: float
    last: float


def draw_curves(stage: str, steps: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """A picture of each known quantity that was logged at two steps or more, four at most.

    Args:
        stage: Its name, which keeps the identifiers of pictures on one page apart.
        steps: Records of `metrics.jsonl`.
    """
    logged = {quantity: _points(steps, quantity) for quantity in QUANTITIES}
    shown = [(quantity, points) for quantity, points in logged.items() if len(points) > 1][:PANELS_PER_STAGE]
    return [
        Curve(quantity, _draw(points, f"{stage}/{quantity}"), first=points[0][1], last=points[-1][1])
        for quantity, points in shown
    ]


def _points(steps: Iterable[Mapping[str, Any]], quantity: str) -> list[tuple[float, float]]:
    points = [(record.get("step"), record.get(quantity)) for record in steps]
    return _thinned([(x, y) for x, y in points if _is_finite(x) and _is_finite(y)])


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of consecutive points, so that a long run does not make a heavy page."""
    width = math.ceil(len(points) / _MOST_POINTS) if points else 1
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def _running_mean(values: list[float]) -> list[float]:
    """Centred, over a fifteenth of the points, so that it does not lag; over fewer at both ends."""
    reach = len(values) // 30
    return [fmean(values[max(0, index - reach) : index + reach + 1]) for index in range(len(values))]


def _draw(points: list[tuple[float, float]], salt: str) -> Markup:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "font.size": 8,
        "axes.linewidth": 0.6,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(3.3, 1.65), layout="constrained")
        _plot(figure.subplots(), points)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(written.getvalue())


def _plot(axes: Axes, points: list[tuple[float, float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps, values = [x for x, _ in points], [y for _, y in points]
    axes.plot(steps, values, color="#000004", linewidth=0.8)
    axes.plot(steps, _running_mean(values), color="#000002", linewidth=1.6)
    axes.grid(axis="y", color="#000003", linewidth=0.4)
    axes.tick_params(length=0, labelcolor="#000001")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#000003")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.margins(x=0.01)


def _inline(document: str) -> Markup:
    """The picture as an element of a page: no namespaces, and no inline style, which the policy refuses."""
    root = ElementTree.fromstring(document)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = _attributes(element.attrib)
    for parent in list(root.iter()):
        for child in [each for each in parent if each.tag in {"metadata", "style"}]:
            parent.remove(child)
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": "curve", "aria-hidden": "true"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _attributes(attributes: Mapping[str, str]) -> dict[str, str]:
    plain = {_local(name): re.sub(r"\s*\n", " ", value).strip() for name, value in attributes.items()}
    if not plain.get("id", "").startswith(("m", "p")) or plain["id"].startswith(("matplotlib", "patch")):
        plain.pop("id", None)
    declared = [part.partition(":") for part in plain.pop("style", "").split(";") if part.strip()]
    plain.update({name.strip(): value.strip() for name, _, value in declared if name.strip() in _ATTRIBUTES})
    painted = [name for name in ("fill", "stroke") if plain.get(name) in _COLOURS]
    classes = [f"{name}-{_COLOURS[plain.pop(name)]}" for name in painted]
    return plain | ({"class": " ".join(classes)} if classes else {})
