"""Best-of-n against all subsets, and a policy against best-of-n."""

from __future__ import annotations

from itertools import combinations
from math import log
from statistics import fmean

import numpy as np
import pytest
from numpy.typing import NDArray

from reward.best_of_n import Frontier, counts, divergence, expected_best

DICE = np.random.default_rng(0)


def over_all_subsets(scores: list[float], worth: list[float], n: int) -> float:
    """The mean over all subsets of n of the mean worth of those with the subset's highest score."""
    return fmean(
        fmean(worth[place] for place in chosen if scores[place] == max(scores[each] for each in chosen))
        for chosen in combinations(range(len(scores)), n)
    )


@pytest.mark.parametrize("kinds", [2, 4, 1_000])
@pytest.mark.parametrize("n", range(1, 8))
def test_the_expected_best_is_the_mean_over_all_subsets_whatever_the_ties(n: int, kinds: int) -> None:
    scores, worth = DICE.integers(kinds, size=(5, 7)).astype(float), DICE.normal(size=(5, 7))
    slow = [over_all_subsets(*rows, n) for rows in zip(scores.tolist(), worth.tolist(), strict=True)]
    assert expected_best(scores, worth, n) == pytest.approx(slow)


def test_the_best_of_one_is_the_mean_and_the_best_of_all_the_maximum() -> None:
    scores = DICE.normal(size=(6, 9))
    assert expected_best(scores, scores, 1) == pytest.approx(scores.mean(1))
    assert expected_best(scores, scores, 9) == pytest.approx(scores.max(1))


def test_more_to_choose_from_is_never_worse_by_the_score_chosen_by() -> None:
    scores = DICE.normal(size=(4, 12))
    found = np.stack([expected_best(scores, scores, n) for n in range(1, 13)])
    assert (np.diff(found, axis=0) > 0).all()


def test_where_all_scores_are_equal_choosing_changes_nothing() -> None:
    worth = DICE.normal(size=(3, 8))
    for n in (1, 3, 8):
        assert expected_best(np.zeros((3, 8)), worth, n) == pytest.approx(worth.mean(1))


@pytest.mark.parametrize("n", [0, 4, -1])
def test_more_than_there_are_and_less_than_one_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match="cannot be told from 3 responses"):
        expected_best(np.zeros((2, 3)), np.zeros((2, 3)), n)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 100])
def test_the_divergence_is_that_of_the_best_of_many_different_responses(n: int) -> None:
    """Of `many` equally likely responses without ties, the r-th worst is the best of n with probability
    (r/many)^n - ((r-1)/many)^n."""
    many = 200_000
    reached = (np.arange(many + 1) / many) ** n
    chances = np.diff(reached)
    likely = chances[chances > 0]
    assert divergence(n) == pytest.approx(float((likely * np.log(likely * many)).sum()), abs=2e-3)


def test_few_responses_diverge_less_than_the_bound() -> None:
    reached = (np.arange(4) / 3) ** 4
    chances = np.diff(reached)
    assert 0 < float((chances * np.log(chances * 3)).sum()) < divergence(4)


@pytest.mark.parametrize(
    ("most", "expected"),
    [(2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 4)), (6, (1, 2, 4, 6)), (64, (1, 2, 4, 8, 16, 32, 64))],
)
def test_n_doubles_from_one_up_to_the_last(most: int, expected: tuple[int, ...]) -> None:
    assert counts(most) == expected


@pytest.fixture
def frontier() -> Frontier:
    rewards = DICE.normal(size=(40, 8))
    return Frontier.of(rewards, rewards + DICE.normal(size=(40, 8)))


def test_a_frontier_holds_the_best_of_each_n_by_both_judges(frontier: Frontier) -> None:
    rewards, gold = DICE.normal(size=(5, 6)), DICE.normal(size=(5, 6))
    found = Frontier.of(rewards, gold)
    assert found.counts == (1, 2, 4, 6)
    assert found.gold is not None
    assert found.gold[2] == pytest.approx(expected_best(rewards, gold, 4))
    assert found.rewards[3] == pytest.approx(rewards.max(1))
    assert found.divergences == pytest.approx([divergence(n) for n in found.counts])
    assert Frontier.of(rewards, None).gold is None


def constant(divergence: float, prompts: int = 40) -> NDArray[np.float64]:
    return np.full(prompts, divergence)


@pytest.mark.parametrize("place", range(4))
def test_a_policy_on_the_frontier_has_no_gap_and_one_above_it_has_what_it_is_above(
    frontier: Frontier, place: int
) -> None:
    assert frontier.gold is not None
    own = frontier.gold[place]
    found = frontier.gap(own, constant(divergence(frontier.counts[place])))
    assert [found.value, found.low, found.high] == pytest.approx([0, 0, 0])
    above = frontier.gap(own + 0.25, constant(divergence(frontier.counts[place])))
    assert [above.value, above.low, above.high] == pytest.approx([0.25] * 3)
    assert found.n == 40


def test_between_two_n_the_frontier_is_linear_in_the_root_of_the_divergence(frontier: Frontier) -> None:
    assert frontier.gold is not None
    root = (divergence(2) ** 0.5 + divergence(4) ** 0.5) / 2
    halfway = (frontier.gold[1] + frontier.gold[2]) / 2
    assert frontier.gap(halfway, constant(root**2)).value == pytest.approx(0)


def test_beyond_the_last_n_and_below_zero_the_frontier_is_level(frontier: Frontier) -> None:
    assert frontier.gold is not None
    assert frontier.gap(frontier.gold[-1], constant(50.0)).value == pytest.approx(0)
    assert frontier.gap(frontier.gold[0], constant(-0.5)).value == pytest.approx(0)


def test_without_gold_the_gap_is_in_reward(frontier: Frontier) -> None:
    plain = Frontier(frontier.counts, frontier.rewards, None)
    assert plain.gap(frontier.rewards[0] + 1, constant(0.0)).value == pytest.approx(1)


def test_the_gap_s_interval_agrees_with_a_loop_that_resamples_prompts(frontier: Frontier) -> None:
    assert frontier.gold is not None
    own, log_ratios = DICE.normal(size=40), DICE.normal(loc=0.6, size=40)
    draws = (DICE.integers(40, size=40) for _ in range(4_000))
    roots = [divergence(n) ** 0.5 for n in frontier.counts]
    gaps = sorted(
        own[draw].mean() - np.interp(max(0.0, log_ratios[draw].mean()) ** 0.5, roots, frontier.gold[:, draw].mean(1))
        for draw in draws
    )
    found = frontier.gap(own, log_ratios)
    assert found.low == pytest.approx(gaps[100], abs=0.03)
    assert found.high == pytest.approx(gaps[3_899], abs=0.03)


def test_a_divergence_is_in_nats() -> None:
    assert divergence(1) == 0
    assert divergence(2) == pytest.approx(log(2) - 0.5)
    assert divergence(1_000) == pytest.approx(log(1_000) - 0.999)
