"""95% intervals: how far a measured figure may be from the one that infinitely many prompts would give.

Means use the percentile bootstrap (Efron 1979, doi 10.1214/aos/1176344552), which asks nothing of the
distribution but is a little narrow below about 30 observations. Proportions use Wilson's score interval
(Wilson 1927, doi 10.1080/01621459.1927.10502953), which stays honest at 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pipeline.manifest import Metric

CONFIDENCE = 0.95
RESAMPLES = 2_000
_DRAWS_AT_ONCE = 2_000_000

Values = Sequence[float] | NDArray[np.floating] | NDArray[np.integer]


def mean_interval(values: Values) -> Metric:
    """Mean of independent observations with its percentile-bootstrap interval, the same at every call.

    Args:
        values: One number per observation, shape (n,). A single observation has no interval.

    Raises:
        ValueError: When `values` is empty, not one-dimensional, or holds a number that is not finite.
    """
    observed = _finite(values, "values")
    if observed.size == 1:
        return Metric(value=float(observed[0]), n=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(_resampled_means(observed), [tail, 1 - tail])
    return Metric(value=float(observed.mean()), low=float(low), high=float(high), n=int(observed.size))


def paired_difference(a: Values, b: Values) -> Metric:
    """Mean of `a - b` over the same prompts, with its interval.

    Pairing takes out what the prompts differ in, so the interval is narrower than that of two separate means.

    Args:
        a: One number per prompt, shape (n,).
        b: The same prompts in the same order.

    Raises:
        ValueError: When the lengths differ, or as for `mean_interval`.
    """
    first, second = _finite(a, "a"), _finite(b, "b")
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
    above, below = _finite(numerators, "numerators"), _finite(denominators, "denominators")
    if above.size != below.size:
        raise ValueError(f"{above.size} numerators and {below.size} denominators: they are not paired")
    if (below <= 0).any():
        raise ValueError("a denominator is not positive")
    value = float(above.sum() / below.sum())
    if above.size == 1:
        return Metric(value=value, n=1)
    tail = (1 - CONFIDENCE) / 2
    # The draws are the same for equal sizes, so each quotient is the ratio of one resample.
    low, high = np.quantile(_resampled_means(above) / _resampled_means(below), [tail, 1 - tail])
    return Metric(value=value, low=float(low), high=float(high), n=int(above.size))


def proportion_interval(successes: int, n: int) -> Metric:
    """Share of `n` independent trials that succeeded, with Wilson's score interval.

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


def _finite(values: Values, name: str) -> NDArray[np.float64]:
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
