"""Losses as pure functions: tensors in, tensors out, one value per example; the caller sums and normalises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import PreferenceObjective


def sigmoid_loss(ratios: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), [pairs]:

        -(1 - e) log sigmoid(beta * (r_c - r_r)) - e log sigmoid(-beta * (r_c - r_r))

    With e > 0 it is conservative DPO (Mitchell 2023, ericmitchell.ai/cdpo.pdf): the margin stops growing where the pair
    is 1 - e sure. Of ratios per token it is length-normalised DPO (Lambert et al. 2024, arXiv 2411.15124, section 5).

    Args:
        ratios: [pairs, 2] r = log pi(y | x) - log ref(y | x) of (chosen, rejected).
        beta: Strength of the implicit KL constraint.
        label_smoothing: e, the share of labels that are taken to be wrong.
    """
    margin = beta * _difference(ratios)
    return -(1 - label_smoothing) * functional.logsigmoid(margin) - label_smoothing * functional.logsigmoid(-margin)


def robust_loss(ratios: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409), [pairs]:

        (-(1 - e) log sigmoid(beta * (r_c - r_r)) + e log sigmoid(-beta * (r_c - r_r))) / (1 - 2e)

    Its mean over labels of which a share e < 1/2 was flipped is the DPO loss of the true labels.

    Args:
        ratios: As for `sigmoid_loss`.
        beta: As for `sigmoid_loss`.
        label_smoothing: e, the share of flipped labels.
    """
    margin = beta * _difference(ratios)
    kept = (1 - label_smoothing) * functional.logsigmoid(margin)
    return (label_smoothing * functional.logsigmoid(-margin) - kept) / (1 - 2 * label_smoothing)


def hinge_loss(ratios: Tensor, beta: float) -> Tensor:
    """The calibration loss of SLiC-HF (Zhao et al. 2023, arXiv 2305.10425), [pairs]:

        max(0, 1 - beta * (r_c - r_r))

    The paper's is of log-probabilities; of ratios to the reference, as here and in TRL, it is the support vector
    counterpart of DPO (Liu et al. 2023, arXiv 2309.06657). Arguments as for `sigmoid_loss`.
    """
    return functional.relu(1 - beta * _difference(ratios))


def ipo_loss(ratios: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, eq. 17), [pairs]:

        (r_c - r_r - 1 / (2 * beta))^2

    Args:
        ratios: [pairs, 2] as for `sigmoid_loss`, but per token of each response. The paper sums them, and its target of
            1 / (2 beta) nats then means less the longer responses are; TRL divides by the tokens, which the paper's
            authors confirmed (TRL pull request 1265), and so does Baton.
        beta: The paper's tau.
    """
    return (_difference(ratios) - 1 / (2 * beta)).square()


def simpo_loss(logprobs: Tensor, beta: float, gamma: float) -> Tensor:
    """Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734, eq. 6), [pairs]:

        -log sigmoid(beta * (l_c - l_r) - gamma)

    Args:
        logprobs: [pairs, 2] l = log pi(y | x) per token of (chosen, rejected).
        beta: Scale of the implicit reward beta * l.
        gamma: By how much the chosen response's reward should be larger.
    """
    return -functional.logsigmoid(beta * _difference(logprobs) - gamma)


def orpo_loss(logprobs: Tensor, beta: float) -> Tensor:
    """The odds ratio term of ORPO (Hong et al. 2024, arXiv 2403.07691, eqs. 4 and 7), [pairs]:

        -beta * log sigmoid(o_c - o_r),  o = log (p / (1 - p)),  p = exp(l)

    The whole loss (eq. 6) adds the negative log-likelihood of the chosen responses. Baton takes it over the tokens of
    the responses, as for all losses; TRL over the prompts' tokens as well.

    Args:
        logprobs: [pairs, 2] l as for `simpo_loss`.
        beta: Weight of the term, the paper's lambda.
    """
    certain = logprobs.clamp(max=-CERTAINTY)
    odds = certain - torch.log(-torch.expm1(certain))
    return -beta * functional.logsigmoid(_difference(odds))


def apo_zero_loss(ratios: Tensor, beta: float) -> Tensor:
    """Anchored preference optimisation, for chosen responses better than the model's own (D'Oosterlinck et al. 2024,
    arXiv 2408.06266, eq. 7), [pairs]:

        1 - sigmoid(beta * r_c) + sigmoid(beta * r_r)

    Arguments as for `sigmoid_loss`.
    """
    chosen, rejected = torch.sigmoid(beta * ratios).unbind(-1)
    return 1 - chosen + rejected


def apo_down_loss(ratios: Tensor, beta: float) -> Tensor:
    """Anchored preference optimisation, for chosen responses worse than the model's own (D'Oosterlinck et al. 2024,
    arXiv 2408.06266, eq. 8), [pairs]:

        sigmoid(beta * r_c) + 1 - sigmoid(beta * (r_c - r_r))

    Arguments as for `sigmoid_loss`.
    """
    return torch.sigmoid(beta * ratios[:, 0]) + 1 - torch.sigmoid(beta * _difference(ratios))


CERTAINTY = 1e-6
"""Smallest distance of a log-probability from 0 at which odds are taken."""


def _difference(pairs: Tensor) -> Tensor:
    return pairs[:, 0] - pairs[:, 1]


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss of the family, as a stage computes it.

    Attributes:
        function: Loss [pairs] of log-probabilities [pairs, 2] of (chosen, rejected) and the stage's settings.
        per_token: Whether log-probabilities are divided by the tokens of the response, rather than summed.
    """

    function: Callable[[Tensor, PreferenceObjective], Tensor]
    per_token: bool = False

    def logprobs(self, policy: Tensor, reference: Tensor | None, tokens: Tensor) -> Tensor:
        """What the loss is a function of: [pairs, 2]; times beta, it is the implicit reward.

        Args:
            policy: [pairs, 2] summed log-probabilities under the policy.
            reference: [pairs, 2] under the reference, to which the policy's are relative; None without one.
            tokens: [pairs, 2] of the responses.
        """
        relative = policy if reference is None else policy - reference
        return relative / tokens if self.per_token else relative


def _simpo(logprobs: Tensor, settings: PreferenceObjective) -> Tensor:
    assert settings.gamma is not None
    return simpo_loss(logprobs, settings.beta, settings.gamma)


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(lambda ratios, settings: sigmoid_loss(ratios, settings.beta, settings.label_smoothing)),
    "sigmoid_norm": PreferenceLoss(
        lambda ratios, settings: sigmoid_loss(ratios, settings.beta, settings.label_smoothing), per_token=True
    ),
    "robust": PreferenceLoss(lambda ratios, settings: robust_loss(ratios, settings.beta, settings.label_smoothing)),
    "hinge": PreferenceLoss(lambda ratios, settings: hinge_loss(ratios, settings.beta)),
    "ipo": PreferenceLoss(lambda ratios, settings: ipo_loss(ratios, settings.beta), per_token=True),
    "simpo": PreferenceLoss(_simpo, per_token=True),
    "orpo": PreferenceLoss(lambda logprobs, settings: orpo_loss(logprobs, settings.beta), per_token=True),
    "apo_zero": PreferenceLoss(lambda ratios, settings: apo_zero_loss(ratios, settings.beta)),
    "apo_down": PreferenceLoss(lambda ratios, settings: apo_down_loss(ratios, settings.beta)),
}
"""`PreferenceObjective.loss` -> the loss. Which of them have a reference, the settings know."""


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
    """Plackett-Luce negative log-likelihood of rankings, best first (Luce 1959): [...] for scores [..., k].

    With k = 2 it is the Bradley-Terry loss.
    """
    remaining = torch.logcumsumexp(scores.flip(-1), -1).flip(-1)
    return (remaining - scores).sum(-1)


LOG_RATIO_LIMIT = 20.0


def clipped_policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, negated (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    With `dual_clip` = c, the loss of a token of negative advantage A is at most -c A (Ye et al. 2020, arXiv 1912.09729,
    eq. 5), however far its ratio has grown.

    Returns:
        Loss [tokens], and the probability ratio [tokens]; log-ratios are limited to +-20 so that it stays finite.
    """
    ratio = (logprobs - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return losses, ratio


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error, pessimistic within +-clip of the old value (as Schulman et al. coded it), [tokens]."""
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
