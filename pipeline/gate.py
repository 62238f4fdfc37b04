"""A gate: what figures of an evaluation have to be for a run to end well.

A requirement is written `RELATION BOUND`, with one of `>`, `>=`, `<`, `<=`, and as bound a number, `parent`,
`parent + NUMBER`, `parent - NUMBER` or `NUMBER x parent`. It holds when the whole 95% interval is on the right side of
the bound: that of the figure for a number, and for a parent that of the paired difference or ratio. So a figure that
may be on the wrong side by chance does not pass, and neither does one that was not measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.figures import GAIN, RATIO
from pipeline.manifest import Metric
from pipeline.suggestion import suggest

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_GRAMMAR = re.compile(
    rf"""
    \s* (?P<relation> [<>]=? ) \s*
    (?: (?P<number> {_NUMBER} )
      | (?P<factor> {_NUMBER} ) \s* x \s* parent
      | parent (?: \s* (?P<sign> [-+] ) \s* (?P<margin> {_NUMBER.removeprefix("[-+]?")} ) )?
    ) \s*
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Requirement:
    """One requirement of a metric.

    Attributes:
        text: As it was written.
        relation: `>`, `>=`, `<` or `<=`.
        figures: What the metric's name is followed by -> the bound; the first that was measured counts.
    """

    text: str
    relation: str
    figures: Mapping[str, float]

    def allows(self, figure: Metric, bound: float, *, paired: bool) -> bool:
        """Whether the whole interval satisfies the requirement; a figure without one is taken as it is, if that may be.

        Args:
            figure: The metric, its difference or its ratio.
            bound: What it is held against.
            paired: Whether it compares with the parent; then it needs an interval.
        """
        side = figure.low if self.relation[0] == ">" else figure.high
        if side is None:
            if paired:
                return False
            side = figure.value
        if side == bound:
            return self.relation.endswith("=")
        return (side > bound) == (self.relation[0] == ">")


@dataclass(frozen=True)
class Check:
    """A requirement and what was measured.

    Attributes:
        model: Whose figure it is.
        metric: Which one.
        required: The requirement as it was written.
        figure: The figure that decided: the metric, or how it compares with the parent; None where there is none.
        compared: `gain` or `ratio` where that figure compares with the parent, else nothing.
        holds: Whether the requirement does.
        missing: Where there is no figure, what is said instead.
    """

    model: str
    metric: str
    required: str
    figure: Metric | None
    compared: str
    holds: bool
    missing: str = ""

    def __str__(self) -> str:
        return f"{self.model}.{self.metric} should be `{self.required}`{'' if self.holds else ', but'} {self._found()}"

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "model": self.model,
            "metric": self.metric,
            "required": self.required,
            "compared": self.compared,
            "figure": self.figure.model_dump() if self.figure else None,
            "holds": self.holds,
        }

    def _found(self) -> str:
        if self.figure is None:
            return self.missing
        what = {"gain": "its difference from the parent's is", "ratio": "its ratio to the parent's is", "": "is"}
        return f"{what[self.compared]} {_written(self.figure)}"


def parse(text: str) -> Requirement:
    """Read a requirement.

    Raises:
        ValueError: It is not of the grammar.
    """
    found = _GRAMMAR.fullmatch(text)
    if found is None:
        forms = "`> 0.5`, `> parent`, `> parent - 0.02` or `< 1.05 x parent`"
        raise ValueError(f"should be a comparison as in {forms} (with >, >=, < or <=), not `{text[:60]}`")
    if found["number"]:
        return Requirement(text, found["relation"], {"": float(found["number"])})
    if found["factor"]:
        if float(found["factor"]) <= 0:
            raise ValueError(f"should be a positive number times the parent's, not {found['factor']}")
        return Requirement(text, found["relation"], {RATIO: float(found["factor"])})
    if found["margin"]:
        return Requirement(text, found["relation"], {GAIN: float(f"{found['sign']}{found['margin']}")})
    return Requirement(text, found["relation"], {GAIN: 0.0, RATIO: 1.0})


def checked(text: str) -> str:
    """The text of a requirement, if it is one.

    Raises:
        ValueError: It is not of the grammar.
    """
    parse(text)
    return text


def check(required: Mapping[str, Mapping[str, str]], metrics: Mapping[str, Metric]) -> list[Check]:
    """Hold an evaluation's figures against what is required.

    Args:
        required: Model -> metric -> requirement.
        metrics: `MODEL.METRIC` -> figure, as the manifest of the evaluation has them.
    """
    return [
        _check(model, metric, parse(text), metrics)
        for model, wanted in required.items()
        for metric, text in wanted.items()
    ]


def _check(model: str, metric: str, wanted: Requirement, metrics: Mapping[str, Metric]) -> Check:
    for suffix, bound in wanted.figures.items():
        figure = metrics.get(f"{model}.{metric}{suffix}")
        if figure is not None:
            holds = wanted.allows(figure, bound, paired=bool(suffix))
            return Check(model, metric, wanted.text, figure, suffix.removeprefix("_"), holds)
    return Check(model, metric, wanted.text, None, "", holds=False, missing=_missing(model, metric, wanted, metrics))


def _missing(model: str, metric: str, wanted: Requirement, metrics: Mapping[str, Metric]) -> str:
    """Why there is no figure: no model has it, or this one has not, or it was not compared."""
    if not any(name.endswith(f".{metric}") for name in metrics):
        own = {name.removeprefix(f"{model}.") for name in metrics if name.startswith(f"{model}.")}
        known = (name for name in own if not name.endswith((GAIN, RATIO)))
        return f"no such figure was measured{suggest(metric, known)}"
    return "was not measured" if "" in wanted.figures else "was not compared with a parent's"


def _written(figure: Metric) -> str:
    if figure.low is None or figure.high is None:
        return f"{figure.value:.4g}, without an interval"
    return f"{figure.value:.4g} [{figure.low:.4g}, {figure.high:.4g}]"
