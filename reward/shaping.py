"""From scores to advantages: pure functions on padded [rows, tokens] tensors with a mask of real tokens.

Rows are right-padded: the mask is True up to a row's last token. Padding never changes a result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores: Tensor, log_ratios: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Reward of every token: minus the KL coefficient times its log-ratio, plus the score on the last token.

    Args:
        scores: [rows] one score per response.
        log_ratios: [rows, tokens] log pi - log pi_ref of each token (the k1 estimator of the KL divergence).
        mask: [rows, tokens].
        kl_coefficient: Weight of the penalty (Ziegler et al. 2019, arXiv 1909.08593, eq. 2).
    """
    rewards = -kl_coefficient * log_ratios * mask
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
