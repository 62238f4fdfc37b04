"""A model against its parent: the same prompts, both answers, and what judges say of each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.schema import Prompt
from pipeline.figures import GAIN, LENGTH_CONTROLLED, RATIO, SCORE, SETTINGS, WIN_RATE
from pipeline.manifest import Metric
from reward.comparison import (
    LOSS,
    TIE,
    WIN,
    AccuracyTest,
    Judgement,
    accuracy_tests,
    outcomes,
    prompts_needed,
)
from reward.intervals import paired_difference, proportion_difference, ratio_interval
from reward.length_control import length_controlled
from stages.core.answers import Answers

Pair = tuple[Sequence[float], Sequence[float]]
"""The same prompts' figures of a model and of its parent."""


@dataclass(frozen=True)
class Comparison:
    """What a model gained over its parent.

    Attributes:
        metrics: Differences, ratios and win rates, with their intervals.
        judgements: By judge.
        needed: Metric whose difference is not clear -> prompts that would show it, if it is as large as it seems.
        correct: Accuracy -> whether each prompt was answered correctly by the model and by its parent.
    """

    metrics: dict[str, Metric]
    judgements: dict[str, Judgement] = field(default_factory=dict)
    needed: dict[str, int] = field(default_factory=dict)
    correct: dict[str, Pair] = field(default_factory=dict)

    @property
    def tested(self) -> dict[str, Pair]:
        """What McNemar's test takes: the accuracies, and of each win rate where the model wins and where its parent."""
        wins: dict[str, Pair] = {
            f"{WIN_RATE}{judge}": ([float(each == WIN) for each in decided], [float(each == LOSS) for each in decided])
            for judge, found in self.judgements.items()
            if (decided := found.decided)
        }
        return self.correct | wins

    def as_json(self, tests: Mapping[str, AccuracyTest]) -> dict[str, Any]:
        """What the report needs beside the metrics."""
        return {
            "judges": {judge: _counts(found) for judge, found in self.judgements.items()},
            "needed": self.needed,
            "tests": {name: vars(test) for name, test in tests.items()},
        }


def compare(own: Answers, parent: Answers, prompts: Sequence[Prompt], of_pairs: Mapping[str, Judgement]) -> Comparison:
    """Compare answers to the same prompts.

    Args:
        own: The model's.
        parent: Its parent's, in the same order.
        prompts: What was answered.
        of_pairs: By judge, what those say that were shown both answers, beside those that gave each a score.
    """
    correct = _paired(own.accuracies(prompts), parent.accuracies(prompts))
    # One prompt of a task has a test, of which nothing comes, and no interval.
    several = {name: pair for name, pair in correct.items() if len(pair[0]) > 1}
    scores = _paired(own.scores, parent.scores)
    metrics = {f"{name}{GAIN}": _gain(*pair) for name, pair in scores.items()}
    metrics |= {f"{name}{GAIN}": proportion_difference(*pair) for name, pair in several.items()}
    needed = {name: _needed(_differences(*pair), metrics[f"{name}{GAIN}"]) for name, pair in (scores | several).items()}
    metrics[f"length{RATIO}"] = ratio_interval(own.lengths, parent.lengths)
    judgements = {name.removeprefix(SCORE): Judgement(outcomes(*pair)) for name, pair in scores.items()}
    judgements = dict(sorted({**judgements, **of_pairs}.items(), key=_rank))
    for judge, found in judgements.items():
        if found.decided:
            metrics |= _win_rates(judge, found, own, parent)
            needed[f"{WIN_RATE}{judge}"] = _needed_to_win(found, metrics[f"{WIN_RATE}{judge}"])
    return Comparison(
        metrics=metrics,
        judgements=judgements,
        needed={name: count for name, count in needed.items() if count is not None},
        correct=correct,
    )


def _gain(own: Sequence[float], parent: Sequence[float]) -> Metric:
    """The mean difference of scores; of yes and no as of accuracies, whose interval is wide for a few equal pairs."""
    yes_or_no = len(own) > 1 and {*own, *parent} <= {0.0, 1.0}
    return proportion_difference(own, parent) if yes_or_no else paired_difference(own, parent)


def corrected_tests(compared: Mapping[str, Mapping[str, Pair]]) -> dict[str, dict[str, AccuracyTest]]:
    """McNemar's test of every accuracy of every model against its parent's, corrected for all of them together.

    Args:
        compared: Model -> accuracy, or suite of yes and no -> whether each prompt was answered correctly by the model
            and by its parent.
    """
    pairs = {(model, name): pair for model, each in compared.items() for name, pair in each.items()}
    found: dict[str, dict[str, AccuracyTest]] = {model: {} for model in compared}
    for (model, name), test in accuracy_tests(pairs).items():
        found[model][name] = test
    return found


def _rank(judge: tuple[str, Judgement]) -> tuple[bool, bool]:
    """The gold rule and the reward model come first, and judges of whole responses before the user's rules."""
    name, found = judge
    return name not in SETTINGS, found.changed is None


def _counts(found: Judgement) -> dict[str, int]:
    """How often a judge preferred which model; only one that is asked in both orders can change its mind, or say
    nothing that can be read."""
    counts = {"won": found.won, "tied": found.tied, "lost": found.lost}
    return counts if found.changed is None else counts | {"unread": found.unread, "changed": found.changed}


def _win_rates(judge: str, found: Judgement, own: Answers, parent: Answers) -> dict[str, Metric]:
    """Of the prompts that were decided: the share won (a tie is half a win), and the same at equal lengths."""
    longer_by = [
        float(len(mine) - len(other))
        for outcome, mine, other in zip(found.outcomes, own.texts, parent.texts, strict=True)
        if outcome is not None
    ]
    return {
        f"{WIN_RATE}{judge}": _win_rate(found.decided),
        f"{LENGTH_CONTROLLED}{judge}": length_controlled(found.decided, longer_by),
    }


def _win_rate(decided: Sequence[float]) -> Metric:
    """A half and half of how much more often the model wins than its parent; so the interval, like that of accuracies,
    keeps a width where all prompts agree."""
    more = proportion_difference([float(each == WIN) for each in decided], [float(each == LOSS) for each in decided])
    low, high = (None if bound is None or len(decided) < 2 else TIE + bound / 2 for bound in (more.low, more.high))
    return more.model_copy(update={"value": TIE + more.value / 2, "low": low, "high": high})


def _paired(own: Mapping[str, list[float]], parent: Mapping[str, list[float]]) -> dict[str, Pair]:
    return {name: (own[name], parent[name]) for name in own}


def _differences(own: Sequence[float], parent: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(own, parent, strict=True)]


def _needed_to_win(found: Judgement, rate: Metric) -> int | None:
    """Prompts that would show that one model is preferred; a tie says nothing for either."""
    if rate.low is None or rate.high is None:
        return None
    above = Metric(value=rate.value - TIE, low=rate.low - TIE, high=rate.high - TIE)
    return _needed([outcome - TIE for outcome in found.decided], above)


def _needed(differences: Sequence[float], gain: Metric) -> int | None:
    """Prompts that would show a gain; None where it is clear already, or nothing can be said.

    Where there are so many already, they were not enough: with few prompts the normal approximation is no guide.
    """
    if gain.low is None or gain.high is None or not gain.low <= 0 <= gain.high:
        return None
    count = prompts_needed(differences, gain.value)
    return count if count and count > len(differences) else None
