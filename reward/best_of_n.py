"""Best-of-n sampling: what the response with the highest score among n is worth, and how far it is from sampling one.

It needs no training, so what it reaches at a divergence is what a trained policy has to reach at the same divergence
(Gao et al. 2022, arXiv 2210.10760).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, log

import numpy as np
from numpy.typing import NDArray

from pipeline.manifest import Metric
from reward.intervals import Values, function_of_means

Array = NDArray[np.float64]


def divergence(n: int) -> float:
    """ln n - (n - 1) / n: nats by which best-of-n diverges from sampling one response, at most (Beirami et al. 2024,
    arXiv 2401.01879). The bound is close where no single response is likely."""
    return log(n) - (n - 1) / n


def expected_best(scores: Array, worth: Array, n: int) -> Array:
    """Expected worth of the response with the highest score among n that are drawn without replacement from a
    prompt's N: [prompts]. Ties share evenly. Unbiased for n fresh samples, and of less variance than one draw of n.

    Args:
        scores: [prompts, N] what is chosen by.
        worth: [prompts, N] what the chosen one is judged by.
        n: From 1 to N.

    Raises:
        ValueError: `n` is not within 1 to N.
    """
    count = scores.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"the best of {n} cannot be told from {count} responses")
    within = np.array([1 - comb(count - first, n) / comb(count, n) for first in range(count + 1)])
    return np.array([_chances(own, within) @ each for own, each in zip(scores, worth, strict=True)])


def counts(most: int) -> tuple[int, ...]:
    """1, 2, 4 and so on up to `most`, which is always the last."""
    return (*(2**power for power in range((most - 1).bit_length())), most)


@dataclass(frozen=True)
class Frontier:
    """What choosing the best of n by reward brings, prompt by prompt, for several n.

    Attributes:
        counts: [points] the n, rising from 1.
        rewards: [points, prompts] the chosen response's expected reward.
        gold: [points, prompts] its expected gold reward; None where there is no gold reward.
    """

    counts: tuple[int, ...]
    rewards: Array
    gold: Array | None

    @classmethod
    def of(cls, rewards: Array, gold: Array | None) -> Frontier:
        """From the rewards, and the gold rewards where there are any, of N responses to each prompt: [prompts, N]."""
        chosen = counts(rewards.shape[1])
        by_reward = np.stack([expected_best(rewards, rewards, n) for n in chosen])
        by_gold = None if gold is None else np.stack([expected_best(rewards, gold, n) for n in chosen])
        return cls(chosen, by_reward, by_gold)

    @property
    def divergences(self) -> Array:
        """[points] nats a response."""
        return np.array([divergence(n) for n in self.counts])

    def gap(self, worth: Values, log_ratios: Values) -> Metric:
        """How much more a policy is worth than best-of-n at the same divergence, with its interval over prompts.

        Between two n the worth is linear in the square root of the divergence; beyond the last n it stays that of the
        last, so that the gap of a policy further away says more for the policy than it should. Prompts are resampled
        with all their figures, so the interval knows that the policy's divergence is an estimate, too.

        Args:
            worth: [prompts] of the policy's responses: their gold reward, or the reward where there is no gold.
            log_ratios: [prompts] log pi - log pi_ref of the same responses.
        """

        def difference(own: Array, divergences: Array, *means: Array) -> Array:
            return own - _between(self.divergences, np.stack(means), divergences)

        return function_of_means(difference, worth, log_ratios, *(self.rewards if self.gold is None else self.gold))


def _chances(scores: Array, within: Array) -> Array:
    """Chance of each of a prompt's responses to be the chosen one: [N], from that of the best to be within a rank."""
    ordered = np.sort(scores)
    above = len(scores) - np.searchsorted(ordered, scores, side="right")
    reached = len(scores) - np.searchsorted(ordered, scores, side="left")
    return np.asarray((within[reached] - within[above]) / (reached - above))


def _between(divergences: Array, means: Array, wanted: Array) -> Array:
    """Means [points, k] of rising divergences [points], linearly interpolated in their square root at `wanted` [k]."""
    places = np.sqrt(divergences)
    sought = np.sqrt(np.clip(wanted, 0, divergences[-1]))
    after = np.clip(np.searchsorted(places, sought), 1, len(places) - 1)
    share = (sought - places[after - 1]) / (places[after] - places[after - 1])
    column = np.arange(len(sought))
    return np.asarray((1 - share) * means[after - 1, column] + share * means[after, column])
