"""Online DPO (Guo et al. 2024, arXiv 2402.04792): preferences between the policy's own responses, as it learns.

Each round samples several responses to each prompt; the one with the highest score is preferred to the one with the
lowest, and one step of a preference loss is taken on these pairs. Prompts whose responses all have the same score make
no pair. The reference stays the policy's start. The loss is of log-probabilities at temperature 1, whatever that of
sampling is. Left out: judges that compare two responses rather than score each, references that follow the policy, and
pairs of earlier rounds.

    python -m stages.online_dpo CONFIG [key=value ...]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from torch import Tensor

from data.batch import Layout
from data.tree import Tree
from pipeline.config import OnlineDpoSettings
from pipeline.contract import Context, Result
from stages.core import device, loop, optim
from stages.core.checkpoint import State
from stages.core.preference import objective
from stages.core.rl.experience import Experience, in_order
from stages.core.rl.opening import open_roles
from stages.core.rl.preflight import Check
from stages.core.rl.sampling import Rollout
from stages.core.rl.training import train
from stages.core.rl.trunk import Trunk
from stages.core.roles import POLICY, Roles


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

    def learner(layout: Layout, trunk: Trunk) -> OwnPairs:
        return OwnPairs(roles, settings, layout)

    return train(context, roles, learner)


class OwnPairs:
    """Learns the best response to each prompt over the worst."""

    minibatches = 1

    def __init__(self, roles: Roles, settings: OnlineDpoSettings, layout: Layout) -> None:
        self._objective = objective(roles, settings, layout)
        self.policy = loop.Updater(roles.parameters(POLICY), settings.optimizer, settings.steps)

    def prepare(self, experiences: Sequence[Experience]) -> None:
        """There is nothing to estimate."""

    def checks(self, experiences: Sequence[Experience]) -> Iterator[Check]:
        """There is nothing to check beyond what all stages do."""
        return iter(())

    def learn(
        self, rollout: Rollout, groups: Sequence[Sequence[Experience]], number: int, order: Random
    ) -> dict[str, float]:
        """One step on the pairs; `pairs` is how many there were."""
        (experiences,) = groups
        chosen = pairs_of(rollout.trees(), in_order(rollout, experiences, "scores"))
        if not chosen:
            return {"tokens": 0.0, "pairs": 0.0}
        return self.policy.step(self._objective(chosen)) | {"pairs": float(len(chosen))}

    def state(self) -> State:
        """The policy and its optimizer."""
        return self.policy.state()

    def load_state(self, state: State) -> None:
        """Go on from such a state."""
        self.policy.load_state(state)


def pairs_of(trees: Sequence[Tree], scores: Tensor) -> list[Tree]:
    """Each tree with its best branch and its worst one; trees whose scores [trees, n] are all equal are left out."""
    best, worst = scores.argmax(1).tolist(), scores.argmin(1).tolist()
    return [
        Tree(tree.prompt, (tree.branches[first], tree.branches[last]), tree.number)
        for tree, first, last, own in zip(trees, best, worst, scores, strict=True)
        if own.min() < own.max()
    ]


if __name__ == "__main__":
    from pipeline.launch import main

    main("online_dpo")
