"""The policy, its reference and the reward model on one base, each checked against what it was when it was stored."""

from __future__ import annotations

from pipeline.config import Rewarded
from pipeline.contract import Artifact
from pipeline.errors import ArtifactError
from stages.core import handover, probes
from stages.core.checkpointing import checkpoint_layers
from stages.core.device import Compute
from stages.core.roles import POLICY, REFERENCE, REWARD, Roles, base_of, open_role
from stages.core.scoring import replay_probes, reward_scores


def open_roles(policy: Artifact, reward: Artifact | None, settings: Rewarded, compute: Compute) -> Roles:
    """The roles of a stage that samples and learns; without a reward model, rules are the reward.

    Raises:
        ArtifactError: The reward model sits on another base than the policy, or reads another tokenizer or chat
            template; or a probe comes out otherwise than it was recorded.
    """
    if reward:
        _require_same_base(policy, reward)
    roles = open_role(policy, POLICY, settings.lora, compute)
    if settings.gradient_checkpointing:
        checkpoint_layers(roles.base)
    with roles.use(REFERENCE):
        replay_probes(policy, roles.base)
    if reward:
        handover.require_same_tokens(reward, roles.base.tokenizer)
        roles.load(REWARD, reward.directory)
        probes.replay(reward.directory, lambda trees: reward_scores(roles, REWARD, trees), roles.base)
    return roles


def _require_same_base(policy: Artifact, reward: Artifact) -> None:
    base, reward_base = base_of(policy)[0], base_of(reward)[0]
    if base_of(policy)[1] != base_of(reward)[1] or base.digest != reward_base.digest:
        raise ArtifactError(
            f"the reward model sits on {reward_base.source} ({reward_base.digest[:12]}), "
            f"the policy on {base.source} ({base.digest[:12]})",
            where=reward.directory,
            hint="train the reward stage on the same `policy` as this stage",
        )
