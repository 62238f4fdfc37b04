"""Rejection sampling (RAFT, Dong et al. 2023, arXiv 2304.06767): fine-tune the policy on the best of its own responses.

Each round samples several responses to each prompt, keeps the best by their score, and takes one step of supervised
fine-tuning on them: the mean negative log-likelihood of their tokens. What best-of-n sampling does at a cost for every
answer, the policy learns once. Prompts whose responses all have the same score teach nothing and are left out. Left out
as well: a penalty for leaving the reference, thresholds of the score, and responses of earlier rounds.

    python -m stages.rejection CONFIG [key=value ...]
"""

from __future__ import annotations

from functools import partial

from data.batch import Layout
from pipeline.config import RejectionSettings
from pipeline.contract import Context, Result
from stages.core.rl.ranking import Ranking, best_of
from stages.core.rl.training import train
from stages.core.rl.trunk import Trunk
from stages.core.roles import Roles
from stages.core.scoring import negative_mean


def run(context: Context) -> Result:
    """Train the policy; its adapter is the result.

    Raises:
        DataError: There is no prompt, or a rule misses what it needs.
        ArtifactError: The policy or the reward model is damaged, or they sit on different bases.
        NumericalError: The preflight failed, or a loss or gradient is not finite.
    """
    return train(context, learner)


def learner(settings: RejectionSettings, roles: Roles, layout: Layout, trunk: Trunk) -> Ranking:
    """Learns the best responses to each prompt."""
    objective = negative_mean(roles.base, settings.batch_tokens, layout)
    return Ranking(roles, settings, objective, partial(best_of, keep=settings.keep))


if __name__ == "__main__":
    from pipeline.launch import main

    main("rejection")
