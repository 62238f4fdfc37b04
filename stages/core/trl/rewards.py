"""Rewards as functions that a trainer of TRL calls with prompts and responses in token text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from data.template import ChatTemplate
from data.tree import Branch, Tree
from pipeline.config import TrlSettings
from pipeline.contract import Artifact, Context
from reward.rules import verdict
from stages.core import handover, probes
from stages.core.device import Compute
from stages.core.roles import REWARD, open_base
from stages.core.scoring import reward_scores, scores
from stages.core.trl.text import as_tokens

RewardFunction = Callable[..., list[float]]
"""Takes `prompts`, `completions` and the dataset's columns by name, lists of equal length; gives a reward each."""


def functions(context: Context, template: ChatTemplate, compute: Compute) -> list[RewardFunction]:
    """The rewards that a stage learns from: its reward stage's, its rule's, or both.

    Raises:
        ArtifactError: The reward model is damaged, or reads other tokens than the policy writes.
    """
    settings: TrlSettings = context.settings
    found = []
    if "reward" in context.inputs:
        found.append(_learned(context.inputs["reward"], template, compute, settings))
    if settings.gold != "none":
        found.append(_programmatic(settings.gold, template))
    return found


def _learned(artifact: Artifact, template: ChatTemplate, compute: Compute, settings: TrlSettings) -> RewardFunction:
    handover.require_same_tokens(artifact, template.tokenizer)
    roles = open_base(artifact, compute)
    roles.load(REWARD, artifact.directory)
    probes.replay(artifact.directory, lambda trees: reward_scores(roles, REWARD, trees), roles.base)

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        trees = [
            Tree(as_tokens(prompt), (Branch.of(_response(completion, template, settings)),), number)
            for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        found = scores(roles, REWARD, trees, layout="plain")
        return [found[number][0] for number in range(len(trees))]

    return reward


def _programmatic(name: str, template: ChatTemplate) -> RewardFunction:
    def gold(completions: Sequence[str], facts: Sequence[str], origin: Sequence[str], **columns: Any) -> list[float]:
        return [
            verdict(name, json.loads(known), template.decode(as_tokens(completion)), place).reward
            for completion, known, place in zip(completions, facts, origin, strict=True)
        ]

    return gold


def _response(completion: str, template: ChatTemplate, settings: TrlSettings) -> tuple[int, ...]:
    """A response's tokens. The text is without the stop token, which every response has that is not of full length."""
    tokens = as_tokens(completion)
    assert settings.max_new_tokens is not None
    return tokens if len(tokens) >= settings.max_new_tokens else (*tokens, template.stop_id)
