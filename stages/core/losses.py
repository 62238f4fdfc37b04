"""Losses as pure functions: tensors in, tensors out, one value per example; the caller sums and normalises."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    Args:
        policy: [pairs, 2] summed log-probabilities of (chosen, rejected) under the policy.
        reference: [pairs, 2] the same under the reference.
        beta: Strength of the implicit KL constraint.

    Returns:
        Loss [pairs] = -log sigmoid(beta * margin), and the implicit reward margin [pairs] = beta * ((pi_c - ref_c) -
        (pi_r - ref_r)).
    """
    ratios = policy - reference
    margin = beta * (ratios[:, 0] - ratios[:, 1])
    return -functional.logsigmoid(margin), margin


def bradley_terry_loss(scores: Tensor, margin: Tensor | None = None, centring: float = 0.0) -> Tensor:
    """Pairwise reward loss (Ouyang et al. 2022, arXiv 2203.02155, eq. 1), [pairs].

    Args:
        scores: [pairs, 2] of (chosen, rejected).
        margin: [pairs] taken off the difference (Touvron et al. 2023, arXiv 2307.09288, eq. 2).
        centring: Weight of (chosen + rejected)^2, which pulls scores to zero mean (Eisenstein et al. 2023, arXiv
            2312.09244, eq. 2).
    """
    difference = scores[:, 0] - scores[:, 1]
    if margin is not None:
        difference = difference - margin
    return -functional.logsigmoid(difference) + centring * scores.sum(-1).square()


def ranking_loss(scores: Tensor) -> Tensor:
    """Plackett-Luce negative log-likelihood of a ranking, best first (Luce 1959): [] for scores [k].

    With k = 2 it is the Bradley-Terry loss.
    """
    remaining = torch.logcumsumexp(scores.flip(0), 0).flip(0)
    return (remaining - scores).sum()


LOG_RATIO_LIMIT = 20.0


def clipped_policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, negated (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    Returns:
        Loss [tokens], and the probability ratio [tokens]; log-ratios are limited to +-20 so that it stays finite.
    """
    ratio = (logprobs - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages), ratio


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error, pessimistic within +-clip of the old value (as Schulman et al. coded it), [tokens]."""
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
