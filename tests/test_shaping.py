"""From scores to advantages, against loops over rows and tokens."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from reward.shaping import (
    ESTIMATORS,
    adapted_kl_coefficient,
    explained_variance,
    generalized_advantages,
    group_normalized,
    leave_one_out,
    token_rewards,
    whiten,
)


def ragged(seed: int, rows: int = 7, longest: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Random rewards, values and a mask of rows of lengths 1 to `longest`, with rubbish in the padding."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [1, longest, *(chance.randint(1, longest) for _ in range(rows - 2))]
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    rewards, values = (torch.randn(rows, longest, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards * mask, values, mask


def slow_advantages(rewards: list[float], values: list[float], discount: float, decay: float) -> list[float]:
    """The sum of the paper, term by term."""
    following = [*values[1:], 0.0]
    surprises = [r + discount * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [
        sum((discount * decay) ** ahead * surprises[start + ahead] for ahead in range(len(values) - start))
        for start in range(len(values))
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_those_of_a_loop_over_each_row(seed: int, discount: float, decay: float) -> None:
    rewards, values, mask = ragged(seed)
    found = generalized_advantages(rewards, values, mask, discount, decay)
    for row in range(len(mask)):
        real = mask[row]
        slow = slow_advantages(rewards[row][real].tolist(), values[row][real].tolist(), discount, decay)
        assert found[row][real].tolist() == pytest.approx(slow)
        assert not found[row][~real].any()


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_with_lambda_1_an_advantage_is_the_return_minus_the_value(discount: float) -> None:
    rewards, values, mask = ragged(3)
    found = generalized_advantages(rewards, values, mask, discount, 1.0)
    for row in range(len(mask)):
        length = int(mask[row].sum())
        for start in range(length):
            gained = sum(discount**ahead * rewards[row, start + ahead].item() for ahead in range(length - start))
            assert found[row, start].item() == pytest.approx(gained - values[row, start].item())


def test_with_lambda_0_an_advantage_is_one_step_of_surprise() -> None:
    rewards, values, mask = ragged(4)
    found = generalized_advantages(rewards, values, mask, 0.9, 0.0)
    following = torch.cat([(values * mask)[:, 1:], torch.zeros(len(mask), 1)], dim=1)
    assert torch.allclose(found[mask], (rewards + 0.9 * following - values)[mask])


def test_padding_changes_nothing() -> None:
    rewards, values, mask = ragged(5)
    wider = [
        torch.cat([each, torch.full((len(mask), 4), fill)], dim=1) for each, fill in ((rewards, 9.0), (values, 7.0))
    ]
    wide_mask = torch.cat([mask, torch.zeros(len(mask), 4, dtype=torch.bool)], dim=1)
    narrow = generalized_advantages(rewards, values, mask, 0.97, 0.9)
    wide = generalized_advantages(*wider, wide_mask, 0.97, 0.9)
    assert torch.equal(wide[:, : narrow.shape[1]], narrow)
    assert not wide[:, narrow.shape[1] :].any()
    scores = torch.randn(len(mask), dtype=torch.float64)
    paid = token_rewards(scores, rewards, mask, 0.1)
    assert torch.equal(token_rewards(scores, wider[0], wide_mask, 0.1)[:, : paid.shape[1]], paid)
    assert torch.equal(whiten(wider[1], wide_mask)[:, : values.shape[1]], whiten(values, mask))
    assert explained_variance(wider[1], wider[0], wide_mask) == explained_variance(values, rewards, mask)


def test_the_score_lands_on_the_last_token_and_nowhere_else() -> None:
    _, _, mask = ragged(6)
    scores = torch.arange(1.0, len(mask) + 1)
    paid = token_rewards(scores, torch.zeros_like(mask, dtype=torch.float32), mask, 0.5)
    for row in range(len(mask)):
        expected = [0.0] * mask.shape[1]
        expected[int(mask[row].sum()) - 1] = scores[row].item()
        assert paid[row].tolist() == expected


def test_the_penalty_is_the_coefficient_times_the_log_ratio() -> None:
    log_ratios, _, mask = ragged(7)
    paid = token_rewards(torch.zeros(len(mask), dtype=torch.float64), log_ratios, mask, 0.2)
    assert torch.allclose(paid, -0.2 * log_ratios * mask)


def test_a_response_gets_its_score_less_the_penalty_of_its_whole_log_ratio() -> None:
    log_ratios, _, mask = ragged(8)
    scores = torch.randn(len(mask), dtype=torch.float64)
    paid = token_rewards(scores, log_ratios, mask, 0.3)
    assert torch.allclose(paid.sum(1), scores - 0.3 * (log_ratios * mask).sum(1))


@pytest.mark.parametrize("seed", range(3))
def test_whitened_values_have_mean_0_and_variance_1_where_real(seed: int) -> None:
    _, values, mask = ragged(seed)
    found = whiten(values * 40 + 100, mask)
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-9)
    assert found[mask].var(unbiased=False).item() == pytest.approx(1)
    assert not found[~mask].any()


def test_whitening_keeps_the_order() -> None:
    _, values, mask = ragged(9)
    assert torch.equal(whiten(values, mask)[mask].argsort(), values[mask].argsort())


@pytest.mark.parametrize("values", [[[2.0, 2.0, 2.0]], [[5.0]]])
def test_equal_values_whiten_to_zero(values: list[list[float]]) -> None:
    tensor = torch.tensor(values)
    assert not whiten(tensor, torch.ones_like(tensor, dtype=torch.bool)).any()


def test_perfect_values_explain_everything() -> None:
    _, values, mask = ragged(10)
    assert explained_variance(values, values, mask) == 1.0


def test_a_constant_explains_nothing_and_an_opposite_less_than_nothing() -> None:
    returns, _, mask = ragged(11)
    assert explained_variance(torch.full_like(returns, 3.0), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)


def test_constant_returns_have_no_variance_to_explain() -> None:
    values, _, mask = ragged(12)
    assert explained_variance(values, torch.ones_like(values), mask) == 0.0


def chances(seed: int, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, size, generator=generator, dtype=torch.float64)
    first, second = logits.log_softmax(1)
    return first, second


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_the_divergence_on_average(seed: int, estimator: str) -> None:
    policy, reference = chances(seed)
    exact = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * ESTIMATORS[estimator](policy - reference)).sum().item() == pytest.approx(exact.item())


@pytest.mark.parametrize("ratio", [-3.0, -0.1, 0.0, 0.1, 3.0])
def test_k2_and_k3_are_never_negative_and_zero_without_a_difference(ratio: float) -> None:
    for name in ("k2", "k3"):
        found = ESTIMATORS[name](torch.tensor(ratio, dtype=torch.float64)).item()
        assert found >= 0
        assert (found == 0) == (ratio == 0)


@pytest.mark.parametrize("seed", range(3))
def test_as_a_loss_k2_has_the_gradient_of_the_divergence_and_k1_none(seed: int) -> None:
    policy, reference = chances(seed)
    logits = policy.clone().requires_grad_()
    logs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logs.exp() * (logs - reference)).sum(), logits)
    found = {}
    for name in ("k1", "k2"):
        logs = logits.log_softmax(0)
        average = (logs.exp().detach() * ESTIMATORS[name](logs - reference)).sum()
        (found[name],) = torch.autograd.grad(average, logits)
    assert torch.allclose(found["k2"], exact)
    assert torch.allclose(found["k1"], torch.zeros_like(exact), atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_response_is_compared_with_the_mean_of_the_others(seed: int) -> None:
    rewards = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = leave_one_out(rewards)
    for prompt in range(4):
        for mine in range(5):
            others = [rewards[prompt, place].item() for place in range(5) if place != mine]
            assert found[prompt, mine].item() == pytest.approx(rewards[prompt, mine].item() - sum(others) / 4)


def test_a_group_is_normalised_by_its_own_deviation_and_an_even_one_teaches_nothing() -> None:
    rewards = torch.tensor([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 2.0, 2.0]])
    found = group_normalized(rewards)
    assert found[0].mean().item() == pytest.approx(0, abs=1e-6)
    assert found[0].std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert not found[1].any()
    assert group_normalized(torch.tensor([[0.5, 0.5 + 3e-7, 0.5]])).abs().max() < 0.01


def test_the_kl_coefficient_is_that_of_the_closed_form_over_three_rounds() -> None:
    coefficient = 0.1
    for divergence in (9.0, 6.3, 1.0):
        coefficient = adapted_kl_coefficient(coefficient, divergence, 6.0, 64, 1000)
    assert coefficient == pytest.approx(0.1 * (1 + 0.2 * 0.064) * (1 + 0.05 * 0.064) * (1 - 0.2 * 0.064))


def test_the_kl_coefficient_rises_with_the_divergence_and_stays_at_the_target() -> None:
    found = [adapted_kl_coefficient(0.1, divergence, 6.0, 64, 1000) for divergence in (0.0, 5.0, 5.9, 6.0, 6.1, 7.0)]
    assert found == sorted(found)
    assert found[3] == 0.1
