"""Losses against the formulas of their papers, worked out in plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from stages.core.losses import (
    bradley_terry_loss,
    clipped_policy_loss,
    clipped_value_loss,
    dpo_loss,
    ranking_loss,
)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_dpo_is_minus_log_sigmoid_of_the_scaled_margin() -> None:
    policy, reference = [[-3.0, -5.0], [-9.0, -2.0]], [[-4.0, -4.5], [-9.5, -3.0]]
    losses, margins = dpo_loss(torch.tensor(policy), torch.tensor(reference), 0.3)
    for loss, margin, (chosen, rejected), (old_chosen, old_rejected) in zip(
        losses.tolist(), margins.tolist(), policy, reference, strict=True
    ):
        expected = 0.3 * ((chosen - old_chosen) - (rejected - old_rejected))
        assert margin == pytest.approx(expected, rel=1e-5)
        assert loss == pytest.approx(-log_sigmoid(expected), rel=1e-5)


def test_dpo_without_a_difference_is_ln_2() -> None:
    logprobs = torch.tensor([[-3.0, -5.0]])
    loss, margin = dpo_loss(logprobs, logprobs, 0.7)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert margin.item() == 0.0


def test_dpo_pushes_the_chosen_up_and_the_rejected_down_equally() -> None:
    policy = torch.tensor([[-3.0, -5.0]], requires_grad=True)
    dpo_loss(policy, torch.tensor([[-2.0, -7.0]]), 0.5)[0].sum().backward()
    chosen, rejected = policy.grad[0].tolist()
    assert chosen < 0 < rejected
    assert chosen == -rejected


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
