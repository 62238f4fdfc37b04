"""What responses are worth: a reward model's score, what rules say, or their weighted sum, made comparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from data.batch import TreeBatch
from data.tree import Tree
from pipeline.config import Rewarded, Rounds
from reward.mixture import RuleMixture
from stages.core.rl.sampling import Rollout
from stages.core.roles import REWARD, Roles


@dataclass
class Scale:
    """What is taken off rewards and what they are divided by.

    Attributes:
        mean: Taken off first.
        deviation: Divided by.
    """

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, rewards: Tensor, settings: Rounds) -> Scale:
        """As the settings ask for, from rewards [n] of responses of the policy before its first update (Ziegler et al.
        2019, arXiv 1909.08593, section 2.2, set both before training, too)."""
        if settings.reward_normalisation == "none":
            return cls()
        mean = rewards.mean().item()
        if settings.reward_normalisation == "mean":
            return cls(mean)
        # Of equal rewards there is nothing to scale; the preflight refuses them.
        return cls(mean, rewards.std(unbiased=False).item() or 1.0)

    def scaled(self, rewards: Tensor) -> Tensor:
        """Rewards [n] on this scale."""
        return (rewards - self.mean) / self.deviation

    def scores(self, rewards: Tensor, ended: Tensor, lengths: Tensor, settings: Rounds) -> Tensor:
        """Scores of responses: rewards on this scale, clipped, less the penalties; all [n]."""
        scaled = self.scaled(rewards)
        if settings.reward_clip is not None:
            scaled = scaled.clamp(-settings.reward_clip, settings.reward_clip)
        return scaled - settings.missing_eos_penalty * ~ended - settings.length_penalty * lengths


class Rewards:
    """The rewards of a stage: of the rules, response by response, and of the reward model, batch by batch."""

    def __init__(self, roles: Roles, settings: Rewarded) -> None:
        self._roles, self._weight = roles, settings.reward_weight
        self._rules = RuleMixture(settings.rules) if settings.rules else None
        self.has_model = settings.reward is not None

    def of_rules(self, rollout: Rollout) -> list[float]:
        """The rules' weighted sum for each response of a rollout; zeros without rules.

        Raises:
            DataError: A rule needs what a prompt's row has not.
            ServerError: A reward server is out of reach or breaks the protocol.
        """
        if self._rules is None:
            return [0.0] * len(rollout.samples)
        texts = rollout.texts(self._roles.base.template)
        return self._rules.scores([each.row for each in rollout.repeated], texts)

    def of_model(self, batch: TreeBatch, states: Tensor) -> Tensor:
        """The reward model's weighted scores [branches], from the final hidden states of its role.

        Equal responses to a prompt have one score: in bfloat16, rounding sets them apart by up to 0.02, and learning
        from differences would take that for a preference.
        """
        scores: Tensor = self._roles.heads[REWARD](states.index_select(0, batch.ends))
        return self._weight * scores[first_of_equals(batch.trees)]


def first_of_equals(trees: Sequence[Tree]) -> list[int]:
    """For each branch of the trees, the number of the first branch of its tree with the same tokens."""
    numbers: list[int] = []
    for tree in trees:
        firsts: dict[tuple[int, ...], int] = {}
        for branch in tree.branches:
            numbers.append(firsts.setdefault(branch.tokens, len(numbers)))
    return numbers
