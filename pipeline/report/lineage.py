"""The lineage drawing: stages as boxes in columns by depth, inputs as arrows; drawn by the template.

An arrow that skips columns gets a lane of its own in each of them, so that it never runs through a box; boxes
and lanes of a column are ordered by the mean position of their neighbours (Sugiyama et al. 1981, doi
10.1109/TSMC.1981.4308636).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

BOX_WIDTH, BOX_HEIGHT = 124, 50
_ROW_GAP, _LANE_HEIGHT, _MARGIN = 26, 16, 12
_NARROWEST_GAP, _CHARACTER_WIDTH = 44, 6.0
_SWEEPS = 6

Place = tuple[str, ...]
"""A box is (name,); a lane is (source, target, column)."""


@dataclass(frozen=True)
class Box:
    """A stage, or an input from outside the run; x and y are its upper left corner."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Arrow:
    """From a parent to its child; the label's coordinates are its middle."""

    source: str
    target: str
    path: str
    label: str
    x: float
    y: float


@dataclass(frozen=True)
class Drawing:
    """Boxes and arrows in one coordinate system, in pixels."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


def lay_out(edges: Mapping[tuple[str, str], str], names: list[str]) -> Drawing:
    """Place boxes and arrows.

    Args:
        edges: (parent, child) -> roles, written on the arrow. Must hold no cycle.
        names: All boxes, parents before children.
    """
    depth = _depths(edges, names)
    chains = {edge: _chain(edge, depth) for edge in edges}
    columns = _columns(names, depth, chains)
    gap = max([_NARROWEST_GAP, *(14 + _CHARACTER_WIDTH * len(label) for label in edges.values())])
    height = max(_height(column) for column in columns)
    centres = {place: y for column in columns for place, y in _centres(column, height).items()}
    left = {name: _MARGIN + depth[name] * (BOX_WIDTH + gap) for name in names}
    return Drawing(
        width=2 * _MARGIN + len(columns) * BOX_WIDTH + (len(columns) - 1) * gap,
        height=2 * _MARGIN + height,
        boxes=tuple(Box(name, left[name], centres[(name,)] - BOX_HEIGHT / 2) for name in names),
        arrows=_arrows(edges, chains, centres, left, gap),
    )


def _depths(edges: Mapping[tuple[str, str], str], names: list[str]) -> dict[str, int]:
    """Longest path from the start; what has no parent stands just before its first child."""
    depth: dict[str, int] = {}
    for name in names:
        depth[name] = max((depth[parent] + 1 for parent, child in edges if child == name), default=0)
    for name in names:
        children = [depth[child] for parent, child in edges if parent == name]
        if children and not any(child == name for _, child in edges):
            depth[name] = min(children) - 1
    return depth


def _chain(edge: tuple[str, str], depth: Mapping[str, int]) -> list[Place]:
    source, target = edge
    lanes = [(source, target, str(column)) for column in range(depth[source] + 1, depth[target])]
    return [(source,), *lanes, (target,)]


def _columns(
    names: list[str], depth: Mapping[str, int], chains: Mapping[tuple[str, str], list[Place]]
) -> list[list[Place]]:
    columns: list[list[Place]] = [[] for _ in range(max(depth.values()) + 1)]
    for name in names:
        columns[depth[name]].append((name,))
    for chain in chains.values():
        for lane in chain[1:-1]:
            columns[int(lane[2])].append(lane)
    links = [(a, b) for chain in chains.values() for a, b in pairwise(chain)]
    for sweep in range(_SWEEPS):
        forwards = sweep % 2 == 0
        for fixed, moved in _neighbours(columns, forwards):
            _sort_by_neighbours(columns[moved], columns[fixed], links)
    return columns


def _neighbours(columns: list[list[Place]], forwards: bool) -> list[tuple[int, int]]:
    pairs = [(index, index + 1) for index in range(len(columns) - 1)]
    return pairs if forwards else [(right, left) for left, right in reversed(pairs)]


def _sort_by_neighbours(moved: list[Place], fixed: list[Place], links: list[tuple[Place, Place]]) -> None:
    position = {place: (index + 0.5) / len(fixed) for index, place in enumerate(fixed)}
    own = {place: (index + 0.5) / len(moved) for index, place in enumerate(moved)}

    def mean_position(place: Place) -> float:
        joined = [{a, b} - {place} for a, b in links if place in (a, b)]
        seen = [position[other] for pair in joined for other in pair if other in position]
        return fmean(seen) if seen else own[place]

    moved.sort(key=lambda place: (mean_position(place), place))


def _thickness(place: Place) -> float:
    return BOX_HEIGHT if len(place) == 1 else _LANE_HEIGHT


def _height(column: list[Place]) -> float:
    return sum(map(_thickness, column)) + _ROW_GAP * (len(column) - 1)


def _centres(column: list[Place], height: float) -> dict[Place, float]:
    centres: dict[Place, float] = {}
    top = _MARGIN + (height - _height(column)) / 2
    for place in column:
        centres[place] = top + _thickness(place) / 2
        top += _thickness(place) + _ROW_GAP
    return centres


def _arrows(
    edges: Mapping[tuple[str, str], str],
    chains: Mapping[tuple[str, str], list[Place]],
    centres: Mapping[Place, float],
    left: Mapping[str, float],
    gap: float,
) -> tuple[Arrow, ...]:
    found: list[Arrow] = []
    for target in dict.fromkeys(child for _, child in edges):
        arriving = [edge for edge in edges if edge[1] == target]
        arriving.sort(key=lambda edge: centres[chains[edge][-2]])
        spread = min(14, BOX_HEIGHT / (len(arriving) + 1))
        labelled: set[str] = set()
        for index, edge in enumerate(arriving):
            port = centres[(target,)] + (index - (len(arriving) - 1) / 2) * spread
            label = "" if edges[edge] in labelled else edges[edge]
            labelled.add(edges[edge])
            heights = [centres[place] for place in chains[edge][:-1]]
            found.append(_arrow(edge, [*heights, port], label, left, gap))
    return tuple(found)


def _arrow(edge: tuple[str, str], heights: list[float], label: str, left: Mapping[str, float], gap: float) -> Arrow:
    """Level through every column at its height, a smooth step in every gap, the last to the target."""
    x = left[edge[0]] + BOX_WIDTH
    parts = [f"M{x:.1f} {heights[0]:.1f}"]
    for column, (before, after) in enumerate(pairwise(heights), start=2):
        middle = x + gap / 2
        parts.append(f"C{middle:.1f} {before:.1f} {middle:.1f} {after:.1f} {x + gap:.1f} {after:.1f}")
        x += gap + BOX_WIDTH
        if column < len(heights):
            parts.append(f"H{x:.1f}")
    x, y = left[edge[1]] - gap / 2, fmean(heights[-2:])
    return Arrow(*edge, path=" ".join(parts), label=label, x=x, y=y)
