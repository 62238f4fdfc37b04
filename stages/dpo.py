"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its family.

The policy learns from pairs without a reward model: the log-probability of the chosen response relative to the
reference rises against that of the rejected one. How, the loss says; `stages/core/losses.py` has them all, with
their formulas. The reference is the policy's own start, computed on the same base with the adapter off (or with the
frozen adapter that the policy began as), in the same batch: at step 0 the margin is exactly zero and DPO's loss ln 2.
Or it is computed once before training and kept. SimPO and ORPO need none: nothing is computed for it then, and the
manifest names none. An optional supervised term on the chosen responses (Pang et al. 2024, arXiv 2404.19733) keeps
them likely. Of a ranking of k responses, the first and the last make the pair.

The margin is that of the loss's implicit reward, beta times what the loss is a function of: the log-ratio to the
reference, or without one the log-probability; per token where the loss is.
Left out: divergences other than the reverse KL, mixtures of losses, losses of unpaired responses, and references that
follow the policy.

    python -m stages.dpo CONFIG [key=value ...]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch

from data.batch import Layout
from data.mixture import Passes, stream
from data.tree import Tree, pair_tree
from pipeline.config import DpoSettings
from pipeline.contract import Context, Result
from pipeline.manifest import Metric
from reward.intervals import mean_interval, share_preferred
from stages.core import device, loop, memory, optim, probes, rows
from stages.core.checkpointing import checkpoint_layers
from stages.core.layout import choose_layout
from stages.core.losses import PREFERENCE_LOSSES
from stages.core.models import record
from stages.core.preference import (
    computed_reference,
    implicit_margins,
    objective,
    read_tokens,
    require_beginning,
)
from stages.core.reference import KeptReference, pair_logprobs
from stages.core.roles import POLICY, REFERENCE, Roles, adaptation, open_role
from stages.core.scoring import on_device, record_probes, replay_probes


def run(context: Context) -> Result:
    """Train, and measure the implicit reward's pair accuracy on held-out prompts.

    Raises:
        DataError: No row can be used.
        ArtifactError: The policy is damaged or not what its manifest says, or does not begin as its reference.
        NumericalError: A loss or gradient is not finite.
        StorageError: The cache, where the reference is kept, cannot be written.
    """
    compute = device.for_stage(context)
    optim.require_support(context.settings.optimizer, compute.device)
    fitted = memory.fit(context, compute)
    context, settings = fitted.context, fitted.context.settings
    loop.seed_everything(context.seed)
    policy = context.inputs["policy"]
    roles = open_role(policy, POLICY, settings.lora, compute)
    if settings.gradient_checkpointing:
        checkpoint_layers(roles.base)
    with roles.use(REFERENCE):
        replay_probes(policy, roles.base)
    examples = rows.examples(context, "data", pair_tree, roles.base)
    layout, warnings = choose_layout(roles.base, examples.train, context.say)
    reference = _kept(context, roles, layout, lambda: _taken(context, examples.passes))
    begun = reference or computed_reference(roles, settings)
    if begun:
        first = list(islice(_taken(context, examples.passes), probes.COUNT))
        require_beginning(roles, begun, first, settings.batch_tokens, layout)
    parts = objective(roles, settings, layout, reference)
    followed = loop.follow(context, examples.passes, parts, roles.parameters(POLICY))
    metrics = _metrics(context, roles, examples.held_out, layout)
    roles.save(POLICY, context.directory)
    with roles.use(POLICY):
        record_probes(context.directory, examples.held_out or examples.train, roles.base)
    return Result(
        kind="adapter",
        metrics=metrics,
        data=examples.cards,
        adaptation=adaptation(policy, reference=policy if settings.has_reference else None),
        tokenizer=record(roles.base),
        tokens=followed.tokens,
        compute=compute.record,
        expected_memory=fitted.expected,
        warnings=[*roles.warnings, *warnings, *followed.warnings],
    )


def _kept(context: Context, roles: Roles, layout: Layout, pairs: Callable[[], Iterable[Tree]]) -> KeptReference | None:
    """The reference of these pairs from the cache, if the settings ask for it."""
    settings: DpoSettings = context.settings
    if settings.reference != "once":
        return None
    return KeptReference(
        roles,
        context.inputs["policy"],
        pairs,
        tokens_per_batch=settings.batch_tokens,
        layout=layout,
        say=context.say,
    )


def _taken(context: Context, passes: Passes[Tree]) -> Iterator[Tree]:
    """The pairs that training will go over."""
    steps = loop.total_steps(len(passes), context.settings)
    return islice(stream(passes, context.seed), steps * context.settings.examples_per_step)


@torch.no_grad()
def _metrics(context: Context, roles: Roles, examples: Sequence[Tree], layout: Layout) -> dict[str, Metric]:
    if not examples:
        return {}
    settings: DpoSettings = context.settings
    loss = PREFERENCE_LOSSES[settings.loss]
    reference = _kept(context, roles, layout, lambda: examples) or computed_reference(roles, settings)
    found: dict[int, float] = {}
    for batch in on_device(roles.base, examples, settings.batch_tokens, layout):
        against = reference(batch) if reference else None
        with roles.use(POLICY):
            logprobs = loss.logprobs(pair_logprobs(roles.base, batch), against, read_tokens(batch))
        numbers = [tree.number for tree in batch.trees]
        found.update(zip(numbers, implicit_margins(logprobs, settings).tolist(), strict=True))
    margins = [found[tree.number] for tree in examples]
    return {
        "pair_accuracy": share_preferred(margins),
        "margin": mean_interval(margins),
    }


if __name__ == "__main__":
    from pipeline.launch import main

    main("dpo")
