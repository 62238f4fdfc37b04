"""Train a reward model on preferences: an adapter and a scalar head on the policy's own base.

The score of a response is read at its last token. The loss is Bradley-Terry's (Ouyang et al. 2022, arXiv
2203.02155, eq. 1) with an optional margin and centring, and for rankings of more than two responses
Plackett-Luce's. Afterwards scores are shifted so that responses sampled from the policy itself score zero on
average (Ziegler et al. 2019, arXiv 1909.08593). The head is created here once and stored; whoever loads the
model reads it back and replays recorded scores, so it cannot be lost or made anew.

Several heads on the one adapter are an ensemble: each starts at random and takes the examples with weights of its own
(the Bayesian bootstrap, Rubin 1981, doi 10.1214/aos/1176345338), so that where the data say little, the heads differ.
The score is their mean; how far they differ on held-out responses, and whether more so where they are wrong, is
measured. Left out: scaling to unit variance, ensembles of adapters, and process rewards.

    python -m stages.reward CONFIG [key=value ...]
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from data.batch import Layout
from data.tree import Tree, preference_tree
from pipeline.config import RewardSettings
from pipeline.contract import Context, Result
from pipeline.manifest import Metric
from reward import disagreement
from reward.disagreement import Ranking
from reward.head import ScalarHead
from reward.intervals import mean_interval, proportion_interval
from stages.core import device, loop, memory, optim, probes, rows
from stages.core.centring import centre, scores_by_head
from stages.core.checkpointing import checkpoint_layers
from stages.core.layout import choose_layout
from stages.core.losses import bradley_terry_loss, ranking_loss
from stages.core.models import record
from stages.core.roles import REFERENCE, REWARD, Roles, adaptation, open_role
from stages.core.scoring import head_scores, on_device, replay_probes, reward_scores


def run(context: Context) -> Result:
    """Train, centre, and measure pair accuracy on held-out prompts.

    Raises:
        DataError: No row can be used.
        ArtifactError: The policy is damaged or not what its manifest says.
        NumericalError: A loss or gradient is not finite.
    """
    compute = device.for_stage(context)
    optim.require_support(context.settings.optimizer, compute.device)
    fitted = memory.fit(context, compute)
    context, settings = fitted.context, fitted.context.settings
    loop.seed_everything(context.seed)
    policy = context.inputs["policy"]
    roles = open_role(policy, REWARD, settings.lora, compute)
    if settings.gradient_checkpointing:
        checkpoint_layers(roles.base)
    roles.heads[REWARD] = ScalarHead(roles.base.hidden_size, settings.heads).to(compute.device)
    with roles.use(REFERENCE):
        replay_probes(policy, roles.base)
    examples = rows.examples(context, "data", preference_tree, roles.base)
    layout, warnings = choose_layout(roles.base, examples.train, context.say)
    with roles.use(REWARD):
        objective = _objective(roles, settings, layout, context.seed)
        followed = loop.follow(context, examples.passes, objective, roles.parameters(REWARD))
    sample_score = centre(
        roles,
        examples.train,
        max_length=settings.max_length,
        seed=context.seed,
        tokens_per_batch=settings.batch_tokens,
        layout=layout,
    )
    metrics = {"sample_score": sample_score, **_metrics(roles, examples.held_out, settings, layout)}
    roles.save(REWARD, context.directory)
    chosen = examples.held_out or examples.train
    probes.record(context.directory, chosen, lambda trees: reward_scores(roles, REWARD, trees), roles.base)
    return Result(
        kind="reward",
        metrics=metrics,
        data=examples.cards,
        adaptation=adaptation(policy),
        tokenizer=record(roles.base),
        tokens=followed.tokens,
        compute=compute.record,
        expected_memory=fitted.expected,
        warnings=[*roles.warnings, *warnings, *followed.warnings],
    )


def _objective(roles: Roles, settings: RewardSettings, layout: Layout, seed: int = 0) -> loop.Objective:
    """Mean loss over the step's preferences; `accuracy` is the share in which the best response scores highest."""

    def parts(examples: Sequence[Tree]) -> Iterator[loop.Part]:
        for batch in on_device(roles.base, examples, settings.batch_tokens, layout):
            with roles.base.compute.autocast():
                found = head_scores(roles, REWARD, batch)
            groups = found.split([len(tree.branches) for tree in batch.trees])
            losses = torch.stack(
                [_loss(group, tree, settings) for group, tree in zip(groups, batch.trees, strict=True)]
            )
            weights = losses.new_tensor([bootstrap_weights(seed, settings.heads, tree.number) for tree in batch.trees])
            right = sum(float(group.mean(-1).argmax() == 0) for group in groups)
            shares = {"accuracy": right / len(examples)}
            loss = (weights * losses).mean(-1).sum() / len(examples)
            yield loop.Part(loss, shares, batch.token_count)

    return parts


def bootstrap_weights(seed: int, heads: int, number: int) -> list[float]:
    """Every head's weight of the tree of a number: drawn from the exponential distribution of mean 1, the same at every
    call. A single head takes every tree as it is."""
    if heads == 1:
        return [1.0]
    return [random.Random(f"{seed} head {head} tree {number}").expovariate(1.0) for head in range(heads)]


def _loss(group: Tensor, tree: Tree, settings: RewardSettings) -> Tensor:
    """[heads] for the scores [k, heads] of a tree's branches."""
    scores = group.T
    if len(group) > 2:
        return ranking_loss(scores) + settings.centring * scores.sum(-1).square()
    margin = group.new_tensor([tree.margin]) if settings.margin else None
    return bradley_terry_loss(scores, margin, settings.centring)


def _metrics(roles: Roles, examples: Sequence[Tree], settings: RewardSettings, layout: Layout) -> dict[str, Metric]:
    if not examples:
        return {}
    found = scores_by_head(roles, examples, settings.batch_tokens, layout)
    rankings = [Ranking(np.array(scores)) for scores in found.values()]
    margins = [float(means[0] - means[-1]) for means in (each.scores.mean(1) for each in rankings)]
    return {
        "pair_accuracy": proportion_interval(sum(not each.wrong for each in rankings), len(rankings)),
        "score_margin": mean_interval(margins),
        **(disagreement.metrics(rankings) if settings.heads > 1 else {}),
    }


if __name__ == "__main__":
    from pipeline.launch import main

    main("reward")
