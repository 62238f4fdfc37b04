"""From scores to advantages: pure functions on padded [rows, tokens] tensors with a mask of real tokens.

Rows are right-padded: the mask is True up to a row's last token. Padding never changes a result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratios: log_ratios,
    "k2": lambda log_ratios: log_ratios.square() / 2,
    "k3": lambda log_ratios: torch.expm1(-log_ratios) + log_ratios,
}
"""Estimators of KL(pi || pi_ref) from log pi - log pi_ref of tokens that pi sampled (Schulman 2020,
joschu.net/blog/kl-approx.html): k1 is unbiased and may be negative, k2 is biased, k3 is unbiased and never negative. As
a loss, k2 has the gradient of the divergence, k3 that of KL(pi_ref || pi) near equality, and k1 one of mean zero."""


def token_rewards(scores: Tensor, divergences: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Reward of every token: minus the KL coefficient times its divergence, plus the score on the last token.

    Args:
        scores: [rows] one score per response.
        divergences: [rows, tokens] an estimate of each token's divergence from the reference (`ESTIMATORS`).
        mask: [rows, tokens].
        kl_coefficient: Weight of the penalty (Ziegler et al. 2019, arXiv 1909.08593, eq. 2).
    """
    rewards = -kl_coefficient * divergences * mask
    last = mask.sum(1) - 1
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, decay: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2015, arXiv 1506.02438, eq. 16), [rows, tokens].

    The value after a row's last token is zero, whether it ended its turn or was cut off: a cut-off response is
    a finished (and penalised) one here.

    Args:
        rewards: [rows, tokens].
        values: [rows, tokens] value of the state before each token.
        mask: [rows, tokens].
        discount: gamma.
        decay: lambda.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for token in reversed(range(rewards.shape[1])):
        real = mask[:, token]
        surprise = rewards[:, token] + discount * next_value - values[:, token]
        following = torch.where(real, surprise + discount * decay * following, torch.zeros_like(following))
        next_value = torch.where(real, values[:, token], torch.zeros_like(next_value))
        advantages[:, token] = following
    return advantages


def leave_one_out(rewards: Tensor) -> Tensor:
    """Each response's reward less the mean of the other responses' to its prompt (RLOO, Kool et al. 2019; Ahmadian et
    al. 2024, arXiv 2402.14740, eq. 8): [prompts, n] -> [prompts, n], for n of 2 or more."""
    count = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * count / (count - 1)


def group_normalized(rewards: Tensor) -> Tensor:
    """Each response's reward in standard deviations from the mean of its prompt's responses (GRPO, Shao et al. 2024,
    arXiv 2402.03300, section 4.1.2): [prompts, n] -> [prompts, n]; nearly zero where rewards differ by rounding."""
    deviation = rewards.std(1, keepdim=True, unbiased=False)
    return (rewards - rewards.mean(1, keepdim=True)) / (deviation + 1e-4)


def adapted_kl_coefficient(coefficient: float, divergence: float, target: float, responses: int, horizon: int) -> float:
    """The KL coefficient after a round of a proportional controller (Ziegler et al. 2019, arXiv 1909.08593, eq. 3):

        coefficient * (1 + clip(divergence / target - 1, -0.2, 0.2) * responses / horizon)

    Args:
        coefficient: Before.
        divergence: From the reference in nats a response, as measured in the round.
        target: In nats a response.
        responses: Of the round.
        horizon: Responses in which a persistent error of 20% or more changes the coefficient by about 20%.
    """
    error = min(0.2, max(-0.2, divergence / target - 1))
    return coefficient * (1 + error * responses / horizon)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale masked values to mean 0 and variance 1 over all rows; zero where masked."""
    real = values[mask]
    if len(real) < 2:
        return torch.zeros_like(values)
    mean, variance = real.mean(), real.var(unbiased=False)
    return torch.where(mask, (values - mean) * torch.rsqrt(variance + 1e-8), torch.zeros_like(values))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 is perfect, 0 no better than a constant."""
    real, predicted = returns[mask], values[mask]
    variance = real.var(unbiased=False)
    if variance == 0:
        return 0.0
    return float(1 - (real - predicted).var(unbiased=False) / variance)
