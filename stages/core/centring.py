"""Where a reward model's zero is: at the mean score of responses that the policy itself gives (Ziegler et al. 2019,
arXiv 1909.08593)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from data.batch import Layout
from data.tree import Tree
from pipeline.manifest import Metric
from pipeline.memory import CENTRING_SAMPLES
from reward.intervals import mean_interval
from stages.core.roles import REFERENCE, REWARD, Roles
from stages.core.rollout import sample, trees_of
from stages.core.scoring import head_scores, on_device


def centre(
    roles: Roles, examples: Sequence[Tree], *, max_length: int, seed: int, tokens_per_batch: int, layout: Layout
) -> Metric:
    """Shift scores so that the reference's own samples score zero under every head; returns their mean score before.

    Args:
        roles: The base with the reward model and the reference.
        examples: Preferences, of which some give their prompts.
        max_length: Longest prompt and response together, in tokens.
        seed: Of the choice of prompts and of the samples.
        tokens_per_batch: Tokens that go through the model at once.
        layout: How trees are laid out.
    """
    samples = reference_samples(roles, examples, max_length=max_length, seed=seed, tokens_per_batch=tokens_per_batch)
    found = scores_by_head(roles, samples, tokens_per_batch, layout)
    scores = torch.tensor([each[0] for each in found.values()], device=roles.base.compute.device)
    before = mean_interval(scores.mean(-1).tolist())
    head = roles.heads[REWARD]
    head.align(scores.mean(0))
    head.mean += before.value
    return before


def reference_samples(
    roles: Roles, examples: Sequence[Tree], *, max_length: int, seed: int, tokens_per_batch: int
) -> list[Tree]:
    """Responses of the reference to some of the prompts, as long as the longest given one; prompts lose their beginning
    where the two would not fit."""
    chosen = random.Random(seed).sample(examples, min(CENTRING_SAMPLES, len(examples)))
    longest = max(len(branch.tokens) for tree in chosen for branch in tree.branches)
    room = roles.base.longest(max_length) - longest
    prompts = [tree.prompt[-room:] for tree in chosen]
    with roles.use(REFERENCE), roles.base.compute.autocast():
        samples = sample(
            roles.base.model,
            prompts,
            stop_id=roles.base.template.stop_id,
            max_new_tokens=longest,
            temperature=1.0,
            seed=seed,
            tokens_per_batch=tokens_per_batch,
        )
    return trees_of(prompts, samples)


@torch.no_grad()
def scores_by_head(
    roles: Roles, trees: Sequence[Tree], tokens_per_batch: int, layout: Layout
) -> dict[int, list[list[float]]]:
    """Every head's score of every branch, by tree number, in the trees' order."""
    found: dict[int, list[list[float]]] = {tree.number: [] for tree in trees}
    with roles.use(REWARD), roles.base.compute.autocast():
        for batch in on_device(roles.base, trees, tokens_per_batch, layout):
            values = iter(head_scores(roles, REWARD, batch).tolist())
            for tree in batch.trees:
                found[tree.number] = [next(values) for _ in tree.branches]
    return found
