"""Which of the policies on the way is handed on: the one that does best on held-out prompts.

Looking at prompts that are not trained on, with a score that is not trained against where there is one, is what shows
over-optimisation (Gao et al. 2022, arXiv 2210.10760): the reward rises and the score falls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import Rounds
from pipeline.manifest import Metric
from reward.intervals import mean_interval, paired_difference
from reward.rules import verdict
from stages.core.checkpoint import State
from stages.core.rl.experience import Collector, in_order, score
from stages.core.rl.rewards import Rewards, Scale
from stages.core.rl.sampling import Rollout
from stages.core.roles import POLICY, Roles

SURE = 2.0
"""Standard errors by which the score must have fallen from its best to be believed."""
NOTABLE = 0.02
"""Smallest fall that counts, in units of the score."""
FAR = 1.0
"""Nats of divergence that rounds may have gained since the policy was last looked at."""


@dataclass(frozen=True)
class Look:
    """The policy after some rounds, on held-out prompts.

    Attributes:
        round: Rounds it was trained for.
        scores: [prompts] mean score of a prompt's responses.
        rewards: [prompts] mean of what they are worth by themselves.
        kl: Divergence from the reference, nats a response.
        apart: Largest difference between the rewards of one prompt's responses; between prompts where each has one.
    """

    round: int
    scores: NDArray[np.float64]
    rewards: NDArray[np.float64]
    kl: float
    apart: float

    @property
    def score(self) -> float:
        """Mean over the prompts."""
        return float(self.scores.mean())

    @property
    def record(self) -> dict[str, float]:
        """For a file: the means."""
        return {"round": self.round, "score": self.score, "reward": float(self.rewards.mean()), "kl": self.kl}


class Selection:
    """Looks at held-out prompts, and keeps a copy of the policy that did best.

    Args:
        roles: The base with its roles.
        look_at: Samples responses to the held-out prompts, always with the same seed.
        rewards: What responses are worth.
        collector: Has them scored.
        settings: The stage's. Its `gold` names the rule that the policy is not trained on; where it is `none`, the
            score is what is trained for: rewards on their scale, less the penalties.
    """

    def __init__(
        self, roles: Roles, look_at: Callable[[], Rollout], rewards: Rewards, collector: Collector, settings: Rounds
    ) -> None:
        self._roles, self._look_at, self._rewards, self._collector = roles, look_at, rewards, collector
        self._settings = settings
        self.looks: list[Look] = []
        self._met = 0.0
        self.kept: dict[str, Tensor] = {}

    @property
    def best(self) -> Look:
        """The look with the highest mean score; of equal ones the first."""
        return max(self.looks, key=lambda look: look.score)

    def is_due(self, kl: float) -> bool:
        """Whether the policy has gone so far that it should be looked at, whatever the round: where a score falls, it
        does so within a few rounds, in which the divergence grows quickly.

        Rounds are compared with rounds: held-out prompts may have another divergence, and a policy that stands still
        would then be looked at for ever.

        Args:
            kl: Divergence of the round's own responses.
        """
        return kl > self._met + FAR

    def look(self, rounds: int, scale: Scale, kl: float = 0.0) -> dict[str, float]:
        """Sample, score and remember; returns the figures for the record of the round, and the `tokens` that each role
        computed.

        Args:
            rounds: That were taken so far.
            scale: That of the rewards.
            kl: Divergence of the last round's own responses.
        """
        self._met = kl
        rollout = self._look_at()
        experiences = self._collector.collect(rollout, rollout.trees(), self._rewards.of_rules(rollout))
        score(experiences, self._settings, scale)
        rewards, trained_for = (in_order(rollout, experiences, name).double() for name in ("rewards", "scores"))
        scores = trained_for.mean(1).numpy() if self._settings.gold == "none" else self._judged(rollout)
        kl = sum(each.log_ratios.sum().item() for each in experiences) / len(rollout.samples)
        groups = rewards if rollout.per_prompt > 1 else rewards.T
        apart = (groups.amax(1) - groups.amin(1)).max().item()
        self.looks.append(Look(rounds, scores, rewards.mean(1).numpy(), kl, apart))
        if self.best is self.looks[-1]:
            self.kept = {name: each.detach().clone() for name, each in self._roles.parameters(POLICY)}
        return {
            "held_out": self.looks[-1].score,
            "held_out_reward": float(self.looks[-1].rewards.mean()),
            "tokens": sum(each.batch.token_count for each in experiences),
        }

    @property
    def over_optimised(self) -> str:
        """What shows that the policy serves the reward and not the score any more; empty where nothing does."""
        best, last = self.best, self.looks[-1]
        fall = best.scores - last.scores
        error = fall.std(ddof=1) / np.sqrt(len(fall)) if len(fall) > 1 else np.inf
        rising = last.rewards.mean() > best.rewards.mean()
        if self._settings.gold == "none" or not rising or fall.mean() <= max(NOTABLE, SURE * error):
            return ""
        return (
            f"the held-out score fell by {fall.mean():.3f} from its best after round {best.round}, "
            f"while the reward rose by {last.rewards.mean() - best.rewards.mean():.3f}; "
            "the best policy is the one that is handed on"
        )

    @property
    def idle(self) -> str:
        """That nothing of what was learnt is handed on; empty where something is."""
        first, last = self.looks[0], self.looks[-1]
        if self.best is not first:
            return ""
        scores = np.concatenate([each.scores for each in self.looks])
        nothing = ", and all prompts the same every time" if scores.std() == 0.0 else ""
        gold = self._settings.gold
        judge = "the score" if gold == "none" else f"`gold: {gold}`"
        return (
            f"the policy that is handed on is the one that the stage began with: {judge} gave no later one more on "
            f"held-out prompts{nothing} ({first.score:.3f} at first, {last.score:.3f} at last)"
        )

    @property
    def size(self) -> int:
        """About as many bytes as its state has after a look."""
        return sum(each.nbytes for _, each in self._roles.parameters(POLICY))

    def state(self) -> State:
        """The looks so far and the best policy."""
        looks = [
            asdict(look) | {"scores": look.scores.tolist(), "rewards": look.rewards.tolist()} for look in self.looks
        ]
        return State(self.kept, {"looks": looks, "met": self._met})

    def load_state(self, state: State) -> None:
        """Go on from such a state."""
        device = self._roles.base.compute.device
        self.kept = {name: each.to(device) for name, each in state.tensors.items()}
        self._met = state.values["met"]
        self.looks = [
            Look(each["round"], np.array(each["scores"]), np.array(each["rewards"]), each["kl"], each["apart"])
            for each in state.values["looks"]
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Give the policy the weights that did best."""
        for name, parameter in self._roles.parameters(POLICY):
            parameter.copy_(self.kept[name])

    @property
    def metrics(self) -> dict[str, Metric]:
        """The chosen policy on the held-out prompts, and its gain over the start, prompt by prompt."""
        best, first = self.best, self.looks[0]
        return {
            "chosen_round": Metric(value=best.round),
            "held_out": mean_interval(best.scores),
            "held_out_gain": paired_difference(best.scores, first.scores),
            "held_out_reward": mean_interval(best.rewards),
            "held_out_kl": Metric(value=best.kl, n=len(best.scores)),
        }

    def _judged(self, rollout: Rollout) -> NDArray[np.float64]:
        texts = rollout.texts(self._roles.base.template)
        rows = [each.row for each in rollout.repeated]
        found = [
            verdict(self._settings.gold, row.facts, text, row.origin) for row, text in zip(rows, texts, strict=True)
        ]
        return np.array([each.reward for each in found]).reshape(-1, rollout.per_prompt).mean(1)
