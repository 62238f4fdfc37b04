"""Online DPO (Guo et al. 2024, arXiv 2402.04792): preferences between the policy's own responses, as it learns.

Each round samples several responses to each prompt; the one with the highest score is preferred to the one with the
lowest, and one step of a preference loss is taken on these pairs. Prompts whose responses all have the same score make
no pair. The reference stays the policy's start. The loss is of log-probabilities at temperature 1, whatever that of
sampling is. Left out: judges that compare two responses rather than score each, references that follow the policy, and
pairs of earlier rounds.

    python -m stages.online_dpo CONFIG [key=value ...]
"""

from __future__ import annotations

from data.batch import Layout
from pipeline.config import OnlineDpoSettings
from pipeline.contract import Context, Result
from stages.core.preference import objective
from stages.core.rl.ranking import Ranking, pairs_of
from stages.core.rl.training import train
from stages.core.rl.trunk import Trunk
from stages.core.roles import Roles


def run(context: Context) -> Result:
    """Train the policy; its adapter is the result.

    Raises:
        DataError: There is no prompt, or a rule misses what it needs.
        ArtifactError: The policy or the reward model is damaged, or they sit on different bases.
        NumericalError: The preflight failed, or a loss or gradient is not finite.
    """
    return train(context, learner)


def learner(settings: OnlineDpoSettings, roles: Roles, layout: Layout, trunk: Trunk) -> Ranking:
    """Learns the best response to each prompt over the worst."""
    return Ranking(roles, settings, objective(roles, settings, layout), pairs_of)


if __name__ == "__main__":
    from pipeline.launch import main

    main("online_dpo")
