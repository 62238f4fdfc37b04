"""Policy and value function with their optimizers, and what PPO, RLOO and GRPO learn from a rollout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from pipeline.config import PpoSettings
from reward import shaping
from stages.core.checkpoint import State, fill, joined
from stages.core.loop import Updater
from stages.core.rl import preflight
from stages.core.rl.experience import Experience, estimate
from stages.core.rl.preflight import Check
from stages.core.rl.rewards import Scale
from stages.core.rl.sampling import Rollout
from stages.core.rl.trunk import Trunk
from stages.core.rl.updates import Losses
from stages.core.roles import POLICY, VALUE, Roles

EPSILON = 1e-5
"""AdamW's, as in the published implementations (Huang et al. 2022, "The 37 implementation details of PPO", 3)."""
TOO_FAR = 1.5
"""Times `stop_at_kl` at which a round's updates end."""
SUMMED = ("tokens", "updates")
"""Figures that are added over a round's updates; of the others there are means."""

Group = Sequence[Experience]


class PolicyGradient:
    """Learns from rollouts by clipped policy gradients.

    Args:
        roles: The base with its roles; the value's only where a value function is trained.
        settings: The stage's.
        trunk: The layers that all roles share.

    Attributes:
        kl_coefficient: Weight of the divergence from the reference, which `adapt` may change.
        losses: What is minimised.
    """

    def __init__(self, roles: Roles, settings: PpoSettings, trunk: Trunk) -> None:
        self._settings, self.minibatches = settings, settings.minibatches
        self.losses = Losses(roles, settings, trunk)
        self.kl_coefficient = settings.kl_coefficient
        total = settings.steps * settings.updates
        of_policy = max(1, total - settings.value_warmup * settings.updates)
        self.policy = Updater(roles.parameters(POLICY), settings.optimizer, of_policy, EPSILON)
        self.value = None
        self._copied = settings.advantage == "gae" and settings.value == "adapter" and settings.reward is not None
        if settings.advantage == "gae":
            of_value = settings.optimizer.model_copy(update={"learning_rate": settings.value_learning_rate})
            self.value = Updater(roles.parameters(VALUE), of_value, total, EPSILON)
            self._head = roles.heads[VALUE]

    def begin(self, experiences: Group, scale: Scale, of_rules: float) -> None:
        """Bring values that are a reward model's to the scale of the scores, the mean of the rules' part included."""
        if not self._copied:
            return
        factor, shift = self._settings.reward_weight / scale.deviation, (of_rules - scale.mean) / scale.deviation
        self._head.rescale(factor, shift)
        for each in experiences:
            each.values = factor * each.values + shift

    def prepare(self, experiences: Group) -> None:
        """Estimate advantages."""
        estimate(experiences, self._settings, self.kl_coefficient)

    def checks(self, experiences: Group) -> Iterator[Check]:
        """That the policy which is trained is the one that sampled."""
        yield preflight.ratio(experiences, self.losses, self.kl_coefficient)

    def learn(self, rollout: Rollout, groups: Sequence[Group], number: int, order: Random) -> dict[str, float]:
        """All updates of a round: every pass takes the minibatches in another order.

        Args:
            rollout: The responses.
            groups: The experience of each minibatch.
            number: Of the round; in the first ones, the value function alone may be trained.
            order: Decides the order.

        Returns:
            Means over the updates; `ratio_first`, the mean probability ratio of the first; `ratio_max`, the largest
            ratio of a token in any update or after the last; `approximate_kl` and `clip_fraction` after the last.
        """
        warming = number < self._settings.value_warmup
        updates = list(self._updates(groups, order, warming))
        self._skip(self._settings.update_epochs * len(groups) - len(updates), warming)
        found = _summary(updates)
        if self._settings.updates == 1:
            found.pop("value_clip_fraction", None)  # the only update sees the very values that were estimated
        if not warming:
            experiences = [each for group in groups for each in group]
            self._adapt(experiences)
            found |= self._moved(experiences, found)
        return found

    @property
    def size(self) -> int:
        """About as many bytes as its state has after a round."""
        return self.policy.size + (self.value.size if self.value else 0)

    def state(self) -> State:
        """Policy, value function, their optimizers and the KL coefficient."""
        parts = {"policy": self.policy.state()}
        if self.value:
            # What centres the head is no parameter, but it was brought to another scale.
            parts |= {"value": self.value.state(), "head": State({"mean": self._head.mean})}
        return joined(parts, kl_coefficient=self.kl_coefficient)

    def load_state(self, state: State) -> None:
        """Go on from such a state."""
        self.policy.load_state(state.part("policy"))
        if self.value:
            self.value.load_state(state.part("value"))
            fill({"mean": self._head.mean}, state.part("head"))
        self.kl_coefficient = state.values["kl_coefficient"]

    def _updates(self, groups: Sequence[Group], order: Random, warming: bool) -> Iterator[dict[str, float]]:
        for _ in range(self._settings.update_epochs):
            for group in order.sample(list(groups), len(groups)):
                figures = self._update(group, warming)
                yield figures
                if self._went_too_far(figures):
                    return

    def _skip(self, updates: int, warming: bool) -> None:
        """The learning rates go on by rounds, also past updates that were left out."""
        if self.value:
            self.value.skip(updates)
        if not warming:
            self.policy.skip(updates)

    def _adapt(self, experiences: Group) -> None:
        """Move the KL coefficient towards the target, if there is one, after a round's divergence."""
        settings = self._settings
        if settings.kl_target is None:
            return
        responses = sum(each.batch.branches for each in experiences)
        divergence = sum(each.log_ratios.sum().item() for each in experiences) / responses
        self.kl_coefficient = shaping.adapted_kl_coefficient(
            self.kl_coefficient, divergence, settings.kl_target, responses, settings.kl_horizon
        )

    def _moved(self, experiences: Group, found: dict[str, float]) -> dict[str, float]:
        """What the round did to the policy: before a round's only update, it is the one that sampled."""
        moved = self.losses.moved(experiences)
        largest = max(found["ratio_max"], self.losses.take_largest_ratio())
        return moved | {"ratio_max": largest, "tokens": found["tokens"] + moved["tokens"]}

    def _update(self, group: Group, warming: bool) -> dict[str, float]:
        figures = {"updates": 1.0, "kl_coefficient": self.kl_coefficient}
        origins = [tree.origin for each in group for tree in each.batch.trees]
        if self.value is not None and self._settings.value == "head" and not warming:
            joint = self.policy.step(self.losses.joint(group, self.kl_coefficient), origins)
            # The same backward pass left the head's gradients.
            of_head = self.value.step((), origins)
            figures |= _named(joint) | {"value_gradient_norm": of_head["gradient_norm"]}
            return figures | {"ratio_max": self.losses.take_largest_ratio()}
        if not warming:
            figures |= _named(self.policy.step(self.losses.policy(group, self.kl_coefficient), origins))
            figures["ratio_max"] = self.losses.take_largest_ratio()
        if self.value is not None:
            of_value = self.value.step(self.losses.value(group), origins)
            figures |= {
                "value_loss": of_value["loss"],
                "value_gradient_norm": of_value["gradient_norm"],
                "value_clip_fraction": of_value["value_clip_fraction"],
                "tokens": figures.get("tokens", 0.0) + of_value["tokens"],
            }
        return figures

    def _went_too_far(self, figures: dict[str, float]) -> bool:
        limit = self._settings.stop_at_kl
        return limit is not None and figures.get("approximate_kl", 0.0) > TOO_FAR * limit


def _named(record: dict[str, float]) -> dict[str, float]:
    """An update's record, in which the loss is the policy's; that of a joint pass says itself what its part was."""
    return {"policy_loss": record["loss"]} | {name: value for name, value in record.items() if name != "loss"}


def _summary(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in updates for name in each)
    found = {name: sum(each.get(name, 0.0) for each in updates) for name in names}
    means = {name: value if name in SUMMED else value / len(updates) for name, value in found.items()}
    if "ratio" in names:
        means["ratio_first"] = updates[0]["ratio"]
        means["ratio_max"] = max(each["ratio_max"] for each in updates)
    return means
