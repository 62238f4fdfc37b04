"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290).

The policy learns from pairs without a reward model: the log-probability of the chosen response relative to the
reference rises against that of the rejected one. The reference is the policy's own start, computed on the same
base with the adapter off (or with the frozen adapter that the policy began as), in the same batch: at step 0
the margin is exactly zero and the loss ln 2. An optional supervised term on the chosen responses (Pang et al.
2024, arXiv 2404.19733) keeps them likely. Of a ranking of k responses, the first and the last make the pair.
Left out: other losses, label smoothing, and reference log-probabilities kept between epochs.

    python -m stages.dpo CONFIG [key=value ...]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from data.batch import Layout, TreeBatch
from data.tree import Tree, pair_tree
from pipeline.config import DpoSettings
from pipeline.contract import Context, Result
from pipeline.manifest import Metric
from reward.intervals import mean_interval, proportion_interval
from stages.core import device, loop, rows
from stages.core.forward import choose_layout, token_logprobs
from stages.core.losses import dpo_loss
from stages.core.models import record
from stages.core.roles import POLICY, REFERENCE, Roles, adaptation, open_role
from stages.core.scoring import logprobs, on_device, record_probes, replay_probes


def run(context: Context) -> Result:
    """Train, and measure the implicit reward's pair accuracy on held-out prompts.

    Raises:
        DataError: No row can be used.
        ArtifactError: The policy is damaged or not what its manifest says.
        NumericalError: A loss or gradient is not finite.
    """
    settings, compute = context.settings, device.choose(context.device, context.dtype)
    loop.seed_everything(context.seed)
    policy = context.inputs["policy"]
    roles = open_role(policy, POLICY, settings.lora, compute)
    with roles.use(REFERENCE):
        replay_probes(policy, roles.base)
    examples = rows.examples(context, "data", pair_tree, roles.base)
    layout, warnings = choose_layout(roles.base.model, examples.train)
    tokens = loop.follow(context, examples.passes, objective(roles, settings, layout), roles.parameters(POLICY))
    metrics = _metrics(roles, examples.held_out, settings, layout)
    roles.save(POLICY, context.directory)
    with roles.use(POLICY):
        record_probes(context.directory, examples.held_out or examples.train, roles.base)
    return Result(
        kind="adapter",
        metrics=metrics,
        data=examples.cards,
        adaptation=adaptation(policy, reference=policy),
        tokenizer=record(roles.base),
        tokens=tokens,
        compute=compute.record,
        warnings=warnings,
    )


def objective(roles: Roles, settings: DpoSettings, layout: Layout) -> loop.Objective:
    """Mean loss over the step's pairs, with the mean margin and the share of pairs whose margin is positive.

    `chosen_logprob` is the mean log-probability of the chosen responses' tokens: it falls when learning goes astray.
    """

    def parts(examples: Sequence[Tree]) -> Iterator[loop.Part]:
        chosen_tokens = sum(tree.branches[0].reads for tree in examples)
        for batch in on_device(roles.base, examples, settings.tokens_per_batch, layout):
            with torch.no_grad(), roles.use(REFERENCE):
                reference = _pair_logprobs(roles, batch)
            with roles.use(POLICY):
                policy = _pair_logprobs(roles, batch)
                losses, margins = dpo_loss(policy, reference, settings.beta)
                likelihood = policy[:, 0].sum() / chosen_tokens
                shares = {
                    "chosen_logprob": likelihood.item(),
                    "accuracy": (margins > 0).float().sum().item() / len(examples),
                    "margin": margins.sum().item() / len(examples),
                }
                loss = losses.sum() / len(examples) - settings.sft_weight * likelihood
                yield loop.Part(loss, shares, 2 * batch.token_count)

    return parts


def _pair_logprobs(roles: Roles, batch: TreeBatch) -> torch.Tensor:
    """[pairs, 2] summed log-probabilities of (chosen, rejected)."""
    with roles.base.compute.autocast():
        return batch.sum_by_branch(token_logprobs(roles.base.model, batch)).view(-1, 2)


def _metrics(roles: Roles, examples: Sequence[Tree], settings: DpoSettings, layout: Layout) -> dict[str, Metric]:
    if not examples:
        return {}
    with roles.use(POLICY):
        policy = logprobs(roles.base, examples, settings.tokens_per_batch, layout)
    with roles.use(REFERENCE):
        reference = logprobs(roles.base, examples, settings.tokens_per_batch, layout)
    margins = [
        settings.beta
        * (policy[tree.number][0] - reference[tree.number][0] - policy[tree.number][1] + reference[tree.number][1])
        for tree in examples
    ]
    return {
        "pair_accuracy": proportion_interval(sum(margin > 0 for margin in margins), len(margins)),
        "margin": mean_interval(margins),
    }


if __name__ == "__main__":
    from pipeline.launch import main

    main("dpo")
