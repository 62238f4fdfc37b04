"""One minibatch's losses: the clipped policy loss, the clipped value loss, and both in one pass.

Losses are normalised by the tokens of the whole minibatch, and each pass happens under the role that it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pipeline.config import PpoSettings
from reward import shaping
from stages.core.likelihood import logprobs_of
from stages.core.loop import Part
from stages.core.losses import clipped_policy_loss, clipped_value_loss
from stages.core.rl.experience import Experience, state_values
from stages.core.rl.trunk import Trunk
from stages.core.roles import POLICY, VALUE, Roles

TELLING = 256
"""Tokens that tell how far a policy has moved."""
MOVED = ("approximate_kl", "clip_fraction")

Shares = dict[str, float]
Minibatch = Sequence[Experience]
Parts = Callable[[Minibatch, float], Iterator[Part]]
"""Makes the parts of a minibatch, given the KL coefficient."""


class Losses:
    """The losses of a stage.

    Args:
        roles: The base with its roles.
        settings: The stage's.
        trunk: The layers that all roles share.
    """

    def __init__(self, roles: Roles, settings: PpoSettings, trunk: Trunk) -> None:
        self._roles, self._settings, self._trunk = roles, settings, trunk
        self._largest_ratio = 0.0

    def take_largest_ratio(self) -> float:
        """The largest probability ratio of a token since this was last asked."""
        found, self._largest_ratio = self._largest_ratio, 0.0
        return found

    def policy(self, group: Minibatch, kl_coefficient: float) -> Iterator[Part]:
        """The policy's loss. Shares of its parts add up to:

        ratio: mean probability ratio to the policy that sampled.
        approximate_kl: mean of r - 1 - log r, the k3 estimate of the divergence from that policy, nats a token.
        clip_fraction: share of ratios beyond the clipping.
        """
        total = _tokens(group)
        for each in group:
            with self._roles.use(POLICY):  # the backward pass too
                states = self._states(each)
                loss, shares = self._policy_loss(each, states, total, kl_coefficient)
                yield Part(loss, shares, each.batch.token_count)

    def value(self, group: Minibatch) -> Iterator[Part]:
        """The loss of the value function alone; `value_clip_fraction` is the share of values beyond the clipping."""
        total = _tokens(group)
        for each in group:
            if self._settings.value == "head":
                with self._roles.use(POLICY), torch.no_grad():
                    states = self._states(each)
                values = self._roles.heads[VALUE](states)
                yield Part(*self._value_loss(each, values, total), tokens=each.batch.token_count)
                continue
            with self._roles.use(VALUE):
                values = state_values(self._roles, each.batch, self._trunk, each.below)
                yield Part(*self._value_loss(each, values, total), tokens=each.batch.token_count)

    def joint(self, group: Minibatch, kl_coefficient: float) -> Iterator[Part]:
        """The policy's loss and, weighted, that of a value head on its states, in one pass."""
        total = _tokens(group)
        for each in group:
            with self._roles.use(POLICY):
                states = self._states(each)
                loss, shares = self._policy_loss(each, states, total, kl_coefficient)
                of_value, more = self._value_loss(each, self._roles.heads[VALUE](states), total)
                shares |= more | {"policy_loss": loss.item(), "value_loss": of_value.item()}
                yield Part(loss + self._settings.value_weight * of_value, shares, each.batch.token_count)

    @torch.no_grad()
    def moved(self, experiences: Minibatch) -> Shares:
        """How far the policy is from the one that sampled, in one batch of the rollout.

        Returns:
            approximate_kl and clip_fraction as of `policy`, and the tokens that were computed.
        """
        chosen = _telling(experiences)
        with self._roles.use(POLICY):
            _, shares = self._policy_loss(chosen, self._states(chosen), len(chosen.logprobs), 0.0)
        return {name: shares[name] for name in MOVED} | {"tokens": float(chosen.batch.token_count)}

    def _states(self, experience: Experience) -> Tensor:
        with self._roles.base.compute.autocast():
            return self._trunk.resumed(experience.batch, experience.below).index_select(0, experience.batch.sources)

    def _policy_loss(
        self, experience: Experience, states: Tensor, total: int, kl_coefficient: float
    ) -> tuple[Tensor, Shares]:
        settings, base = self._settings, self._roles.base
        with base.compute.autocast():
            logprobs = logprobs_of(base.model, states, experience.batch.targets, settings.temperature)
        losses, ratio = clipped_policy_loss(
            logprobs, experience.logprobs, experience.advantages, settings.clip, settings.dual_clip
        )
        if settings.kl_in == "loss":
            divergences = shaping.ESTIMATORS[settings.kl_estimator](logprobs - experience.reference)
            losses = losses + kl_coefficient * divergences
        seen = ratio.detach()
        self._largest_ratio = max(self._largest_ratio, seen.max().item())
        return losses.sum() / total, {
            "ratio": seen.sum().item() / total,
            "approximate_kl": (seen - 1 - seen.log()).sum().item() / total,
            "clip_fraction": ((seen - 1).abs() > settings.clip).sum().item() / total,
        }

    def _value_loss(self, experience: Experience, values: Tensor, total: int) -> tuple[Tensor, Shares]:
        clip = self._settings.value_clip
        losses = clipped_value_loss(values, experience.values, experience.returns, clip)
        beyond = (values.detach() - experience.values).abs() > clip
        return losses.sum() / total, {"value_clip_fraction": beyond.sum().item() / total}


def _telling(experiences: Minibatch) -> Experience:
    """The smallest batch with enough tokens to tell, since it is computed for its figures alone; or the largest."""
    enough = [each for each in experiences if len(each.logprobs) >= TELLING]
    if enough:
        return min(enough, key=lambda each: each.batch.token_count)
    return max(experiences, key=lambda each: len(each.logprobs))


def _tokens(group: Minibatch) -> int:
    return sum(len(each.logprobs) for each in group)
