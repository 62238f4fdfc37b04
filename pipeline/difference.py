"""What two runs differ in, and what that did to each figure.

Of figures that both runs measured on the same prompts, or on the same rows of a suite by their ids, the interval is
that of the paired difference. Of others it is made of the two intervals as if they were independent: Zou and Donner's
(2008, doi 10.1002/sim.3095), which for two proportions is Newcombe's. Where both runs measured on the same rows that is
wider than it would have to be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import manifest as manifests
from pipeline.figures import GAIN, LENGTH_CONTROLLED, SCORE, SETTINGS, SUITE, WIN_RATE
from pipeline.manifest import Manifest, Metric
from pipeline.observations import ROUNDING, Column, columns
from pipeline.store import RunDirectory
from reward.intervals import paired_difference, proportion_difference, ratio_interval

PAIRED = {"prompt": "paired by prompt", "row": "paired by row"}
"""What was observed -> what the interval of a change rests on where both runs have the same."""
NOT_PAIRED = {
    "prompt": "independent intervals: not all prompts the same",
    "row": "independent intervals: not all rows the same",
}
"""The same, where they have not."""
INDEPENDENT, NO_INTERVAL = "independent intervals", "no interval"
OTHER_JUDGE = "another judge: not comparable"
GOLD, ACCURACY = "gold", ".accuracy"
"""The judge who says what is correct, and what the figure is called of how often it does."""
SUITES = "suites."
"""What the roles of suites begin with among an evaluation's data."""
TRANSPORT = ("hosts", "token_variable", "timeout", "retries", "requests_at_once", "rows_per_request")
"""Settings of a server that say how it is asked, and nothing about what it answers."""
SCORING = ("method", "gold", "rules", "normalised", "measure", "n")
"""Settings of a suite by which a row's number is made of what a model says."""


@dataclass(frozen=True)
class Change:
    """A figure before and after."""

    stage: str
    metric: str
    old: Metric
    new: Metric
    change: Metric
    by: str
    """What the interval of the change rests on."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes no change."""
        low, high = self.change.low, self.change.high
        return low is not None and high is not None and not low <= 0 <= high

    @property
    def order(self) -> tuple[bool, bool, float]:
        """Clear changes first, those without an interval last; the larger for its uncertainty, or by size, earlier."""
        low, high = self.change.low, self.change.high
        if low is None or high is None:
            size = abs(self.change.value) / max(abs(self.old.value), abs(self.new.value))
            return self.by == OTHER_JUDGE, True, -size
        return not self.is_clear, False, -abs(self.change.value) / max(high - low, math.ulp(1.0))

    def record(self) -> dict[str, Any]:
        """As JSON."""
        named = {"stage": self.stage, "metric": self.metric, "by": self.by, "clear": self.is_clear}
        return named | {each: getattr(self, each).model_dump() for each in ("old", "new", "change")}


@dataclass(frozen=True)
class OneSided:
    """A figure that only one of two runs has of a stage that both published."""

    stage: str
    metric: str
    old: Metric | None
    new: Metric | None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        sides = {name: each.model_dump() if each else None for name, each in (("old", self.old), ("new", self.new))}
        return {"stage": self.stage, "metric": self.metric, **sides}


def one_sided(first: RunDirectory, second: RunDirectory) -> list[OneSided]:
    """Every figure that only one run has, of stages of both: measured there alone, or under another name.

    Raises:
        ArtifactError: A manifest cannot be read.
    """
    found = []
    for stage in _shared(first, second):
        old, new = (manifests.load(run.stage(stage)).metrics for run in (first, second))
        found += [OneSided(stage, name, old.get(name), new.get(name)) for name in sorted(old.keys() ^ new.keys())]
    return found


def changes(first: RunDirectory, second: RunDirectory) -> list[Change]:
    """Every figure of stages of both runs that is not the same in both, the largest clear changes first.

    Raises:
        ArtifactError: What an evaluation wrote down cannot be read.
    """
    shared = _shared(first, second)
    found = [change for stage in shared for change in _of_stage(stage, first.stage(stage), second.stage(stage))]
    return sorted(found, key=lambda change: (*change.order, change.stage, change.metric))


def _shared(first: RunDirectory, second: RunDirectory) -> list[str]:
    return sorted(set(first.published()) & set(second.published()))


def _of_stage(stage: str, first: Path, second: Path) -> Iterator[Change]:
    old, new = manifests.load(first), manifests.load(second)
    before, after = columns(first), columns(second)
    others = _other_judges(old, new)
    for name, was in old.metrics.items():
        now = new.metrics.get(name)
        if now is None or math.isclose(now.value, was.value, rel_tol=ROUNDING, abs_tol=ROUNDING):
            continue
        if _judges(name) & others:
            change, by = Metric(value=now.value - was.value), OTHER_JUDGE
        else:
            change, by = _change(was, now, before.get(name), after.get(name))
        yield Change(stage, name, was, now, change, by)


def _change(was: Metric, now: Metric, before: Column | None, after: Column | None) -> tuple[Metric, str]:
    if before and after and before.pairs_with(after):
        return _paired(before, after), PAIRED[after.of]
    if None in (was.low, was.high, now.low, now.high):
        return Metric(value=now.value - was.value), NO_INTERVAL
    return _independent(was, now), NOT_PAIRED[after.of] if before and after else INDEPENDENT


def _independent(before: Metric, after: Metric) -> Metric:
    """The difference of two figures with an interval from theirs, each of its sides from the sides that add to it."""
    assert before.low is not None
    assert before.high is not None
    assert after.low is not None
    assert after.high is not None
    value = after.value - before.value
    below = math.hypot(after.value - after.low, before.high - before.value)
    above = math.hypot(after.high - after.value, before.value - before.low)
    return Metric(value=value, low=value - below, high=value + above)


def _paired(old: Column, new: Column) -> Metric:
    """The change of a mean over the same observations."""
    keys = old.values.keys()
    before, after = ([column.values[key] for key in keys] for column in (old, new))
    if new.weights:
        weights = [new.weights[key] for key in keys]
        changes = [(b - a) * weight for a, b, weight in zip(before, after, weights, strict=True)]
        return ratio_interval(changes, weights)
    if {*before, *after} <= {0.0, 1.0}:
        return proportion_difference(after, before)
    return paired_difference(after, before)


def _judges(name: str) -> set[str]:
    """The judges whose scores or verdicts a figure is made of; a suite judges its own, by its name."""
    _, _, suite = name.partition(f".{SUITE}")
    if suite:
        return {f"{SUITE}{suite.removesuffix(GAIN).partition('.')[0].partition('_')[0]}"}
    before, _, last = name.removesuffix(GAIN).rpartition(".")
    if last == "frontier_gap":
        return {*SETTINGS}
    if f".{last}" == ACCURACY or f"{before}.".endswith(f"{ACCURACY}."):
        return {GOLD}
    is_by_judge = last in SETTINGS or f"{before}.".endswith((SCORE, WIN_RATE, LENGTH_CONTROLLED))
    return {last} if is_by_judge else set()


def _other_judges(old: Manifest, new: Manifest) -> set[str]:
    """Judges, and suites that score in another way, that are not the same in two evaluations."""
    before, after = (
        {GOLD: each.settings.get(GOLD)} | _alike(each.settings.get("judges", {})) | _scoring(each)
        for each in (old, new)
    )
    models = [each.inputs["reward"].digest if "reward" in each.inputs else "" for each in (old, new)]
    changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    return changed | ({"reward"} if models[0] != models[1] else set())


def _scoring(evaluation: Manifest) -> dict[str, Any]:
    """Suite -> the settings that say how it scores a row."""
    suites = {
        f"{SUITE}{role.removeprefix(SUITES)}": settings
        for role, settings in evaluation.data_settings.items()
        if role.startswith(SUITES)
    }
    scoring = {name: {each: settings.get(each) for each in SCORING} for name, settings in suites.items()}
    return {name: _alike(each) for name, each in scoring.items()}


def _alike(judges: dict[str, Any]) -> dict[str, Any]:
    """Judges by name, or settings of which rules are one, without what changes no verdict."""
    return {name: _verdicts_of(judge) for name, judge in judges.items()}


def _verdicts_of(judge: Any) -> Any:
    if isinstance(judge, list):
        return [_verdicts_of(rule) for rule in judge]
    if isinstance(judge, dict):
        return {name: value for name, value in judge.items() if name not in TRANSPORT}
    return judge
