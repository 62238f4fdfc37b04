"""Whether a reward model is as sure as it is right: its confidence in a pair is sigmoid of the score difference
(Bradley and Terry 1952), compared with how often the better response wins (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.manifest import Metric
from reward.intervals import Values, function_of_means

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Pairs of which the model is about equally sure.

    Attributes:
        confidence: Mean chance that it gives its favourite, from 0.5 to 1.
        accuracy: How often its favourite is the better response.
        n: Pairs.
    """

    confidence: float
    accuracy: float
    n: int


def curve(margins: Values) -> list[Bin]:
    """Confidence and accuracy in bins of equal width; those without a pair are left out.

    Args:
        margins: [pairs] score of the better response minus that of the other.
    """
    confidence, right, place = _binned(margins)
    found = ((confidence[place == each], right[place == each]) for each in range(BINS))
    return [Bin(float(sure.mean()), float(true.mean()), len(sure)) for sure, true in found if len(sure)]


def expected_error(margins: Values) -> Metric:
    """Expected calibration error: mean distance of accuracy from confidence over the bins of `curve`, weighted by their
    pairs, with its interval. It is never negative, so that few pairs make it too large.

    Args:
        margins: As for `curve`.
    """
    confidence, right, place = _binned(margins)
    columns = [(right - confidence) * (place == each) for each in range(BINS)]
    return function_of_means(lambda *means: np.sum(np.abs(means), axis=0), *columns)


def _binned(margins: Values) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """Of each pair: the model's confidence, whether it is right (half for a tie), and the bin."""
    observed = np.asarray(margins, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.minimum(np.abs(observed), 700.0)))
    right = (np.sign(observed) + 1) / 2
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(np.intp), BINS - 1)
    return confidence, right, place
