"""Programmatic rewards: judges that need no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data.world import gold_reward


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a response: its reward, and whether it is correct (1 or 0), both in [0, 1]."""

    reward: float
    correct: float


Rule = Callable[[Mapping[str, Any], str], Verdict]


def world(facts: Mapping[str, Any], response: str) -> Verdict:
    """The embedded world's gold reward."""
    gold = gold_reward(facts, response)
    return Verdict(gold.reward, gold.correct)


RULES: dict[str, Rule] = {"world": world}
"""By the name that the configuration uses."""
