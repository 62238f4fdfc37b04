"""What the heads of an ensemble disagree on, and whether that tells wrong rankings from right ones.

An ensemble on one adapter sees less of its own ignorance than models that were trained apart (Eisenstein et al. 2023,
arXiv 2312.09244), so how much its disagreement is worth is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.manifest import Metric
from reward.intervals import CONFIDENCE, RESAMPLES, mean_interval


@dataclass(frozen=True)
class Ranking:
    """What an ensemble says of one prompt's responses.

    Attributes:
        scores: [k, heads] of the responses, best first.
    """

    scores: NDArray[np.float64]

    @property
    def wrong(self) -> bool:
        """Whether another response than the best has the highest mean score, or the same."""
        means = self.scores.mean(1)
        return bool(means[0] <= means[1:].max())

    @property
    def disagreement(self) -> float:
        """Standard deviation of the heads' scores, mean over the responses."""
        return float(self.scores.std(1, ddof=1).mean())

    @property
    def margin_disagreement(self) -> float:
        """Standard deviation over the heads of the margin of the best response to its strongest rival."""
        rival = 1 + int(self.scores.mean(1)[1:].argmax())
        return float((self.scores[0] - self.scores[rival]).std(ddof=1))


def metrics(rankings: Sequence[Ranking]) -> dict[str, Metric]:
    """`disagreement` on responses, and `disagreement_gap`: that on margins of wrong rankings less that of right ones.

    The gap is above zero where disagreement warns of errors; without a wrong ranking or a right one there is none.
    """
    found = {"disagreement": mean_interval([each.disagreement for each in rankings])}
    wrong = np.array([each.margin_disagreement for each in rankings if each.wrong])
    right = np.array([each.margin_disagreement for each in rankings if not each.wrong])
    if len(wrong) and len(right):
        found["disagreement_gap"] = _difference(wrong, right)
    return found


def _difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> Metric:
    """Difference of two groups' means with its percentile-bootstrap interval; each group is resampled by itself."""
    generator = np.random.default_rng(0)
    draws = [
        generator.choice(first, len(first)).mean() - generator.choice(second, len(second)).mean()
        for _ in range(RESAMPLES)
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    value = float(first.mean() - second.mean())
    return Metric(value=value, low=float(low), high=float(high), n=len(first) + len(second))
