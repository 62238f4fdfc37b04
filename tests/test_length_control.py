"""The win rate at equal lengths against a slow fit, statsmodels, and simulated judges that like long responses."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
import statsmodels.api as sm
from numpy.typing import NDArray

from reward.length_control import length_controlled

Array = NDArray[np.float64]


def judged(prompts: int, seed: int, *, better: float, bias: float, ties: float = 0.2) -> tuple[Array, Array]:
    """Outcomes by a judge that likes the model by `better` and length by `bias`, and the differences in length."""
    dice = np.random.default_rng(seed)
    longer = dice.normal(loc=20, scale=40, size=prompts)
    chance = 1 / (1 + np.exp(-(better + bias * np.tanh(longer / longer.std()))))
    won = (dice.random(prompts) < chance).astype(float)
    # A tie replaces a win as often as a loss: it moves no expectation where both are as likely.
    return np.where(dice.random(prompts) < ties, 0.5, won), longer


def _slow_fit(won: Array, longer: Array) -> float:
    """The win rate at equal lengths, by gradient ascent on the likelihood with the two pseudo-ties, one by one."""
    rows = [(float(y), float(np.tanh(x / longer.std())), 1.0) for y, x in zip(won, longer, strict=True)]
    rows += [(0.5, -1.0, 0.5), (0.5, 1.0, 0.5)]
    intercept = slope = 0.0
    for _ in range(3_000):
        errors = [(w * (y - 1 / (1 + exp(-intercept - slope * x))), x) for y, x, w in rows]
        intercept += 4 / len(rows) * sum(error for error, _ in errors)
        slope += 4 / len(rows) * sum(error * x for error, x in errors)
    return 1 / (1 + exp(-intercept))


def _by_statsmodels(won: Array, longer: Array) -> tuple[float, float, float]:
    answers, design, weights = _observed(won, longer)
    model = sm.GLM(answers, design, family=sm.families.Binomial(), var_weights=weights)
    found = model.fit(tol=1e-12, cov_type="HC0")
    low, high = found.conf_int()[0]
    return tuple(1 / (1 + exp(-float(each))) for each in (found.params[0], low, high))  # type: ignore[return-value]


def _observed(won: Array, longer: Array) -> tuple[Array, Array, Array]:
    places = np.concatenate([np.tanh(longer / longer.std()), [-1.0, 1.0]])
    weights = np.concatenate([np.ones_like(won), [0.5, 0.5]])
    return np.concatenate([won, [0.5, 0.5]]), sm.add_constant(places), weights


def _rejection(won: Array, longer: Array, rate: float) -> float:
    """The score test of a win rate at equal lengths: the slope by statsmodels with the intercept as an offset, and the
    covariance of both scores with each outcome's variance."""
    answers, design, weights = _observed(won, longer)
    offset = np.full_like(answers, log(rate / (1 - rate)))
    slope = sm.GLM(answers, design[:, 1:], family=sm.families.Binomial(), var_weights=weights, offset=offset).fit()
    expected = np.asarray(slope.fittedvalues)
    ties = float((won == 0.5).mean())
    tied = np.array([min(ties, 2 * p, 2 * (1 - p)) for p in expected])
    scores = design.T @ (weights * (answers - expected))
    covariance = (design.T * weights**2 * (expected * (1 - expected) - tied / 4)) @ design
    fisher = (design.T * weights * expected * (1 - expected)) @ design
    combined = np.array([1.0, -fisher[0, 1] / fisher[1, 1]])
    return float(combined @ scores / np.sqrt(combined @ covariance @ combined))


def test_it_agrees_with_a_slow_fit() -> None:
    won, longer = judged(60, 0, better=0.5, bias=1.0)
    assert length_controlled(won, longer).value == pytest.approx(_slow_fit(won, longer), abs=1e-6)


@pytest.mark.parametrize("prompts", [4, 30, 300])
def test_the_interval_ends_where_the_score_test_rejects(prompts: int) -> None:
    won, longer = judged(prompts, 1, better=0.3, bias=1.0)
    found = length_controlled(won, longer)
    assert found.n == prompts
    for bound, sign in ((found.low, 1), (found.high, -1)):
        assert bound is not None
        assert _rejection(won, longer, bound) == pytest.approx(sign * 1.959964, abs=1e-4)


def test_with_many_prompts_value_and_interval_agree_with_statsmodels() -> None:
    won, longer = judged(5_000, 1, better=0.3, bias=1.0)
    found = length_controlled(won, longer)
    value, low, high = _by_statsmodels(won, longer)
    assert found.value == pytest.approx(value, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-4)


def test_a_model_that_wins_by_length_alone_wins_half_at_equal_lengths() -> None:
    won, longer = judged(5_000, 2, better=0.0, bias=2.0)
    assert won.mean() > 0.58
    assert length_controlled(won, longer).value == pytest.approx(0.5, abs=0.03)


def test_a_model_that_is_better_whatever_the_length_stays_better() -> None:
    won, longer = judged(5_000, 3, better=1.0, bias=0.0, ties=0.0)
    found = length_controlled(won, longer)
    assert found.value == pytest.approx(won.mean(), abs=0.01)


@pytest.mark.slow
def test_the_win_rate_at_equal_lengths_lies_in_95_of_100_intervals() -> None:
    truth = 1 / (1 + exp(-0.5))
    found = [length_controlled(*judged(150, 100 + seed, better=0.5, bias=1.0, ties=0.0)) for seed in range(500)]
    covered = sum(each.low <= truth <= each.high for each in found if each.low is not None and each.high is not None)
    assert 465 <= covered <= 485


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [4, 20])
@pytest.mark.parametrize("better", [0.0, 2.0])
def test_few_prompts_leave_as_much_doubt_as_they_should(prompts: int, better: float) -> None:
    truth = 1 / (1 + exp(-better))
    found = [length_controlled(*judged(prompts, 100 + seed, better=better, bias=0.5, ties=0.0)) for seed in range(300)]
    covered = sum(each.low <= truth <= each.high for each in found if each.low is not None and each.high is not None)
    assert covered >= 273


@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_three_prompts_that_agree_do_not_settle_it(outcome: float) -> None:
    found = length_controlled([outcome] * 3, [1.0, -2.0, 3.0])
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.5 < found.high
    assert found.high - found.low > 0.4


def test_the_unit_of_length_does_not_matter() -> None:
    won, longer = judged(80, 4, better=0.2, bias=0.5)
    assert length_controlled(won, 7 * longer).value == pytest.approx(length_controlled(won, longer).value)


def test_responses_of_equal_length_give_the_plain_win_rate_with_one_tie_more() -> None:
    found = length_controlled([1.0, 1.0, 0.5, 0.0], [0.0] * 4)
    assert found.value == pytest.approx((2.5 + 0.5) / 5)


@pytest.mark.parametrize("longer", [[-3.0] * 150, list(-np.linspace(0.1, 1, 150)), list(np.linspace(-1, 1, 150))])
def test_a_model_that_always_wins_has_a_rate_below_one_and_an_interval(longer: list[float]) -> None:
    found = length_controlled([1.0] * 150, longer)
    assert found.low is not None
    assert found.high is not None
    assert 0.75 < found.low < found.value < found.high < 1


def test_wins_and_lengths_that_are_perfectly_separated_say_little() -> None:
    longer = np.linspace(-1, 1, 151)
    found = length_controlled((longer > 0).astype(float), longer)
    assert found.value == pytest.approx(0.5, abs=0.1)
    assert found.high is not None
    assert found.low is not None
    assert found.high - found.low > 0.1


def test_one_prompt_has_no_interval() -> None:
    found = length_controlled([1.0], [5.0])
    assert (found.low, found.high, found.n) == (None, None, 1)
    assert found.value == pytest.approx(1 / (1 + exp(-log(3))))


@pytest.mark.parametrize(("won", "longer"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [float("inf")])])
def test_impossible_comparisons_are_refused(won: list[float], longer: list[float]) -> None:
    with pytest.raises(ValueError, match=r"not paired|non-empty|not finite"):
        length_controlled(won, longer)
