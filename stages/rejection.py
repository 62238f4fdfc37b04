"""Rejection sampling (RAFT, Dong et al. 2023, arXiv 2304.06767): fine-tune the policy on the best of its own responses.

Each round samples several responses to each prompt, keeps the best by their score, and takes one step of supervised
fine-tuning on them: the mean negative log-likelihood of their tokens. What best-of-n sampling does at a cost for every
answer, the policy learns once. Prompts whose responses all have the same score teach nothing and are left out. Left out
as well: a penalty for leaving the reference, thresholds of the score, and responses of earlier rounds.

    python -m stages.rejection CONFIG [key=value ...]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from torch import Tensor

from data.batch import Layout
from data.tree import Tree
from pipeline.config import RejectionSettings
from pipeline.contract import Context, Result
from stages.core import device, loop, optim
from stages.core.checkpoint import State
from stages.core.rl.experience import Experience, in_order
from stages.core.rl.opening import open_roles
from stages.core.rl.preflight import Check
from stages.core.rl.sampling import Rollout
from stages.core.rl.training import train
from stages.core.rl.trunk import Trunk
from stages.core.roles import POLICY, Roles
from stages.core.scoring import negative_mean


def run(context: Context) -> Result:
    """Train the policy; its adapter is the result.

    Raises:
        DataError: There is no prompt, or a rule misses what it needs.
        ArtifactError: The policy or the reward model is damaged, or they sit on different bases.
        NumericalError: The preflight failed, or a loss or gradient is not finite.
    """
    settings, compute = context.settings, device.choose(context.device, context.dtype)
    optim.require_support(settings.optimizer, compute.device)
    loop.seed_everything(context.seed)
    roles = open_roles(context.inputs["policy"], context.inputs.get("reward"), settings, compute)

    def learner(layout: Layout, trunk: Trunk) -> BestOfN:
        return BestOfN(roles, settings, layout)

    return train(context, roles, learner)


class BestOfN:
    """Learns the best responses to each prompt."""

    minibatches = 1

    def __init__(self, roles: Roles, settings: RejectionSettings, layout: Layout) -> None:
        self._roles, self._settings = roles, settings
        self._objective = negative_mean(roles.base, settings.tokens_per_batch, layout)
        self.policy = loop.Updater(roles.parameters(POLICY), settings.optimizer, settings.steps)

    def prepare(self, experiences: Sequence[Experience]) -> None:
        """There is nothing to estimate."""

    def checks(self, experiences: Sequence[Experience]) -> Iterator[Check]:
        """There is nothing to check beyond what all stages do."""
        return iter(())

    def learn(
        self, rollout: Rollout, groups: Sequence[Sequence[Experience]], number: int, order: Random
    ) -> dict[str, float]:
        """One step on the best responses; `kept` is the share of responses that were learnt from."""
        (experiences,) = groups
        scores = in_order(rollout, experiences, "scores")
        chosen = best_of(rollout.trees(), scores, self._settings.keep)
        if not chosen:
            return {"tokens": 0.0, "kept": 0.0}
        with self._roles.use(POLICY):
            figures = self.policy.step(self._objective(chosen))
        return figures | {"kept": len(chosen) * self._settings.keep / len(rollout.samples)}

    def state(self) -> State:
        """The policy and its optimizer."""
        return self.policy.state()

    def load_state(self, state: State) -> None:
        """Go on from such a state."""
        self.policy.load_state(state)


def best_of(trees: Sequence[Tree], scores: Tensor, keep: int) -> list[Tree]:
    """Each tree with its best branches alone, best first; trees whose scores [trees, n] are all equal are left out."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :keep].tolist()
    return [
        Tree(tree.prompt, tuple(tree.branches[place] for place in best), tree.number)
        for tree, best, own in zip(trees, order, scores, strict=True)
        if own.min() < own.max()
    ]


if __name__ == "__main__":
    from pipeline.launch import main

    main("rejection")
