"""The first sentence of a report: which stage is best, by how much, and whether that is more than noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.figures import GAIN, SETTINGS, WIN_RATE
from pipeline.manifest import Metric
from pipeline.report.forest import direction
from pipeline.report.inputs import ModelEvaluation
from pipeline.report.wording import label, number, significance, with_interval

State = Literal["better", "unclear", "worse", "start is best", "no gain measured", "not evaluated"]
NOT_EVALUATED: State = "not evaluated"
_BY_SIDE: dict[str, tuple[State, str]] = {
    "up": ("better", "better than"),
    "down": ("worse", "worse than"),
    "level": ("unclear", "not clearly different from"),
}
_CAUTION = (
    "The judge is the learned reward model, which training may have learned to please:"
    " read the samples before you trust it."
)


@dataclass(frozen=True)
class Verdict:
    """The finding and the figures it rests on."""

    state: State
    sentence: str
    stage: str | None = None
    parent: str | None = None
    metric: str | None = None
    gain: Metric | None = None
    caution: str = ""
    """What to hold against the finding."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        gain = self.gain.model_dump() if self.gain else None
        return {
            "state": self.state,
            "sentence": self.sentence,
            "stage": self.stage,
            "parent": self.parent,
            "metric": self.metric,
            "gain": gain,
            "caution": self.caution,
        }


def judge(models: Mapping[str, ModelEvaluation]) -> Verdict:
    """Compare the best model, by gold reward where there is one, else by learned reward, else by the win rate that the
    first of other judges gives, with its parent.

    Args:
        models: Evaluated models by name.
    """
    metric = next((each for each in SETTINGS if any(each in model.metrics for model in models.values())), None)
    if metric is None and (found := _by_win_rate(models)):
        return found
    if metric is None:
        sentence = "Not evaluated: no judge compared a stage with its parent, so none can be called better."
        return Verdict(NOT_EVALUATED, sentence)
    scored = {name: model.metrics[metric].value for name, model in models.items() if metric in model.metrics}
    best = max(scored, key=lambda name: (scored[name], name))
    found = _against_parent(best, models, metric)
    return found if metric == "gold" else replace(found, caution=_CAUTION)


def _by_win_rate(models: Mapping[str, ModelEvaluation]) -> Verdict | None:
    """What the first of other judges says: of the models that nothing was trained from, the one that wins most."""
    parents = {model.parent for model in models.values()}
    rated = [each for model in models.values() for each in model.metrics if each.startswith(WIN_RATE)]
    if not rated:
        return None
    metric = rated[0]
    last = {name: model for name, model in models.items() if metric in model.metrics and name not in parents}
    if not last:
        return None
    best = max(last, key=lambda name: (last[name].metrics[metric].value, name))
    rate, parent = last[best].metrics[metric], last[best].parent
    test = last[best].test(metric)
    # As in the table of wins: among many judges one interval excludes a half by chance.
    side = direction(rate.low, rate.high, neutral=0.5) if test is None or test.clear else "level"
    state, words = _BY_SIDE[side]
    wins = f"it wins {with_interval(metric, rate)} of the comparisons" + (f", {significance(test)}" if test else "")
    judge = metric.removeprefix(WIN_RATE)
    sentence = f"By {judge}, {best} is {words} its parent {parent}: {wins}."
    unjudged = [name for name, model in models.items() if model.parent and metric not in model.metrics]
    caution = f"{judge} has no verdict of {', '.join(unjudged)}." if unjudged else ""
    return Verdict(state, sentence, best, parent, metric, caution=caution)


def _against_parent(best: str, models: Mapping[str, ModelEvaluation], metric: str) -> Verdict:
    model = models[best]
    level = f"{label(metric)} {with_interval(metric, model.metrics[metric])}"
    if model.parent is None and any(each.parent == best for each in models.values()):
        sentence = f"No stage improves on {best}, where it started: {level}."
        return Verdict("start is best", sentence, best, None, metric)
    gain = model.metrics.get(f"{metric}{GAIN}")
    if model.parent is None or gain is None:
        sentence = f"{best} scores highest, {level}, but it was not compared with a parent."
        return Verdict("no gain measured", sentence, best, model.parent, metric)
    state, sentence = _weigh(best, model.parent, level, metric, gain)
    needed = model.comparison.needed.get(metric) if model.comparison else None
    if state == "unclear" and needed:
        sentence += f" If the change is as large as that, {needed:,} prompts would show it in four of five evaluations."
    return Verdict(state, sentence, best, model.parent, metric, gain)


def _weigh(best: str, parent: str, level: str, metric: str, gain: Metric) -> tuple[State, str]:
    change = with_interval(metric, gain, signed=True) + (f" over {gain.n:,} prompts" if gain.n else "")
    highest = f"{best} scores highest, {level}"
    if gain.low is None or gain.high is None:
        return "unclear", f"{highest}, but its change against its parent {parent}, {change}, has no interval."
    if gain.low > 0:
        return "better", f"{best} is best and better than its parent {parent}: {label(metric)} {change}."
    if gain.high < 0:
        return "worse", f"{highest}, yet on the same prompts it is worse than its parent {parent}: {change}."
    doubt = f"{best} scores highest, but not clearly above its parent {parent}"
    return "unclear", f"{doubt}: {label(metric)} {change}, an interval that includes 0."


def over_optimised(model: ModelEvaluation) -> str | None:
    """The warning when the learned reward rose and the gold reward did not (Gao et al. 2022, 2210.10760)."""
    learned, gold = model.metrics.get(f"reward{GAIN}"), model.metrics.get(f"gold{GAIN}")
    if learned is None or gold is None or learned.low is None or learned.low <= 0:
        return None
    if gold.low is None or gold.low > 0:
        return None
    rise = number("reward", learned.value, signed=True)
    change = with_interval("gold", gold, signed=True)
    return f"over-optimised: learned reward {rise} against {model.parent}, but gold reward {change}"
