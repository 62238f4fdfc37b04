"""Losses against the formulas of their papers, worked out in plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from stages.core.losses import (
    apo_down_loss,
    apo_zero_loss,
    bradley_terry_loss,
    clipped_policy_loss,
    clipped_value_loss,
    hinge_loss,
    ipo_loss,
    orpo_loss,
    ranking_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def expected(name: str, chosen: float, rejected: float) -> float:
    """The formulas of the papers, with beta 0.3, a fifth of the labels wrong, and a SimPO margin of 0.7."""
    beta, wrong, gamma = 0.3, 0.2, 0.7
    margin = beta * (chosen - rejected)
    return {
        "sigmoid": -log_sigmoid(margin),
        "conservative": -(1 - wrong) * log_sigmoid(margin) - wrong * log_sigmoid(-margin),
        "robust": (-(1 - wrong) * log_sigmoid(margin) + wrong * log_sigmoid(-margin)) / (1 - 2 * wrong),
        "hinge": max(0.0, 1 - margin),
        "ipo": (chosen - rejected - 1 / (2 * beta)) ** 2,
        "simpo": -log_sigmoid(margin - gamma),
        "orpo": -beta * log_sigmoid(log_odds(chosen) - log_odds(rejected)),
        "apo_zero": 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected),
        "apo_down": sigmoid(beta * chosen) + 1 - sigmoid(margin),
    }[name]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(logprob: float) -> float:
    chance = math.exp(logprob)
    return math.log(chance / (1 - chance))


PREFERENCES = {
    "sigmoid": lambda pairs: sigmoid_loss(pairs, 0.3, 0.0),
    "conservative": lambda pairs: sigmoid_loss(pairs, 0.3, 0.2),
    "robust": lambda pairs: robust_loss(pairs, 0.3, 0.2),
    "hinge": lambda pairs: hinge_loss(pairs, 0.3),
    "ipo": lambda pairs: ipo_loss(pairs, 0.3),
    "simpo": lambda pairs: simpo_loss(pairs, 0.3, 0.7),
    "orpo": lambda pairs: orpo_loss(pairs, 0.3),
    "apo_zero": lambda pairs: apo_zero_loss(pairs, 0.3),
    "apo_down": lambda pairs: apo_down_loss(pairs, 0.3),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_preference_loss_is_its_formula(name: str) -> None:
    pairs = [[-3.0, -5.0], [-9.0, -2.0], [-0.01, -0.5], [-2.0, -2.0], [-0.5, -8.0]]
    for loss, pair in zip(PREFERENCES[name](torch.tensor(pairs)).tolist(), pairs, strict=True):
        assert loss == pytest.approx(expected(name, *pair), rel=1e-5, abs=1e-6)


def test_dpo_without_a_difference_is_ln_2() -> None:
    assert sigmoid_loss(torch.zeros(1, 2), 0.7, 0.0).item() == pytest.approx(math.log(2), abs=1e-7)


def test_dpo_pushes_the_chosen_up_and_the_rejected_down_equally() -> None:
    ratios = torch.tensor([[-1.0, 2.0]], requires_grad=True)
    sigmoid_loss(ratios, 0.5, 0.0).sum().backward()
    chosen, rejected = ratios.grad[0].tolist()
    assert chosen < 0 < rejected
    assert chosen == -rejected


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45])
def test_label_smoothing_settles_where_the_model_is_as_sure_as_the_labels(share: float) -> None:
    margin = torch.tensor(math.log((1 - share) / share) / 0.3, dtype=torch.float64, requires_grad=True)
    sigmoid_loss(torch.stack([margin, torch.zeros_like(margin)])[None], 0.3, share).sum().backward()
    assert margin.grad.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45])
def test_the_robust_loss_of_flipped_labels_is_on_average_the_loss_of_the_true_ones(share: float) -> None:
    pairs = torch.randn(50, 2, dtype=torch.float64)
    noisy = (1 - share) * robust_loss(pairs, 0.3, share) + share * robust_loss(pairs.flip(1), 0.3, share)
    assert torch.allclose(noisy, sigmoid_loss(pairs, 0.3, 0.0))


def test_ipo_is_least_at_a_margin_of_half_of_1_over_beta() -> None:
    margins = torch.linspace(0, 10, 1001)
    losses = ipo_loss(torch.stack([margins, torch.zeros_like(margins)], 1), 0.1)
    assert margins[losses.argmin()].item() == pytest.approx(5)


@pytest.mark.parametrize("margin", [None, 0.75])
@pytest.mark.parametrize("centring", [0.0, 0.1])
def test_the_pairwise_loss_is_its_formula(margin: float | None, centring: float) -> None:
    pairs = [[1.5, -0.5], [-2.0, 0.25]]
    given = None if margin is None else torch.full((2,), margin)
    losses = bradley_terry_loss(torch.tensor(pairs), given, centring)
    for loss, (chosen, rejected) in zip(losses.tolist(), pairs, strict=True):
        expected = -log_sigmoid(chosen - rejected - (margin or 0)) + centring * (chosen + rejected) ** 2
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_ranking_of_two_is_the_pairwise_loss() -> None:
    scores = torch.randn(20, 2, dtype=torch.float64)
    pairwise = bradley_terry_loss(scores)
    assert torch.allclose(torch.stack([ranking_loss(each) for each in scores]), pairwise)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_ranking_is_drawn_best_first_without_replacement(count: int) -> None:
    scores = torch.randn(count, dtype=torch.float64)
    chance = 1.0
    weights = [math.exp(score) for score in scores.tolist()]
    for place in range(count):
        chance *= weights[place] / sum(weights[place:])
    assert math.exp(-ranking_loss(scores).item()) == pytest.approx(chance)


def test_the_chances_of_all_rankings_add_up_to_1() -> None:
    scores = torch.randn(4, dtype=torch.float64)
    chances = [math.exp(-ranking_loss(scores[list(order)]).item()) for order in itertools.permutations(range(4))]
    assert sum(chances) == pytest.approx(1)


def test_several_rankings_have_each_its_own_loss() -> None:
    scores = torch.randn(6, 4, dtype=torch.float64)
    assert torch.allclose(ranking_loss(scores), torch.stack([ranking_loss(each) for each in scores]))


def test_the_chance_of_a_ranking_is_that_of_its_scores_with_gumbel_noise_in_order() -> None:
    """Yellott 1977: scores with independent Gumbel noise come out in order with Plackett-Luce's chance."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([1.0, 0.2, -0.5])
    noise = -torch.log(torch.empty(200_000, 3).exponential_(generator=generator))
    noisy = scores + noise
    in_order = ((noisy[:, 0] > noisy[:, 1]) & (noisy[:, 1] > noisy[:, 2])).float().mean().item()
    assert math.exp(-ranking_loss(scores).item()) == pytest.approx(in_order, abs=0.005)


def test_a_ranking_depends_on_differences_only() -> None:
    scores = torch.randn(4, dtype=torch.float64)
    assert ranking_loss(scores + 100).item() == pytest.approx(ranking_loss(scores).item())


@pytest.mark.parametrize("extreme", [1e4, 1e8])
def test_extreme_scores_give_finite_losses_and_gradients(extreme: float) -> None:
    scores = torch.tensor([-extreme, extreme, 0.0], requires_grad=True)
    loss = ranking_loss(scores) + bradley_terry_loss(scores[None, :2]).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("advantage", [-2.0, 0.5])
@pytest.mark.parametrize("log_ratio", [-1.0, -0.1, 0.0, 0.1, 1.0])
def test_the_policy_loss_is_the_smaller_of_clipped_and_unclipped(advantage: float, log_ratio: float) -> None:
    loss, ratio = clipped_policy_loss(
        torch.tensor([log_ratio - 3.0]), torch.tensor([-3.0]), torch.tensor([advantage]), 0.2
    )
    expected = math.exp(log_ratio)
    clipped = min(max(expected, 0.8), 1.2)
    assert ratio.item() == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(-min(expected * advantage, clipped * advantage), rel=1e-5)


@pytest.mark.parametrize(("log_ratio", "advantage", "moves"), [
    (0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False), (0.0, 1.0, True),
])  # fmt: skip
def test_only_a_ratio_that_went_too_far_the_right_way_has_no_gradient(
    log_ratio: float, advantage: float, moves: bool
) -> None:
    logprobs = torch.tensor([log_ratio], requires_grad=True)
    clipped_policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), 0.2)[0].sum().backward()
    assert bool(logprobs.grad) == moves


@pytest.mark.parametrize("log_ratio", [-1e6, -1e3, 1e3, 1e6, math.inf, -math.inf])
def test_a_ratio_stays_finite_at_any_log_ratio(log_ratio: float) -> None:
    for advantage in (-1.0, 1.0):
        loss, ratio = clipped_policy_loss(torch.tensor([log_ratio]), torch.zeros(1), torch.tensor([advantage]), 0.2)
        assert torch.isfinite(ratio).all()
        assert torch.isfinite(loss).all()
        assert (ratio > 0).all()


def test_at_ratio_1_the_gradient_is_that_of_the_policy_gradient() -> None:
    logprobs, advantages = torch.randn(6, requires_grad=True), torch.randn(6)
    losses, ratio = clipped_policy_loss(logprobs, logprobs.detach(), advantages, 0.2)
    losses.sum().backward()
    assert torch.equal(ratio, torch.ones(6))
    assert torch.allclose(logprobs.grad, -advantages)


def test_inside_the_clip_the_value_loss_is_half_the_squared_error() -> None:
    old, returns = torch.randn(30), torch.randn(30)
    values = old + torch.empty(30).uniform_(-0.19, 0.19)
    found = clipped_value_loss(values, old, returns, 0.2)
    assert torch.allclose(found, 0.5 * (values - returns).square(), atol=1e-5)


def test_outside_the_clip_the_value_loss_is_the_larger_error() -> None:
    values, old, returns = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])
    found = clipped_value_loss(values, old, returns, 0.25)
    assert found.tolist() == [0.5 * (0.25 - 1.0) ** 2, 0.5]


def test_the_clipped_value_loss_is_never_below_the_unclipped_one() -> None:
    values, old, returns = torch.randn(3, 50)
    assert (clipped_value_loss(values, old, returns, 0.2) >= 0.5 * (values - returns).square()).all()


@pytest.mark.parametrize("advantage", [-2.0, -0.3, 0.3, 2.0])
@pytest.mark.parametrize("log_ratio", [-2.0, -0.1, 0.0, 0.5, 1.0, 3.0])
def test_the_dual_clip_bounds_the_loss_of_what_was_worse_than_expected_and_nothing_else(
    advantage: float, log_ratio: float
) -> None:
    given = torch.tensor([log_ratio]), torch.zeros(1), torch.tensor([advantage]), 0.2
    (plain, _), (bounded, _) = clipped_policy_loss(*given), clipped_policy_loss(*given, dual_clip=3.0)
    expected = min(plain.item(), -3.0 * advantage) if advantage < 0 else plain.item()
    assert bounded.item() == pytest.approx(expected)


def test_beyond_the_dual_clip_nothing_is_learnt() -> None:
    logprobs = torch.tensor([2.0], requires_grad=True)
    clipped_policy_loss(logprobs, torch.zeros(1), torch.tensor([-1.0]), 0.2, dual_clip=3.0)[0].sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == 0.0
