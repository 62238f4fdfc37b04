"""PPO's own parts: the trees it checks itself on, and layers that are computed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import models
import pytest
from torch import Tensor, equal

from pipeline.config import PpoSettings
from pipeline.contract import Artifact
from pipeline.manifest import Adaptation, Manifest
from stages import ppo
from stages.core import probes
from stages.core.loop import Part
from stages.core.roles import POLICY, REWARD, VALUE, Roles
from stages.core.scoring import record_probes, reward_scores
from stages.ppo import ECHO, _echoes


@pytest.mark.parametrize("length", [1, 2, ECHO - 1, ECHO, ECHO + 1, 500])
def test_checks_never_need_more_positions_than_a_prompt_or_two_short_ones(length: int) -> None:
    prompt = tuple(range(1, length + 1))
    (tree,) = _echoes([prompt], branches=2)
    longest = len(tree.prompt) + max(len(branch.tokens) for branch in tree.branches)
    assert longest <= max(length, 2 * ECHO)
    assert tree.branches[0].tokens == prompt[-ECHO:]


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Artifact, Artifact]:
    """A policy and a reward model on it, as stages store them."""
    policy, trees = models.save_base(tmp_path / "policy"), models.responses(4)
    roles = models.roles(REWARD)
    record_probes(policy.directory, trees, roles.base)
    roles.add_head(REWARD)
    models.disturb(roles, REWARD)
    reward = models.save_role(roles, REWARD, tmp_path / "reward", policy, "reward")
    probes.record(reward.directory, trees, lambda some: reward_scores(roles, REWARD, some), models.CPU)
    adaptation = Adaptation(base=policy.digest, base_source=policy.source)
    tokenizer = {"chat_template": roles.base.template.digest}
    manifest = Manifest.model_construct(adaptation=adaptation, inputs={}, tokenizer=tokenizer)
    return policy, dataclasses.replace(reward, manifest=manifest)


def gradients(roles: Roles, role: str, parts: Iterable[Part]) -> dict[str, Tensor]:
    for part in parts:
        part.loss.backward()
    return {name: each.grad for name, each in roles.parameters(role) if each.grad is not None}


def test_an_update_with_checkpointed_layers_has_the_same_gradients(inputs: tuple[Artifact, Artifact]) -> None:
    found = []
    for checkpointed in (False, True):
        settings = PpoSettings(
            policy="p", reward="r", data="d", lora=models.LORA, examples_per_step=6, max_new_tokens=6,
            gradient_checkpointing=checkpointed,
        )  # fmt: skip
        roles = ppo.open_roles(*inputs, settings, models.CPU)
        assert isinstance(roles.base.model.model.layers[0].forward, partial) == checkpointed
        models.disturb(roles, POLICY)
        prompts = [tree.prompt for tree in models.responses(6)]
        (group,), _ = ppo._rollout(roles, prompts, settings, "plain", seed=0)
        policy = gradients(roles, POLICY, ppo.policy_parts(roles, group, settings))
        value = gradients(roles, VALUE, ppo.value_parts(roles, group, settings))
        assert len(policy) == len(roles.parameters(POLICY))
        assert len(value) == len(roles.parameters(VALUE))
        found.append(policy | value)
    assert any(gradient.any() for gradient in found[0].values())
    assert all(equal(gradient, found[1][name]) for name, gradient in found[0].items())
