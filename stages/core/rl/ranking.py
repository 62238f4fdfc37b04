"""Learners that compare the responses to a prompt with each other: which of them are learnt from, one step a round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random

from torch import Tensor

from data.tree import Tree
from pipeline.config import Rounds
from stages.core.checkpoint import State
from stages.core.loop import Objective, Updater
from stages.core.rl.experience import SAME, Experience, all_alike, in_order
from stages.core.rl.preflight import Check
from stages.core.rl.rewards import Scale
from stages.core.rl.sampling import Rollout
from stages.core.roles import POLICY, Roles

Choice = Callable[[Sequence[Tree], Tensor], list[Tree]]
"""What is learnt from trees with scores [trees, n]."""


class Ranking:
    """Takes one step a round on what is chosen by score.

    Args:
        roles: The base with its roles.
        settings: The stage's.
        objective: What is minimised over the chosen trees.
        choose: Chooses.
    """

    minibatches = 1

    def __init__(self, roles: Roles, settings: Rounds, objective: Objective, choose: Choice) -> None:
        self._roles, self._objective, self._choose = roles, objective, choose
        self.policy = Updater(roles.parameters(POLICY), settings.optimizer, settings.steps)

    def begin(self, experiences: Sequence[Experience], scale: Scale, of_rules: float) -> None:
        """Only differences of scores count."""

    def prepare(self, experiences: Sequence[Experience]) -> None:
        """There is nothing to estimate."""

    def checks(self, experiences: Sequence[Experience]) -> Iterator[Check]:
        """There is nothing to check beyond what all stages do."""
        return iter(())

    def learn(
        self, rollout: Rollout, groups: Sequence[Sequence[Experience]], number: int, order: Random
    ) -> dict[str, float]:
        """One step on what the choice leaves of the responses."""
        (experiences,) = groups
        chosen = self._choose(rollout.trees(), in_order(rollout, experiences, "scores"))
        if not chosen:
            self.policy.skip(1)
            return {"tokens": 0.0}
        with self._roles.use(POLICY):
            return self.policy.step(self._objective(chosen), [tree.origin for tree in chosen])

    @property
    def size(self) -> int:
        """About as many bytes as its state has after a round."""
        return self.policy.size

    def state(self) -> State:
        """The policy and its optimizer."""
        return self.policy.state()

    def load_state(self, state: State) -> None:
        """Go on from such a state."""
        self.policy.load_state(state)


def best_of(trees: Sequence[Tree], scores: Tensor, keep: int) -> list[Tree]:
    """Each tree with at most `keep` of its branches, best first, and none that is as bad as its worst; trees [n] of
    scores [n, branches] that tell no branch from another are left out."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :keep].tolist()
    better = (scores - scores.amin(1, keepdim=True) > SAME).tolist()
    return [
        replace(tree, branches=tuple(tree.branches[place] for place in best if above[place]))
        for tree, best, above, own in zip(trees, order, better, scores, strict=True)
        if _told_apart(tree, own)
    ]


def pairs_of(trees: Sequence[Tree], scores: Tensor) -> list[Tree]:
    """Each tree with its best branch and its worst one; trees that `best_of` leaves out are left out here, too."""
    best, worst = scores.argmax(1).tolist(), scores.argmin(1).tolist()
    return [
        replace(tree, branches=(tree.branches[first], tree.branches[last]))
        for tree, first, last, own in zip(trees, best, worst, scores, strict=True)
        if _told_apart(tree, own)
    ]


def _told_apart(tree: Tree, scores: Tensor) -> bool:
    """Whether the best branch and the worst are different responses, and not by rounding alone."""
    best, worst = (tree.branches[int(place)] for place in (scores.argmax(), scores.argmin()))
    return best.tokens != worst.tokens and not all_alike(scores[None]).item()
