"""Supervised fine-tuning on conversations.

The loss is the mean negative log-likelihood of assistant tokens, each turn's stop token included; nothing else
is trained on. With `lora` (Hu et al. 2021, arXiv 2106.09685) the adapter is merged into the stored weights at
the end, so that the stages after it have a reference with adapters off; on a 4-bit base it is handed on
unmerged, since merging would change the base. Left out: NEFTune, dropout, and packing with more than one
conversation attending to another (there is none: trees).

    python -m stages.sft CONFIG [key=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from data.template import set_template
from data.tree import Tree, conversation_tree
from pipeline.contract import Artifact, Context, Result
from stages.core import device, loop, rows
from stages.core.forward import choose_layout
from stages.core.models import load_model, record
from stages.core.roles import POLICY, REFERENCE, Roles, adaptation
from stages.core.scoring import loss_metrics, negative_mean, record_probes, replay_probes


def run(context: Context) -> Result:
    """Train, merge, and measure the loss on held-out conversations.

    Raises:
        DataError: No row can be used.
        ArtifactError: The policy is damaged or not what its manifest says.
        NumericalError: A loss or gradient is not finite.
    """
    settings, compute = context.settings, device.choose(context.device, context.dtype)
    loop.seed_everything(context.seed)
    policy = context.inputs["policy"]
    roles = _open(context, policy, compute)
    examples = rows.examples(context, "data", conversation_tree, roles.base)
    layout, warnings = choose_layout(roles.base.model, examples.train)
    with roles.use(POLICY if settings.lora else REFERENCE):
        objective = negative_mean(roles.base, settings.tokens_per_batch, layout)
        named = roles.parameters(POLICY) if settings.lora else roles.base.model.named_parameters()
        tokens = loop.follow(context, examples.passes, objective, named)
        metrics = loss_metrics(roles.base, examples.held_out, settings.tokens_per_batch, layout)
    kind = _save(context, roles, policy)
    _record_probes(context, roles, kind, compute, examples.held_out or examples.train)
    merged = adaptation(policy, merged=kind == "model" and settings.lora is not None)
    return Result(
        kind=kind,
        metrics=metrics,
        data=examples.cards,
        adaptation=merged.model_copy(update={"quantization": settings.quantization}) if settings.lora else None,
        tokenizer=record(roles.base),
        tokens=tokens,
        compute=compute.record,
        warnings=warnings,
    )


def _open(context: Context, policy: Artifact, compute: device.Compute) -> Roles:
    settings = context.settings
    if settings.lora is None:
        replay_probes(policy, load_model(policy, compute))
        full = load_model(policy, compute, dtype=torch.float32)
        full.model.requires_grad_(True)
        roles = Roles(full)
    else:
        base = load_model(policy, compute, quantization=settings.quantization)
        if settings.quantization == "none":
            replay_probes(policy, base)
        roles = Roles(base)
        roles.add(POLICY, settings.lora)
    if settings.chat_template is not None:
        set_template(roles.base.tokenizer, Path(settings.chat_template))
    return roles


def _save(context: Context, roles: Roles, policy: Artifact) -> str:
    settings = context.settings
    if settings.lora is None:
        roles.base.save(context.directory)
        return "model"
    if settings.quantization != "none":
        roles.save(POLICY, context.directory)
        return "adapter"
    roles.merged(POLICY, policy).save(context.directory)
    return "model"


def _record_probes(
    context: Context, roles: Roles, kind: str, compute: device.Compute, examples: Sequence[Tree]
) -> None:
    """Record them on the result as the next stage will load it."""
    if kind == "adapter":
        with roles.use(POLICY):
            record_probes(context.directory, examples, roles.base)
        return
    saved = load_model(Artifact(context.directory, "model", ""), compute)
    record_probes(context.directory, examples, saved)


if __name__ == "__main__":
    from pipeline.launch import main

    main("sft")
