"""Statistics of comparisons against slow obvious oracles and against scipy and statsmodels on the same numbers."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import comb, sqrt

import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_of_statsmodels
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower

from reward.comparison import LOSS, TIE, WIN, accuracy_tests, holm, mcnemar, outcomes, prompts_needed
from reward.intervals import mean_interval, paired_difference


def _slow_mcnemar(gained: int, lost: int) -> float:
    """The share of all ways to give each discordant prompt to a model that are at least as one-sided."""
    seen = abs(gained - lost)
    ways = [abs(2 * sum(each) - len(each)) >= seen for each in product((0, 1), repeat=gained + lost)]
    return sum(ways) / len(ways)


def _slow_holm(values: list[float], level: float) -> set[int]:
    """Which hypotheses the closed testing procedure rejects: those of which every intersection is rejected."""
    places = range(len(values))
    subsets = [[place for place in places if mask >> place & 1] for mask in range(1, 2 ** len(values))]
    kept = [subset for subset in subsets if min(values[place] for place in subset) > level / len(subset)]
    return {place for place in places if not any(place in subset for subset in kept)}


@pytest.mark.parametrize("gained", range(7))
@pytest.mark.parametrize("lost", range(7))
def test_mcnemar_counts_the_assignments_that_are_as_one_sided(gained: int, lost: int) -> None:
    assert mcnemar(gained, lost) == pytest.approx(_slow_mcnemar(gained, lost), rel=1e-12)


@pytest.mark.parametrize(
    ("gained", "lost"), [(0, 0), (1, 0), (12, 30), (61, 40), (150, 150), (900, 1000), (2600, 2400)]
)
def test_mcnemar_agrees_with_scipy_and_statsmodels(gained: int, lost: int) -> None:
    found = mcnemar(gained, lost)
    assert found == pytest.approx(binomtest(gained, gained + lost).pvalue if gained + lost else 1.0, rel=1e-9)
    table = [[5, gained], [lost, 7]]
    assert found == pytest.approx(mcnemar_of_statsmodels(table, exact=True).pvalue if gained + lost else 1.0, rel=1e-9)


def test_mcnemar_is_exact_where_floats_are_not() -> None:
    tail = Fraction(sum(comb(3_000, k) for k in range(1_201)), 2**3_000)
    assert mcnemar(1_200, 1_800) == pytest.approx(float(2 * tail), rel=1e-12)


def test_holm_rejects_what_closed_testing_rejects() -> None:
    dice = np.random.default_rng(0)
    for _ in range(40):
        values = [float(value) for value in dice.beta(0.4, 4, size=5)]
        adjusted = holm(values)
        for level in (0.01, 0.05, 0.2):
            assert {place for place, value in enumerate(adjusted) if value <= level} == _slow_holm(values, level)


def test_holm_agrees_with_statsmodels_whatever_the_order() -> None:
    values = [0.011, 0.04, 0.5, 0.011, 0.9]
    for order in (values, sorted(values), values[::-1]):
        assert holm(order) == pytest.approx(list(multipletests(order, method="holm")[1]))
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_false_finding_below_5_percent() -> None:
    dice = np.random.default_rng(1)
    false_findings = sum(min(holm([float(p) for p in dice.random(8)])) <= 0.05 for _ in range(2_000))
    assert false_findings / 2_000 == pytest.approx(0.05, abs=0.015)


def test_scores_become_wins_ties_and_losses() -> None:
    assert outcomes([1.0, 0.5, -2.0], [0.0, 0.5, 3.0]) == [WIN, TIE, LOSS]


def test_accuracies_are_tested_on_the_prompts_that_differ_and_corrected_together() -> None:
    own = {"sums": [1.0] * 9 + [0.0, 1.0], "facts": [1.0, 0.0, 0.5]}
    other = {"sums": [0.0] * 9 + [1.0, 1.0], "facts": [1.0, 1.0, 0.0]}
    found = accuracy_tests({task: (own[task], other[task]) for task in own})
    assert (found["sums"].gained, found["sums"].lost) == (9, 1)
    assert (found["facts"].gained, found["facts"].lost) == (0, 1)
    assert found["sums"].p == mcnemar(9, 1)
    assert [each.adjusted for each in found.values()] == holm([each.p for each in found.values()])


def test_accuracies_over_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="not paired"):
        accuracy_tests({"sums": ([1.0], [1.0, 0.0])})


def test_the_prompts_needed_are_those_of_a_power_analysis() -> None:
    differences = np.random.default_rng(2).normal(loc=0.02, scale=0.3, size=200)
    effect = 0.05 / differences.std(ddof=1)
    wanted = NormalIndPower(ddof=0).solve_power(effect_size=effect, alpha=0.05, power=0.8, ratio=0)
    assert prompts_needed(differences, 0.05) == pytest.approx(wanted, abs=1)
    assert prompts_needed(differences, -0.05) == prompts_needed(differences, 0.05)


def test_so_many_prompts_show_the_difference_in_four_of_five_evaluations() -> None:
    dice = np.random.default_rng(3)
    needed = prompts_needed(dice.normal(size=100_000), 0.25)
    assert needed is not None
    found = [mean_interval(dice.normal(loc=0.25, size=needed)) for _ in range(400)]
    assert sum(each.low > 0 for each in found if each.low is not None) / 400 == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(("differences", "resolution"), [([0.3], 0.3), ([0.3, 0.1], 0.0), ([0.25, 0.25], 0.25)])
def test_no_number_of_prompts_is_named_where_there_is_nothing_to_go_by(
    differences: list[float], resolution: float
) -> None:
    assert prompts_needed(differences, resolution) is None


@pytest.mark.parametrize(("prompts", "repetitions"), [(40, 1_000), (153, 400)])
def test_the_true_gain_lies_in_95_of_100_intervals(prompts: int, repetitions: int) -> None:
    """Of rewards as the embedded world's: half of the prompts answered alike, the rest better or worse by steps."""
    dice = np.random.default_rng(4)
    steps, chances = [-0.6, -0.2, 0.0, 0.2, 0.6], [0.05, 0.1, 0.5, 0.15, 0.2]
    truth = float(np.dot(steps, chances))
    drawn = dice.choice(steps, p=chances, size=(repetitions, prompts))
    found = [paired_difference(gains, np.zeros(prompts)) for gains in drawn]
    covered = sum(each.low <= truth <= each.high for each in found if each.low is not None and each.high is not None)
    assert 0.93 <= covered / repetitions <= 0.97


def test_the_bootstrap_s_interval_is_as_wide_as_the_t_test_s_on_many_prompts() -> None:
    values = np.random.default_rng(5).exponential(size=5_000)
    found = mean_interval(values)
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std(ddof=1) / sqrt(5_000), rel=0.1)
