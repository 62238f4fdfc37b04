"""How often a model would win if its responses were as long as the other's.

Judges like long responses, so a win rate may be a matter of length. As in AlpacaEval 2 (Dubois et al. 2024, arXiv
2404.04475), the outcome of a comparison is explained by a logistic regression on the difference in length, and the win
rate is read off where that is zero. Left out of theirs: the term for how hard each prompt is, which is fitted to many
models at once, and with it the prompt's own share in the win rate; the regularisation chosen by cross-validation.
Added: an interval, of all win rates that the score test does not reject, whatever the slope. Unlike one that is read
off the curvature at the best fit, it is not too sure of few prompts that agree.

Where wins and lengths are perfectly separated, no finite regression fits best. So two pseudo-observations are added,
a tie at either extreme of length, which together weigh as much as one prompt.
"""

from __future__ import annotations

from math import exp, sqrt
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.manifest import Metric
from reward.comparison import TIE
from reward.intervals import CONFIDENCE, Values, finite

Array = NDArray[np.float64]
Observed = tuple[Array, Array, Array]
"""Design [n + 2, 2], outcomes and weights, the pseudo-observations last."""

PSEUDO_WEIGHT = 0.5
"""Of each of the two pseudo-observations."""
_ITERATIONS, _HALVINGS = 100, 20
_TOLERANCE = 1e-10
_CERTAIN = 16.0
"""Distance of logits beyond which no bound is looked for."""


def length_controlled(outcomes: Values, longer_by: Values) -> Metric:
    """The win rate at equal lengths, with its interval.

    The score test (Rao 1948, doi 10.1017/S0305004100023987) of an intercept has the slope that fits best with it, and
    the variance that the outcomes would then have. Ties make that smaller, by as many as there are, or as there can be.

    Args:
        outcomes: [prompts] 1 for a win, 0.5 for a tie, 0 for a loss.
        longer_by: [prompts] by how much the model's response is longer than the other's, in any unit.

    Raises:
        ValueError: When the lengths differ, there are no prompts, or a number is not finite.
    """
    won, differences = finite(outcomes, "outcomes"), finite(longer_by, "longer_by")
    if won.size != differences.size:
        raise ValueError(f"{won.size} outcomes and {differences.size} differences: they are not paired")
    observed = _observations(won, differences)
    intercept = float(_fit(*observed)[0])
    if won.size == 1:
        return Metric(value=_share(intercept), n=1)
    ties = float((won == TIE).mean())
    low, high = (_share(_bound(intercept, side, observed, ties)) for side in (-1, 1))
    return Metric(value=_share(intercept), low=low, high=high, n=int(won.size))


def _observations(won: Array, differences: Array) -> Observed:
    spread = differences.std()
    scaled = np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)
    places = np.concatenate([scaled, [-1.0, 1.0]])
    design = np.stack([np.ones_like(places), places], axis=1)
    answers = np.concatenate([won, [TIE, TIE]])
    weights = np.concatenate([np.ones_like(won), [PSEUDO_WEIGHT, PSEUDO_WEIGHT]])
    return design, answers, weights


def _fit(design: Array, answers: Array, weights: Array, offset: float = 0.0) -> Array:
    """Newton's method with halved steps: the coefficients of the largest likelihood, which is concave.

    Args:
        offset: A part of every logit that is known.
    """
    coefficients = np.zeros(design.shape[1])
    loss = _loss(offset + design @ coefficients, answers, weights)
    for _ in range(_ITERATIONS):
        expected = _expected(offset + design @ coefficients)
        information = (design * (weights * expected * (1 - expected))[:, None]).T @ design
        step = np.linalg.solve(information, design.T @ (weights * (answers - expected)))
        while (after := _loss(offset + design @ (coefficients + step), answers, weights)) > loss:
            if np.abs(step).max() < _TOLERANCE:
                return coefficients
            step /= 2
        coefficients, loss = coefficients + step, after
        if np.abs(step).max() < _TOLERANCE:
            break
    return coefficients


def _bound(intercept: float, side: Literal[-1, 1], observed: Observed, ties: float) -> float:
    """Where, from the best fit outwards, the score test begins to reject the intercept."""
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)

    def holds(distance: float) -> bool:
        return abs(_score_test(intercept + side * distance, observed, ties)) < reach

    near, far = 0.0, 1.0
    while far < _CERTAIN and holds(far):
        near, far = far, 2 * far
    for _ in range(_HALVINGS):
        middle = (near + far) / 2
        near, far = (middle, far) if holds(middle) else (near, middle)
    return intercept + side * near


def _score_test(intercept: float, observed: Observed, ties: float) -> float:
    """How many standard deviations the outcomes are above what they would be expected to be with this intercept."""
    design, answers, weights = observed
    places = design[:, 1]
    (slope,) = _fit(places[:, None], answers, weights, intercept)
    expected = _expected(intercept + slope * places)
    information = weights * expected * (1 - expected)
    # What is left of the intercept's score once the slope has taken its part.
    own = 1 - (information @ places) / (information @ places**2) * places
    tied = np.minimum(ties, 2 * np.minimum(expected, 1 - expected))
    variance = expected * (1 - expected) - tied / 4
    return float((weights * own) @ (answers - expected) / sqrt((weights * own) ** 2 @ variance))


def _loss(logits: Array, answers: Array, weights: Array) -> float:
    return float(weights @ (np.logaddexp(0.0, logits) - answers * logits))


def _expected(logits: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-logits.clip(-500, 500))))


def _share(logit: float) -> float:
    return 1 / (1 + exp(-logit))
