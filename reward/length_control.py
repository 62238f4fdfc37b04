"""How often a model would win if its responses were as long as the other's.

Judges like long responses, so a win rate may be a matter of length. As in AlpacaEval 2 (Dubois et al. 2024, arXiv
2404.04475), the outcome of a comparison is explained by a logistic regression on the difference in length, and the win
rate is read off where that is zero. Left out of theirs: the term for how hard each prompt is, which is fitted to many
models at once, and with it the prompt's own share in the win rate; the regularisation chosen by cross-validation.
Added: an interval.

Where wins and lengths are perfectly separated, no finite regression fits best. So two pseudo-observations are added,
a tie at either extreme of length, which together weigh as much as one prompt.
"""

from __future__ import annotations

from math import exp, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pipeline.manifest import Metric
from reward.intervals import CONFIDENCE, Values, finite

Array = NDArray[np.float64]

PSEUDO_WEIGHT = 0.5
"""Of each of the two pseudo-observations."""
_ITERATIONS = 100
_TOLERANCE = 1e-10


def length_controlled(outcomes: Values, longer_by: Values) -> Metric:
    """The win rate at equal lengths, with its interval.

    The interval is that of the regression's intercept, on the logit scale, by the sandwich estimator (White 1982, doi
    10.2307/1912526), which allows for ties.

    Args:
        outcomes: [prompts] 1 for a win, 0.5 for a tie, 0 for a loss.
        longer_by: [prompts] by how much the model's response is longer than the other's, in any unit.

    Raises:
        ValueError: When the lengths differ, there are no prompts, or a number is not finite.
    """
    won, differences = finite(outcomes, "outcomes"), finite(longer_by, "longer_by")
    if won.size != differences.size:
        raise ValueError(f"{won.size} outcomes and {differences.size} differences: they are not paired")
    design, answers, weights = _observations(won, differences)
    coefficients = _fit(design, answers, weights)
    intercept = float(coefficients[0])
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * sqrt(_variance(design, answers, weights, coefficients))
    bounds = (intercept - reach, intercept + reach)
    if won.size == 1:
        return Metric(value=_share(intercept), n=1)
    low, high = map(_share, bounds)
    return Metric(value=_share(intercept), low=low, high=high, n=int(won.size))


def _observations(won: Array, differences: Array) -> tuple[Array, Array, Array]:
    """Design [n + 2, 2], outcomes and weights, the pseudo-observations last."""
    spread = differences.std()
    scaled = np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)
    places = np.concatenate([scaled, [-1.0, 1.0]])
    design = np.stack([np.ones_like(places), places], axis=1)
    answers = np.concatenate([won, [0.5, 0.5]])
    weights = np.concatenate([np.ones_like(won), [PSEUDO_WEIGHT, PSEUDO_WEIGHT]])
    return design, answers, weights


def _fit(design: Array, answers: Array, weights: Array) -> Array:
    """Newton's method with halved steps: the coefficients of the largest likelihood, which is concave."""
    coefficients = np.zeros(design.shape[1])
    for _ in range(_ITERATIONS):
        gradient = design.T @ (weights * (answers - _expected(design, coefficients)))
        step = np.linalg.solve(_information(design, weights, coefficients), gradient)
        while _loss(design, answers, weights, coefficients + step) > _loss(design, answers, weights, coefficients):
            if np.abs(step).max() < _TOLERANCE:
                return coefficients
            step /= 2
        coefficients = coefficients + step
        if np.abs(step).max() < _TOLERANCE:
            break
    return coefficients


def _variance(design: Array, answers: Array, weights: Array, coefficients: Array) -> float:
    """The intercept's, by the sandwich estimator."""
    inverse = np.linalg.inv(_information(design, weights, coefficients))
    scores = design * (weights * (answers - _expected(design, coefficients)))[:, None]
    return float((inverse @ scores.T @ scores @ inverse)[0, 0])


def _information(design: Array, weights: Array, coefficients: Array) -> Array:
    expected = _expected(design, coefficients)
    return (design * (weights * expected * (1 - expected))[:, None]).T @ design


def _loss(design: Array, answers: Array, weights: Array, coefficients: Array) -> float:
    logits = design @ coefficients
    return float(weights @ (np.logaddexp(0.0, logits) - answers * logits))


def _expected(design: Array, coefficients: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-design @ coefficients)))


def _share(logit: float) -> float:
    return 1 / (1 + exp(-logit))
