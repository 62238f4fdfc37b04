"""95% intervals: how far a measured figure may be from the one that infinitely many prompts would give.

Means use the percentile bootstrap (Efron 1979, doi 10.1214/aos/1176344552), which asks nothing of the
distribution but is a little narrow below about 30 observations. Proportions use Wilson's score interval
(Wilson 1927, doi 10.1080/01621459.1927.10502953), which stays honest at 0 and 1; so does Tango's score interval (Tango
1998, doi 10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B) for differences of proportions over the same
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pipeline.manifest import Metric

CONFIDENCE = 0.95
RESAMPLES = 2_000
_DRAWS_AT_ONCE = 2_000_000
_HALVINGS = 60

Values = Sequence[float] | NDArray[np.floating] | NDArray[np.integer]


def mean_interval(values: Values) -> Metric:
    """Mean of independent observations with its percentile-bootstrap interval, the same at every call.

    Args:
        values: One number per observation, shape (n,). A single observation has no interval.

    Raises:
        ValueError: When `values` is empty, not one-dimensional, or holds a number that is not finite.
    """
    return function_of_means(lambda means: means, values)


def paired_difference(a: Values, b: Values) -> Metric:
    """Mean of `a - b` over the same prompts, with its interval.

    Pairing takes out what the prompts differ in, so the interval is narrower than that of two separate means.

    Args:
        a: One number per prompt, shape (n,).
        b: The same prompts in the same order.

    Raises:
        ValueError: When the lengths differ, or as for `mean_interval`.
    """
    first, second = finite(a, "a"), finite(b, "b")
    if first.size != second.size:
        raise ValueError(f"a has {first.size} observations and b has {second.size}: they are not paired")
    return mean_interval(first - second)


def ratio_interval(numerators: Values, denominators: Values) -> Metric:
    """Ratio of two sums over the same observations (loss per token over documents), with its interval.

    Args:
        numerators: One number per observation, shape (n,).
        denominators: The same observations in the same order, all positive.

    Raises:
        ValueError: When the lengths differ or a denominator is not positive, or as for `mean_interval`.
    """
    above, below = finite(numerators, "numerators"), finite(denominators, "denominators")
    if above.size != below.size:
        raise ValueError(f"{above.size} numerators and {below.size} denominators: they are not paired")
    if (below <= 0).any():
        raise ValueError("a denominator is not positive")
    return function_of_means(np.divide, above, below)


def function_of_means(function: Callable[..., NDArray[np.float64]], *columns: Values) -> Metric:
    """A function of the means of several figures over the same observations, with its percentile-bootstrap interval.

    Observations are drawn whole, so that what the figures have in common is in the interval.

    Args:
        function: Takes the means of each column, all of shape (k,), and returns k values.
        columns: One number per observation each, shape (n,). A single observation has no interval.

    Raises:
        ValueError: When the lengths differ, or as for `mean_interval`.
    """
    observed = [finite(each, "values") for each in columns]
    count = observed[0].size
    if any(each.size != count for each in observed):
        raise ValueError(f"columns of {[each.size for each in observed]} observations: they are not paired")
    value = float(function(*(each.mean(keepdims=True) for each in observed))[0])
    if count == 1:
        return Metric(value=value, n=1)
    tail = (1 - CONFIDENCE) / 2
    # The draws are the same for equal sizes, so each row of means is that of one resample.
    low, high = np.quantile(function(*map(_resampled_means, observed)), [tail, 1 - tail])
    return Metric(value=value, low=float(low), high=float(high), n=count)


def proportion_interval(successes: float, n: int) -> Metric:
    """Share of `n` independent trials that succeeded, halves allowed, with Wilson's score interval.

    Raises:
        ValueError: When `n` is not positive or `successes` is not within 0 to `n`.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials is not a proportion")
    share = successes / n
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    shrunk = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrunk
    reach = z / shrunk * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and 1 the bound equals the share exactly; rounding must not push it past.
    low, high = min(share, max(0.0, centre - reach)), max(share, min(1.0, centre + reach))
    return Metric(value=share, low=low, high=high, n=n)


def share_preferred(margins: Sequence[float]) -> Metric:
    """Share of pairs of which the first has more, by its margin over the second; of a margin of 0, a half, as of two
    models that are the same.

    Raises:
        ValueError: There is no pair.
    """
    return proportion_interval(sum((margin > 0) + (margin == 0) / 2 for margin in margins), len(margins))


def proportion_difference(a: Values, b: Values) -> Metric:
    """Difference of two proportions over the same prompts, with Tango's score interval.

    Args:
        a: 1 or 0 for each prompt, shape (n,).
        b: The same prompts in the same order.

    Raises:
        ValueError: When the lengths differ, there are none, or a number is neither 0 nor 1.
    """
    first, second = finite(a, "a"), finite(b, "b")
    if first.size != second.size:
        raise ValueError(f"a has {first.size} observations and b has {second.size}: they are not paired")
    if not np.isin([first, second], (0.0, 1.0)).all():
        raise ValueError("a number is neither 0 nor 1")
    gained, lost = int((first > second).sum()), int((second > first).sum())
    n = first.size
    value = (gained - lost) / n
    low, high = -_furthest_gain(lost, gained, n), _furthest_gain(gained, lost, n)
    return Metric(value=value, low=min(value, low), high=max(value, high), n=n)


def _furthest_gain(gained: int, lost: int, n: int) -> float:
    """The largest difference that the score test does not reject, by bisection."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    kept, rejected = (gained - lost) / n, 1.0
    for _ in range(_HALVINGS):
        middle = (kept + rejected) / 2
        if n * middle - (gained - lost) <= z * sqrt(
            n * (2 * _lost_share(middle, gained, lost, n) + middle * (1 - middle))
        ):
            kept = middle
        else:
            rejected = middle
    return kept


def _lost_share(difference: float, gained: int, lost: int, n: int) -> float:
    """The likeliest share of prompts that are lost, if the difference is as given: the larger root of a parabola."""
    slope = (2 * n - gained + lost) * difference - gained - lost
    return (sqrt(slope * slope + 8 * n * lost * difference * (1 - difference)) - slope) / (4 * n)


def finite(values: Values, name: str) -> NDArray[np.float64]:
    """Observations as an array, shape (n,).

    Raises:
        ValueError: When there are none, or they are not one-dimensional or not finite.
    """
    observed = np.asarray(values, dtype=np.float64)
    if observed.ndim != 1 or observed.size == 0:
        raise ValueError(f"{name} must be a non-empty sequence of numbers, not of shape {observed.shape}")
    if not np.isfinite(observed).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(observed)).sum())} numbers that are not finite")
    return observed


def _resampled_means(observed: NDArray[np.float64]) -> NDArray[np.float64]:
    generator = np.random.default_rng(0)
    rows = max(1, _DRAWS_AT_ONCE // observed.size)
    portions = [min(rows, RESAMPLES - done) for done in range(0, RESAMPLES, rows)]
    draws = (generator.integers(0, observed.size, size=(portion, observed.size)) for portion in portions)
    return np.concatenate([observed[draw].mean(axis=1) for draw in draws])
