"""The losses of both sides in one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(path: Path, learning: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> Path:
    """Write an SVG with a line for each side; returns the path."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = path.stem  # the same picture for the same figures
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for side, style in (("ours", "-"), ("peer", "--")):
        if side in learning:
            losses = learning[side]["losses"]
            axes.plot(range(1, len(losses) + 1), losses, style, label=names[side])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss of the step")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
