"""Train a reward model on preferences: an adapter and a scalar head on the policy's own base.

The score of a response is read at its last token. The loss is Bradley-Terry's (Ouyang et al. 2022, arXiv
2203.02155, eq. 1) with an optional margin and centring, and for rankings of more than two responses
Plackett-Luce's. Afterwards scores are shifted so that responses sampled from the policy itself score zero on
average (Ziegler et al. 2019, arXiv 1909.08593). The head is created here once and stored; whoever loads the
model reads it back and replays recorded scores, so it cannot be lost or made anew. Left out: ensembles, scaling
to unit variance, and process rewards.

    python -m stages.reward CONFIG [key=value ...]
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from data.batch import Layout
from data.tree import Branch, Tree, preference_tree
from pipeline.config import RewardSettings
from pipeline.contract import Context, Result
from pipeline.manifest import Metric
from reward.intervals import mean_interval, proportion_interval
from stages.core import device, loop, probes, rows
from stages.core.forward import choose_layout
from stages.core.losses import bradley_terry_loss, ranking_loss
from stages.core.models import record
from stages.core.roles import REFERENCE, REWARD, Roles, adaptation, open_role
from stages.core.rollout import sample
from stages.core.scoring import branch_scores, on_device, replay_probes, reward_scores, scores

CENTRING_SAMPLES = 128


def run(context: Context) -> Result:
    """Train, centre, and measure pair accuracy on held-out prompts.

    Raises:
        DataError: No row can be used.
        ArtifactError: The policy is damaged or not what its manifest says.
        NumericalError: A loss or gradient is not finite.
    """
    settings, compute = context.settings, device.choose(context.device, context.dtype)
    loop.seed_everything(context.seed)
    policy = context.inputs["policy"]
    roles = open_role(policy, REWARD, settings.lora, compute)
    roles.add_head(REWARD)
    with roles.use(REFERENCE):
        replay_probes(policy, roles.base)
    examples = rows.examples(context, "data", preference_tree, roles.base)
    layout, warnings = choose_layout(roles.base.model, examples.train)
    with roles.use(REWARD):
        objective = _objective(roles, settings, layout)
        tokens = loop.follow(context, examples.passes, objective, roles.parameters(REWARD))
    centre = _centre(roles, examples.train, settings, layout, context.seed)
    metrics = {"sample_score": centre, **_metrics(roles, examples.held_out, settings, layout)}
    roles.save(REWARD, context.directory)
    chosen = examples.held_out or examples.train
    probes.record(context.directory, chosen, lambda trees: reward_scores(roles, REWARD, trees), compute)
    return Result(
        kind="reward",
        metrics=metrics,
        data=examples.cards,
        adaptation=adaptation(policy),
        tokenizer=record(roles.base),
        tokens=tokens,
        compute=compute.record,
        warnings=warnings,
    )


def _objective(roles: Roles, settings: RewardSettings, layout: Layout) -> loop.Objective:
    """Mean loss over the step's preferences; `accuracy` is the share in which the best response scores highest."""

    def parts(examples: Sequence[Tree]) -> Iterator[loop.Part]:
        for batch in on_device(roles.base, examples, settings.tokens_per_batch, layout):
            with roles.base.compute.autocast():
                found = branch_scores(roles, REWARD, batch)
            groups = found.split([len(tree.branches) for tree in batch.trees])
            losses = [_loss(group, tree, settings) for group, tree in zip(groups, batch.trees, strict=True)]
            right = sum(float(group.argmax() == 0) for group in groups)
            shares = {"accuracy": right / len(examples)}
            yield loop.Part(torch.stack(losses).sum() / len(examples), shares, batch.token_count)

    return parts


def _loss(group: torch.Tensor, tree: Tree, settings: RewardSettings) -> torch.Tensor:
    if len(group) > 2:
        return ranking_loss(group) + settings.centring * group.sum().square()
    margin = group.new_tensor([tree.margin]) if settings.margin else None
    return bradley_terry_loss(group[None], margin, settings.centring)[0]


def _centre(roles: Roles, examples: Sequence[Tree], settings: RewardSettings, layout: Layout, seed: int) -> Metric:
    """Shift scores so that the reference's own samples score zero; returns their mean score before the shift."""
    chosen = random.Random(seed).sample(examples, min(CENTRING_SAMPLES, len(examples)))
    longest = max(len(branch.tokens) for tree in chosen for branch in tree.branches)
    room = roles.base.longest(settings.max_length) - longest
    with roles.use(REFERENCE), roles.base.compute.autocast():
        samples = sample(
            roles.base.model,
            [tree.prompt[-room:] for tree in chosen],
            stop_id=roles.base.template.stop_id,
            max_new_tokens=longest,
            temperature=1.0,
            seed=seed,
            tokens_per_batch=settings.tokens_per_batch,
        )
    trees = [
        Tree(tree.prompt, (Branch.of(each.tokens),), number)
        for number, (tree, each) in enumerate(zip(chosen, samples, strict=True))
    ]
    found = scores(roles, REWARD, trees, settings.tokens_per_batch, layout)
    before = mean_interval([found[tree.number][0] for tree in trees])
    roles.heads[REWARD].mean += before.value
    return before


def _metrics(roles: Roles, examples: Sequence[Tree], settings: RewardSettings, layout: Layout) -> dict[str, Metric]:
    if not examples:
        return {}
    found = scores(roles, REWARD, examples, settings.tokens_per_batch, layout)
    ranked = [found[tree.number] for tree in examples]
    right = sum(each[0] > max(each[1:]) for each in ranked)
    return {
        "pair_accuracy": proportion_interval(right, len(ranked)),
        "score_margin": mean_interval([each[0] - each[-1] for each in ranked]),
    }


if __name__ == "__main__":
    from pipeline.launch import main

    main("reward")
