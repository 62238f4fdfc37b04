"""A model against its parent: the same prompts, both answers, and what judges say of each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.schema import Prompt
from pipeline.figures import GAIN, RATIO
from pipeline.manifest import Metric
from reward.comparison import LOSS, TIE, WIN, AccuracyTest, accuracy_tests, outcomes, prompts_needed
from reward.intervals import mean_interval, paired_difference, proportion_difference, ratio_interval
from reward.length_control import length_controlled
from reward.pair_judge import Judgement, PairJudge
from stages.core.answers import Answers

Pair = tuple[Sequence[float], Sequence[float]]
"""The same prompts' figures of a model and of its parent."""


@dataclass(frozen=True)
class Comparison:
    """What a model gained over its parent.

    Attributes:
        metrics: Differences, ratios and win rates, with their intervals.
        won: Prompts on which the judge prefers the model.
        tied: Prompts on which it prefers neither, or the verdict changed with the order.
        lost: Prompts on which it prefers the parent.
        unread: Prompts on which the judge gave no verdict that could be read; they are in no win rate.
        changed: Of the ties, those whose verdict changed with the order.
        needed: Metric whose difference is not clear -> prompts that would show it, if it is as large as it seems.
        correct: Accuracy -> whether each prompt was answered correctly by the model and by its parent.
    """

    metrics: dict[str, Metric]
    won: int = 0
    tied: int = 0
    lost: int = 0
    unread: int = 0
    changed: int = 0
    needed: dict[str, int] = field(default_factory=dict)
    correct: dict[str, Pair] = field(default_factory=dict)

    @property
    def asked(self) -> int:
        """Prompts on which the judge was asked."""
        return self.won + self.tied + self.lost + self.unread

    def as_json(self, tests: Mapping[str, AccuracyTest]) -> dict[str, Any]:
        """What the report needs beside the metrics."""
        counts = {name: getattr(self, name) for name in ("won", "tied", "lost", "unread", "changed")}
        return {**counts, "needed": self.needed, "tests": {name: vars(test) for name, test in tests.items()}}


def compare(own: Answers, parent: Answers, prompts: Sequence[Prompt], judge: PairJudge | None) -> Comparison:
    """Compare answers to the same prompts.

    Args:
        own: The model's.
        parent: Its parent's, in the same order.
        prompts: What was answered.
        judge: Decides which of two answers is better; without one, the gold reward does, or else the reward.

    Raises:
        ServerError: The judge is out of reach or breaks the protocol.
    """
    correct = _paired(own.accuracies(prompts), parent.accuracies(prompts))
    # One prompt of a task has a test, of which nothing comes, and no interval.
    several = {name: pair for name, pair in correct.items() if len(pair[0]) > 1}
    scores = _paired(own.scores, parent.scores)
    metrics = {f"{name}{GAIN}": paired_difference(*pair) for name, pair in scores.items()}
    metrics |= {f"{name}{GAIN}": proportion_difference(*pair) for name, pair in several.items()}
    needed = {name: _needed(*pair, metrics[f"{name}{GAIN}"]) for name, pair in (scores | several).items()}
    metrics[f"length{RATIO}"] = ratio_interval(own.lengths, parent.lengths)
    judgement = _judged(own, parent, prompts, judge)
    decided = [outcome for outcome in judgement.outcomes if outcome is not None]
    return Comparison(
        metrics=metrics | _win_rates(own, parent, judgement),
        won=decided.count(WIN),
        tied=decided.count(TIE),
        lost=decided.count(LOSS),
        unread=len(judgement.outcomes) - len(decided),
        changed=judgement.changed,
        needed={name: count for name, count in needed.items() if count is not None},
        correct=correct,
    )


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


def _judged(own: Answers, parent: Answers, prompts: Sequence[Prompt], judge: PairJudge | None) -> Judgement:
    if judge:
        return judge.compare(prompts, own.texts, parent.texts)
    found: list[float | None] = [*outcomes(own.judged, parent.judged)]
    return Judgement(found, changed=0)


def _win_rates(own: Answers, parent: Answers, judgement: Judgement) -> dict[str, Metric]:
    """Of the prompts that were decided: the share won (a tie is half a win), and the same at equal lengths."""
    if not judgement.outcomes:
        return {}
    decided = [
        (outcome, float(len(mine) - len(other)))
        for outcome, mine, other in zip(judgement.outcomes, own.texts, parent.texts, strict=True)
        if outcome is not None
    ]
    if not decided:
        return {}
    won, longer_by = zip(*decided, strict=True)
    return {"win_rate": mean_interval(won), "win_rate_length_controlled": length_controlled(won, longer_by)}


def _paired(own: Mapping[str, list[float]], parent: Mapping[str, list[float]]) -> dict[str, Pair]:
    return {name: (own[name], parent[name]) for name in own}


def _needed(own: Sequence[float], parent: Sequence[float], gain: Metric) -> int | None:
    """Prompts that would show a gain; None where it is clear already, or nothing can be said.

    Where there are so many already, they were not enough: with few prompts the normal approximation is no guide.
    """
    if gain.low is None or gain.high is None or not gain.low <= 0 <= gain.high:
        return None
    count = prompts_needed([a - b for a, b in zip(own, parent, strict=True)], gain.value)
    return count if count and count > len(own) else None
