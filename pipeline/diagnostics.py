"""The diagnostics of a round of sampling and learning: what each is, and what is healthy; most telling first.

Stages measure them (`stages/core/rl/health.py`), docs/ppo.md says what to do about them, and both the progress line and
the report show them in this order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["below", "above", "within", "not finite"]
SIGN_OF_A_ROUND = "rollout_gap"
"""A figure that records of every round have, and those of other stages have not."""


@dataclass(frozen=True)
class Diagnostic:
    """One figure of a round.

    Attributes:
        name: In `metrics.jsonl`.
        meaning: What is measured, with its unit.
        healthy: In words.
        low, high: Bounds that a healthy value lies between; both infinite where the words mean no range.
        of_start: Whether the bounds are in multiples of what the figure was at first.
    """

    name: str
    meaning: str
    healthy: str
    low: float = -math.inf
    high: float = math.inf
    of_start: bool = False

    def side(self, value: float, start: float) -> Side | None:
        """Where a value lies, seen from the healthy range; None without a range.

        Args:
            value: The figure at last.
            start: What it was at first.
        """
        if not math.isfinite(value):
            return "not finite"
        if self.low == -math.inf and self.high == math.inf:
            return None
        unit = start if self.of_start else 1.0
        if value <= self.low * unit:
            return "below"
        return "above" if value >= self.high * unit else "within"


DIAGNOSTICS = (
    Diagnostic("reward", "mean of what responses are worth, by reward model and rules", "rises"),
    # Its estimate may be a little below 0.
    Diagnostic("kl", "divergence from the reference", "up slowly from 0, below 10 nats a response", -0.5, 10.0),
    Diagnostic(
        "entropy",
        "of the sampling distribution, nats a token",
        "falls slowly, above half of its start",
        0.5,
        of_start=True,
    ),
    Diagnostic(
        "explained_variance", "share of the returns' variance that values explain", "above 0.2 after a while", low=0.2
    ),
    Diagnostic("ended", "share of responses that end their turn", "above 0.9", low=0.9),
    Diagnostic("length", "mean tokens of a response", "within a third of its start", 2 / 3, 4 / 3, of_start=True),
    Diagnostic("held_out", "mean score on held-out prompts", "both held-out figures rise"),
    Diagnostic("held_out_reward", "mean of what responses to held-out prompts are worth", "both held-out figures rise"),
    Diagnostic("reward_deviation", "standard deviation of rewards over responses", "above 0", low=1e-6),
    # By the end of a training, the learning rate has mostly decayed to where nothing moves: low is no fault there.
    Diagnostic(
        "approximate_kl",
        "how far a round moved the policy (k3), in one batch",
        "1e-4 to 0.02 nats a token, less as the rate decays",
        high=0.02,
    ),
    Diagnostic(
        "clip_fraction",
        "share of tokens whose ratio is beyond the clip after a round, in one batch",
        "0.01 to 0.3, less as the rate decays",
        high=0.3,
    ),
    Diagnostic(
        "ratio_max", "largest ratio of a token in an update, or after the last in one batch", "below 3", high=3.0
    ),
    Diagnostic("ratio_first", "mean probability ratio in the first update", "1", 0.99, 1.01),
    Diagnostic("rollout_gap", "distance of sampling from training", "below 0.02 nats a token", high=0.02),
    Diagnostic("value_clip_fraction", "share of tokens whose value is beyond the clip", "below 0.2", high=0.2),
    Diagnostic("advantage_mean", "mean advantage of a token, before whitening", "near 0"),
    Diagnostic("advantage_deviation", "standard deviation of advantages, before whitening", "above 0", low=1e-6),
    Diagnostic("no_advantage", "share of prompts whose responses all have the same score", "below a half", high=0.5),
    Diagnostic(
        "length_p95",
        "95th percentile of the responses' tokens",
        "within a third of its start",
        2 / 3,
        4 / 3,
        of_start=True,
    ),
    Diagnostic("length_reward_correlation", "Pearson's, over responses", "below 0.5", high=0.5),
    Diagnostic(
        "distinct_2",
        "distinct pairs of neighbouring tokens over all pairs",
        "above half of its start",
        0.5,
        of_start=True,
    ),
    Diagnostic("gradient_norm", "of the policy, before clipping", "steady"),
    Diagnostic("value_gradient_norm", "of the value function, before clipping", "steady"),
)


def is_round(record: Mapping[str, Any]) -> bool:
    """Whether a record of `metrics.jsonl` is that of a round of sampling and learning."""
    return SIGN_OF_A_ROUND in record
