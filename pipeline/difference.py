"""What two runs differ in, and what that did to each figure.

Of figures that both runs measured on the same prompts, one by one, the interval is that of the paired difference. Of
others it is made of the two intervals as if they were independent: Zou and Donner's (2008, doi 10.1002/sim.3095), which
for two proportions is Newcombe's. Where both runs measured on the same rows that is wider than it would have to be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline import manifest as manifests
from pipeline.errors import ArtifactError
from pipeline.figures import GAIN
from pipeline.manifest import Manifest, Metric
from pipeline.store import RunDirectory
from reward.intervals import paired_difference

PAIRED, INDEPENDENT, NO_INTERVAL = "paired by prompt", "independent intervals", "no interval"
ROUNDING = 1e-12
OTHER_JUDGE = "another reward model: not comparable"

Values = dict[str, float]
"""Prompt -> a figure of the response to it."""


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


def changes(first: RunDirectory, second: RunDirectory) -> list[Change]:
    """Every figure of stages of both runs that is not the same in both, the largest clear changes first.

    Raises:
        ArtifactError: The samples of an evaluation cannot be read.
    """
    shared = sorted(set(first.published()) & set(second.published()))
    found = [change for stage in shared for change in _of_stage(stage, first.stage(stage), second.stage(stage))]
    return sorted(found, key=lambda change: (*change.order, change.stage, change.metric))


def _of_stage(stage: str, first: Path, second: Path) -> Iterator[Change]:
    old, new = manifests.load(first), manifests.load(second)
    paired = _paired(first, second)
    for name, before in old.metrics.items():
        after = new.metrics.get(name)
        if after is None or math.isclose(after.value, before.value, rel_tol=ROUNDING, abs_tol=ROUNDING):
            continue
        yield Change(stage, name, before, after, *_change(name, before, after, paired, _same_judge(old, new)))


def _change(
    name: str, before: Metric, after: Metric, paired: Mapping[str, Metric], same_judge: bool
) -> tuple[Metric, str]:
    value = after.value - before.value
    if not same_judge and name.rpartition(".")[2] in ("reward", f"reward{GAIN}"):
        return Metric(value=value), OTHER_JUDGE
    if name in paired:
        return paired[name], PAIRED
    if None in (before.low, before.high, after.low, after.high):
        return Metric(value=value), NO_INTERVAL
    return _independent(before, after), INDEPENDENT


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


def _same_judge(old: Manifest, new: Manifest) -> bool:
    judges = [each.inputs["reward"].digest if "reward" in each.inputs else "" for each in (old, new)]
    return judges[0] == judges[1]


def _paired(first: Path, second: Path) -> dict[str, Metric]:
    """Metric -> its change over the prompts, where two evaluations have the same ones."""
    before, after = _by_prompt(first), _by_prompt(second)
    found = {}
    for name in before.keys() & after.keys():
        prompts = before[name].keys()
        if prompts == after[name].keys():
            old, new = ([side[name][prompt] for prompt in prompts] for side in (before, after))
            found[name] = paired_difference(new, old)
    return found


def _by_prompt(stage: Path) -> dict[str, Values]:
    """Metric -> its figure for each prompt, of those metrics of an evaluation that are means over prompts."""
    if not (stage / "samples.jsonl").is_file():
        return {}
    judge, parents = _evaluated(stage / "evaluation.json")
    found: dict[str, Values] = {}
    for prompt, sample in _samples(stage / "samples.jsonl"):
        for metric in ("gold", "reward"):
            scores = {name: score for name, score in sample.get(metric, {}).items() if score is not None}
            for name, value in _figures(metric, scores, parents, metric == judge):
                found.setdefault(name, {})[prompt] = value
    return {name: values for name, values in found.items() if _is_mean(name, values, stage)}


def _figures(
    metric: str, scores: Mapping[str, float], parents: Mapping[str, str | None], judges: bool
) -> Iterator[tuple[str, float]]:
    """What one prompt's scores say of each model, by itself and beside its parent's."""
    for name, score in scores.items():
        yield f"{name}.{metric}", score
        other = scores.get(parents.get(name) or "")
        if other is not None:
            yield f"{name}.{metric}{GAIN}", score - other
            if judges:
                yield f"{name}.win_rate", float(score > other) + 0.5 * float(score == other)


def _is_mean(name: str, values: Values, stage: Path) -> bool:
    """Whether the samples that were kept are those that the figure was made of."""
    metric = manifests.load(stage).metrics.get(name)
    return metric is not None and math.isclose(fmean(values.values()), metric.value, abs_tol=ROUNDING)


def _evaluated(path: Path) -> tuple[str, dict[str, str | None]]:
    """The score by which win rates are counted, and model -> parent."""
    try:
        content = json.loads(path.read_bytes())
        return str(content.get("judge")), {name: model.get("parent") for name, model in content["models"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _samples(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            sample = json.loads(line)
            yield json.dumps(sample["prompt"], sort_keys=True), sample
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(f"{path}:{number}", error) from error


def _damaged(place: Path | str, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"not what an evaluation writes: {error!r:.80}", where=place, hint="`baton verify RUN` names damaged files"
    )
