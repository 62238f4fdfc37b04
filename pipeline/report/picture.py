"""Small SVG pictures for a page: coloured by its classes, and the same bytes every time."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, ACCENT, RULE, TRACE, BAND = (f"#00000{number}" for number in range(1, 6))
SERIES = tuple(f"#00001{number}" for number in range(1, 7))
"""Of things that are told apart by colour."""
CLASSES = {
    **{INK: "ink", ACCENT: "accent", RULE: "rule", TRACE: "trace", BAND: "band"},
    **{colour: f"series-{number}" for number, colour in enumerate(SERIES, 1)},
}
"""Stand-ins that become the page's classes, so that a picture is readable in light and dark."""
_ATTRIBUTES = frozenset(
    ("fill", "stroke", "stroke-width", "stroke-linecap", "stroke-linejoin", "font-size", "text-anchor")
)


def draw(plot: Callable[[Axes], None], size: tuple[float, float], salt: str) -> Markup:
    """The picture as an element of the page.

    Args:
        plot: Draws into the axes, with this module's colours and no text but of its own making.
        size: Width and height in inches.
        salt: Different for each picture, which keeps the identifiers on one page apart.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "font.size": 8,
        "axes.linewidth": 0.6,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        _dress(axes)
        plot(axes)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(written.getvalue())


def _dress(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(axis="y", color=RULE, linewidth=0.4)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.yaxis.set_major_locator(MaxNLocator(4))


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
    painted = [name for name in ("fill", "stroke") if plain.get(name) in CLASSES]
    classes = [f"{name}-{CLASSES[plain.pop(name)]}" for name in painted]
    return plain | ({"class": " ".join(classes)} if classes else {})
