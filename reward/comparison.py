"""Two models on the same prompts: wins, ties and losses, tests of accuracies, and how many prompts would tell.

The interval of a mean difference is `reward.intervals.paired_difference`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import NormalDist
from typing import TypeVar

import numpy as np

from reward.intervals import CONFIDENCE, Values, finite

WIN, TIE, LOSS = 1.0, 0.5, 0.0
"""What a comparison of two responses is worth to the first; the mean is the win rate."""
POWER = 0.8
"""Chance of a clear result that `prompts_needed` plans for."""

Name = TypeVar("Name", bound=Hashable)


def outcomes(own: Sequence[float], other: Sequence[float]) -> list[float]:
    """Each prompt's comparison by scores: [prompts] of `WIN`, `TIE` or `LOSS`; equal scores are a tie."""
    return [WIN if a > b else TIE if a == b else LOSS for a, b in zip(own, other, strict=True)]


@dataclass(frozen=True)
class Judgement:
    """What a judge says of two models' responses to the same prompts.

    A judge that gives scores reads one response at a time: none is first, so there is no other order to ask it in, and
    no verdict that could change with it.

    Attributes:
        outcomes: [prompts] of `WIN`, `TIE` or `LOSS` of the first model; None where an answer held no verdict.
        changed: Pairs whose verdict changed with the order in which a judge read them; None for one that gives scores.
    """

    outcomes: Sequence[float | None]
    changed: int | None = None

    @property
    def decided(self) -> list[float]:
        """The outcomes that there are."""
        return [outcome for outcome in self.outcomes if outcome is not None]

    @property
    def won(self) -> int:
        """Prompts on which the judge prefers the first model."""
        return self.outcomes.count(WIN)

    @property
    def tied(self) -> int:
        """Prompts on which it prefers neither, or changed its verdict with the order."""
        return self.outcomes.count(TIE)

    @property
    def lost(self) -> int:
        """Prompts on which it prefers the other model."""
        return self.outcomes.count(LOSS)

    @property
    def unread(self) -> int:
        """Prompts on which it gave no verdict that could be read."""
        return self.outcomes.count(None)


@dataclass(frozen=True)
class AccuracyTest:
    """Whether two models differ in how often they are correct, or in how often a judge prefers them.

    Attributes:
        gained: Prompts on which the first is correct and the second is not, or the first is preferred.
        lost: The reverse.
        p: McNemar's exact p-value, two-sided.
        adjusted: The same after Holm's correction for all accuracies that are tested together.
    """

    gained: int
    lost: int
    p: float
    adjusted: float


def accuracy_tests(compared: Mapping[Name, tuple[Sequence[float], Sequence[float]]]) -> dict[Name, AccuracyTest]:
    """Test several accuracies, and correct for their number.

    Args:
        compared: By name, 1 for each prompt that the first model answers correctly and that the second does, any other
            number for the rest; both in the same order.
    """
    discordant = {name: _discordant(own, other) for name, (own, other) in compared.items()}
    found = {name: mcnemar(*counts) for name, counts in discordant.items()}
    adjusted = dict(zip(found, holm(list(found.values())), strict=True))
    return {name: AccuracyTest(*discordant[name], found[name], adjusted[name]) for name in found}


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value that two models are equally often correct (McNemar 1947, doi 10.1007/BF02295996).

    Prompts that both or neither answer correctly say nothing; of the others, under the hypothesis, each model has half.

    Args:
        gained: Prompts that only the first answers correctly.
        lost: Prompts that only the second answers correctly.
    """
    count = gained + lost
    tail = ways = 1
    for fewer in range(min(gained, lost)):
        ways = ways * (count - fewer) // (fewer + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**count)


def holm(values: Sequence[float]) -> list[float]:
    """p-values that bound the chance of any false finding among all of them (Holm 1979, JSTOR 4615733).

    Nothing is asked of how the tests depend on each other.

    Args:
        values: One p-value for each test.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted = [0.0] * len(values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


def prompts_needed(differences: Values, resolution: float) -> int | None:
    """How many prompts would show a mean difference of this size, from how much the paired differences vary.

    With so many prompts, if the true mean is `resolution`, the 95% interval excludes 0 in 80 of 100 evaluations. By the
    normal approximation; None where it says nothing: with a single prompt, differences that are all equal, or a
    resolution of 0.

    Args:
        differences: [prompts] of a comparison that was made.
        resolution: The difference to be seen; its sign does not matter.
    """
    observed = finite(differences, "differences")
    if observed.size < 2 or resolution == 0:
        return None
    deviation = float(observed.std(ddof=1))
    normal = NormalDist()
    reach = normal.inv_cdf((1 + CONFIDENCE) / 2) + normal.inv_cdf(POWER)
    return ceil((reach * deviation / resolution) ** 2) or None


def _discordant(own: Sequence[float], other: Sequence[float]) -> tuple[int, int]:
    first, second = np.asarray(own) == 1.0, np.asarray(other) == 1.0
    if first.shape != second.shape:
        raise ValueError(f"{first.size} and {second.size} observations: they are not paired")
    return int((first & ~second).sum()), int((second & ~first).sum())
