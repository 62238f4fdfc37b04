"""Rollouts on tiny models, as the ppo stage makes them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import models
import torch

from data.batch import Layout
from data.schema import Prompt
from data.tree import Tree
from pipeline.config import PpoSettings
from stages.core.device import Compute
from stages.core.rl.experience import Collector, Experience, estimate, score
from stages.core.rl.prompts import EncodedPrompt
from stages.core.rl.rewards import Rewards, Scale
from stages.core.rl.sampling import Rollout, Sampler
from stages.core.rl.trunk import Trunk
from stages.core.rl.updates import Losses
from stages.core.roles import POLICY, REWARD, VALUE, Roles
from stages.core.rollout import Sample


def settings(**changes: object) -> PpoSettings:
    """The stage's settings for eight prompts and short responses."""
    options = {"policy": "p", "reward": "r", "data": "d", "examples_per_step": 8, "max_new_tokens": 6, **changes}
    return PpoSettings.model_validate(options)


def four_roles(compute: Compute = models.CPU, **options: object) -> Roles:
    """As the stage has them at its start: a fresh policy, a reward model, the value function its copy."""
    roles = models.roles(POLICY, REWARD, compute=compute, **options)  # type: ignore[arg-type]
    roles.add_head(REWARD)
    models.disturb(roles, REWARD)
    roles.heads[REWARD].mean.fill_(0.3)
    roles.copy(REWARD, VALUE)
    return roles


def disturbed(compute: Compute = models.CPU) -> Roles:
    """Four roles of which policy and value function have moved."""
    roles = four_roles(compute)
    models.disturb(roles, POLICY, seed=5)
    models.disturb(roles, VALUE, seed=6)
    return roles


def prompts(count: int = 8) -> list[EncodedPrompt]:
    """Prompts of ragged lengths with random tokens."""
    return [EncodedPrompt(tree.prompt, Prompt((), origin=f"row {tree.number}")) for tree in models.responses(count)]


def given(trees: Sequence[Tree], ended: Sequence[bool] | None = None) -> Rollout:
    """The trees' own branches as sampled responses."""
    chance = random.Random(0)
    samples = [
        Sample(branch.tokens, True if ended is None else ended[number], (chance.random(),) * len(branch.tokens))
        for number, branch in enumerate(branch for tree in trees for branch in tree.branches)
    ]
    return Rollout([EncodedPrompt(tree.prompt, Prompt((), origin="row")) for tree in trees], samples)


def collector(roles: Roles, chosen: PpoSettings, layout: Layout = "tree") -> Collector:
    """What has responses scored; every layer is adapted."""
    return Collector(roles, chosen, Rewards(roles, chosen), layout)


def collected(
    roles: Roles, rollout: Rollout, chosen: PpoSettings, layout: Layout = "tree", kl_coefficient: float | None = None
) -> list[Experience]:
    """A rollout's experience with its advantages, in one minibatch."""
    found = collector(roles, chosen, layout).collect(rollout, rollout.trees(), [0.0] * len(rollout.samples))
    score(found, chosen, Scale())
    estimate(found, chosen, chosen.kl_coefficient if kl_coefficient is None else kl_coefficient)
    return found


def sampled(roles: Roles, chosen: PpoSettings, layout: Layout = "tree", seed: int = 0) -> list[Experience]:
    """The experience of responses that the policy samples."""
    rollout = Sampler(roles, chosen).rollout(prompts(chosen.examples_per_step), seed)
    return collected(roles, rollout, chosen, layout)


def losses(roles: Roles, chosen: PpoSettings) -> Losses:
    """The stage's losses; every layer is adapted."""
    return Losses(roles, chosen, Trunk(roles.base.model, 0))


def joined(experiences: Sequence[Experience], name: str) -> torch.Tensor:
    """A field of all experience in one tensor."""
    return torch.cat([getattr(each, name) for each in experiences])
