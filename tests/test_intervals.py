"""Intervals against slow obvious oracles and against simulated coverage."""

from __future__ import annotations

import random
import subprocess
import sys
from math import comb, sqrt
from statistics import NormalDist, fmean

import numpy as np
import pytest

from reward import intervals
from reward.intervals import (
    function_of_means,
    mean_interval,
    paired_difference,
    proportion_difference,
    proportion_interval,
    ratio_interval,
)


def _slow_bootstrap(values: list[float], resamples: int) -> tuple[float, float]:
    dice = random.Random(7)
    means = sorted(fmean(dice.choices(values, k=len(values))) for _ in range(resamples))
    return means[round(0.025 * resamples)], means[round(0.975 * resamples) - 1]


def _wilson_by_bisection(successes: int, n: int, *, upper: bool) -> float:
    """The furthest p that a two-sided 95% score test does not reject."""
    share, z = successes / n, NormalDist().inv_cdf(0.975)
    kept, rejected = share, 1.0 if upper else 0.0
    for _ in range(200):
        middle = (kept + rejected) / 2
        if abs(share - middle) <= z * sqrt(middle * (1 - middle) / n):
            kept = middle
        else:
            rejected = middle
    return kept


def test_the_bootstrap_agrees_with_a_loop_over_resamples() -> None:
    values = [float(x) for x in np.random.default_rng(1).exponential(size=60)]
    found = mean_interval(values)
    low, high = _slow_bootstrap(values, 20_000)
    assert found.value == pytest.approx(fmean(values))
    assert found.n == 60
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)


def test_the_same_values_give_the_same_interval() -> None:
    values = np.random.default_rng(2).normal(size=100)
    assert mean_interval(values) == mean_interval(list(values))


def test_the_interval_moves_and_stretches_with_the_values() -> None:
    values = np.random.default_rng(3).normal(size=50)
    plain, moved = mean_interval(values), mean_interval(10 + 3 * values)
    assert plain.low is not None
    assert plain.high is not None
    assert moved.low == pytest.approx(10 + 3 * plain.low)
    assert moved.high == pytest.approx(10 + 3 * plain.high)


def test_drawing_in_portions_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(size=64)
    whole = mean_interval(values)
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 64 * 300)
    assert mean_interval(values) == whole


def test_the_mean_lies_in_95_of_100_intervals() -> None:
    dice = np.random.default_rng(5)
    found = [mean_interval(dice.normal(loc=1.0, size=50)) for _ in range(1_000)]
    covered = sum(each.low <= 1.0 <= each.high for each in found if each.low is not None and each.high)
    assert 930 <= covered <= 970


def test_one_observation_has_no_interval() -> None:
    found = mean_interval([3.0])
    assert (found.value, found.low, found.high, found.n) == (3.0, None, None, 1)


def test_equal_values_have_an_interval_of_no_width() -> None:
    found = mean_interval([2.0] * 40)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_pairing_is_the_interval_of_the_differences() -> None:
    dice = np.random.default_rng(6)
    difficulty = dice.normal(scale=5, size=80)
    a, b = difficulty + 0.5 + dice.normal(scale=0.1, size=80), difficulty
    found = paired_difference(a, b)
    assert found == mean_interval(a - b)
    assert found.low is not None
    assert found.low > 0.4


def test_unpaired_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="not paired"):
        paired_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")], [[1.0, 2.0]]])
def test_values_without_a_mean_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values"):
        mean_interval(values)


def test_a_ratio_with_equal_denominators_is_a_mean() -> None:
    values = np.random.default_rng(8).normal(size=70)
    ratio, mean = ratio_interval(values, np.full(70, 4.0)), mean_interval(values / 4)
    assert ratio.n == mean.n == 70
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([mean.value, mean.low, mean.high])


def test_a_ratio_agrees_with_a_loop_that_resamples_pairs() -> None:
    dice, draw = np.random.default_rng(9), random.Random(10)
    pairs = [(float(2 * size + dice.normal()), float(size)) for size in dice.integers(1, 30, size=60)]
    loop = [draw.choices(pairs, k=60) for _ in range(10_000)]
    ratios = sorted(sum(above for above, _ in drawn) / sum(below for _, below in drawn) for drawn in loop)
    found = ratio_interval([above for above, _ in pairs], [below for _, below in pairs])
    assert found.low == pytest.approx(ratios[250], abs=0.005)
    assert found.high == pytest.approx(ratios[9_749], abs=0.005)


def test_a_function_of_means_agrees_with_a_loop_that_resamples_observations_whole() -> None:
    dice = np.random.default_rng(11)
    first = dice.exponential(size=50)
    second = first + dice.normal(scale=0.1, size=50)
    products = sorted(
        first[draw].mean() * second[draw].mean() for draw in (dice.integers(50, size=50) for _ in range(10_000))
    )
    found = function_of_means(np.multiply, first, second)
    assert found.value == pytest.approx(first.mean() * second.mean())
    assert found.low == pytest.approx(products[250], abs=0.03)
    assert found.high == pytest.approx(products[9_749], abs=0.03)
    with pytest.raises(ValueError, match="not paired"):
        function_of_means(np.multiply, first, second[1:])


def test_pairs_without_a_margin_are_a_half() -> None:
    assert intervals.share_preferred([0.0] * 8) == intervals.proportion_interval(4, 8)
    assert intervals.share_preferred([0.3, -0.1, 0.0, 2.0]).value == 2.5 / 4
    half = intervals.share_preferred([1.0, 0.0, -1.0])
    assert half.low is not None
    assert half.high is not None
    assert half.low + half.high == pytest.approx(1.0)


@pytest.mark.parametrize("denominators", [[1.0], [1.0, 0.0], [1.0, -2.0]])
def test_impossible_ratios_are_refused(denominators: list[float]) -> None:
    with pytest.raises(ValueError, match="denominator"):
        ratio_interval([1.0, 2.0], denominators)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 1), (3, 7), (50, 100), (999, 1000)])
def test_wilson_bounds_are_where_the_score_test_turns(successes: int, n: int) -> None:
    found = proportion_interval(successes, n)
    assert found.value == successes / n
    assert found.low == pytest.approx(_wilson_by_bisection(successes, n, upper=False), abs=1e-9)
    assert found.high == pytest.approx(_wilson_by_bisection(successes, n, upper=True), abs=1e-9)


def test_wilson_covers_95_percent_on_average_over_all_proportions() -> None:
    n = 60
    bounds = [proportion_interval(successes, n) for successes in range(n + 1)]
    covered = [
        sum(
            comb(n, k) * p**k * (1 - p) ** (n - k)
            for k, each in enumerate(bounds)
            if each.low is not None and each.high is not None and each.low <= p <= each.high
        )
        for p in np.linspace(0.02, 0.98, 97)
    ]
    assert 0.93 <= fmean(covered) <= 0.97


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5)])
def test_impossible_proportions_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="not a proportion"):
        proportion_interval(successes, n)


def _pairs(gained: int, lost: int, n: int) -> tuple[list[float], list[float]]:
    """So many prompts that only the first and only the second answer right; the rest, by turns, both and neither."""
    rest = [float(place % 2) for place in range(n - gained - lost)]
    return [1.0] * gained + [0.0] * lost + rest, [0.0] * gained + [1.0] * lost + rest


def _tango_by_search(gained: int, lost: int, n: int, *, upper: bool) -> float:
    """The furthest difference whose score test does not reject, its variance at the likeliest shares on a fine grid."""
    sign, z = (1 if upper else -1), NormalDist().inv_cdf(0.975)

    def rejects(difference: float) -> bool:
        # All pairs of shares (gained, lost) with that difference; what is lost goes from 0 to where nothing is equal.
        share = np.linspace(max(0.0, -difference), (1 - difference) / 2, 20_001)[1:-1]
        likelihood = gained * np.log(share + difference) + lost * np.log(share)
        likelihood += (n - gained - lost) * np.log1p(-difference - 2 * share)
        likeliest = share[likelihood.argmax()]
        variance = n * (2 * likeliest + difference - difference**2)
        return bool(abs(gained - lost - n * difference) > z * sqrt(variance))

    kept, rejected = (gained - lost) / n, float(sign)
    for _ in range(20 if kept != rejected else 0):
        middle = (kept + rejected) / 2
        kept, rejected = (kept, middle) if rejects(middle) else (middle, rejected)
    return kept


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(2, 0, 2), (0, 0, 10), (3, 1, 20), (0, 5, 12), (12, 2, 50), (40, 30, 400)]
)
def test_the_bounds_of_a_paired_difference_are_where_the_score_test_turns(gained: int, lost: int, n: int) -> None:
    found = proportion_difference(*_pairs(gained, lost, n))
    assert found.value == (gained - lost) / n
    assert found.low == pytest.approx(_tango_by_search(gained, lost, n, upper=False), abs=2e-4)
    assert found.high == pytest.approx(_tango_by_search(gained, lost, n, upper=True), abs=2e-4)


def test_a_paired_difference_is_the_published_one() -> None:
    # Fagerland, Lydersen and Laake 2014 (doi 10.1002/sim.6148): 1 of 21 children gained, 7 lost.
    found = proportion_difference(*_pairs(1, 7, 21))
    assert [found.low, found.high] == pytest.approx([-0.517, -0.026], abs=5e-4)


def test_turning_a_paired_difference_round_turns_its_interval_round() -> None:
    found, turned = proportion_difference(*_pairs(3, 1, 20)), proportion_difference(*_pairs(1, 3, 20))
    assert (found.low, found.high) == (-(turned.high or 0), -(turned.low or 0))


@pytest.mark.parametrize(("gained", "n"), [(0, 1), (1, 1), (0, 2), (2, 2), (3, 3), (0, 1_000)])
def test_few_pairs_or_equal_ones_are_no_clear_difference(gained: int, n: int) -> None:
    found = proportion_difference(*_pairs(gained, 0, n))
    assert found.low is not None
    assert found.high is not None
    assert -1 <= found.low < 0 < found.high <= 1


def test_a_paired_difference_lies_in_about_95_of_100_intervals() -> None:
    n, gains, losses = 40, 0.2, 0.1
    covered = 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            chance = comb(n, gained) * comb(n - gained, lost) * gains**gained * losses**lost
            chance *= (1 - gains - losses) ** (n - gained - lost)
            if chance > 1e-6:
                found = proportion_difference(*_pairs(gained, lost, n))
                assert found.low is not None
                assert found.high is not None
                covered += chance * (found.low <= gains - losses <= found.high)
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ([1.0, 0.0], [1.0], "not paired"),
        ([0.5], [1.0], "neither 0 nor 1"),
        ([1.0], [2.0], "neither 0 nor 1"),
        ([], [], "non-empty"),
    ],
)
def test_what_is_no_pair_of_proportions_is_refused(a: list[float], b: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        proportion_difference(a, b)


def test_importing_intervals_does_not_import_torch() -> None:
    check = "import sys, reward.intervals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
