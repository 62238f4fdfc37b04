"""Supervised fine-tuning on conversations.

The loss is the mean negative log-likelihood of assistant tokens, each turn's stop token included; nothing else
is trained on. With `lora` (Hu et al. 2021, arXiv 2106.09685) the adapter is merged into the stored weights at
the end, so that the stages after it have a reference with adapters off; on a base in 4 or 8 bits it is handed
on unmerged, since merging would change the base. Left out: NEFTune, dropout, and packing with more than one
conversation attending to another (there is none: trees).

    python -m stages.sft CONFIG [key=value ...]
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.batch import Layout
from data.template import set_template
from data.tree import Tree, conversation_tree
from pipeline.contract import Artifact, Context, Result
from stages.core import device, loop, memory, optim, probes, rows
from stages.core.checkpointing import checkpoint_layers
from stages.core.layout import choose_layout
from stages.core.models import LanguageModel, load_model, record
from stages.core.roles import POLICY, REFERENCE, Roles, adaptation
from stages.core.scoring import loss_metrics, mean_logprobs, negative_mean, record_probes, replay_probes

LOST, LEAST_LOST = 0.9, 0.1
"""Largest share of what training changed that rounding of merged weights may lose; and what it may in any case."""


def run(context: Context) -> Result:
    """Train, merge, and measure the loss on held-out conversations.

    Raises:
        DataError: No row can be used.
        ArtifactError: The policy is damaged or not what its manifest says.
        ConfigError: The adapter does not fit the model, or the device does not serve what is asked of it.
        NumericalError: A loss or gradient is not finite.
    """
    compute = device.for_stage(context)
    optim.require_support(context.settings.optimizer, compute.device)
    fitted = memory.fit(context, compute)
    context, settings = fitted.context, fitted.context.settings
    loop.seed_everything(context.seed)
    policy = context.inputs["policy"]
    roles = _open(context, policy, compute)
    if settings.gradient_checkpointing:
        checkpoint_layers(roles.base)
    examples = rows.examples(context, "data", conversation_tree, roles.base)
    layout, warnings = choose_layout(roles.base, examples.train, context.say)
    with roles.use(POLICY if settings.lora else REFERENCE):
        followed = _train(context, roles, examples, layout)
        metrics = loss_metrics(roles.base, examples.held_out, settings.batch_tokens, layout)
    kind, tokenizer = _save(context, roles, policy), record(roles.base)
    probed = examples.held_out or examples.train
    if kind == "adapter":
        with roles.use(POLICY):
            record_probes(context.directory, probed, roles.base)
    else:
        trained = _Outputs.of(roles, probes.choose(probed), POLICY if settings.lora else REFERENCE)
        del roles
        _record_as_loaded(context, compute, probed, trained)
    merged = adaptation(policy, merged=kind == "model" and settings.lora is not None)
    return Result(
        kind=kind,
        metrics=metrics,
        data=examples.cards,
        adaptation=merged.model_copy(update={"quantization": settings.quantization}) if settings.lora else None,
        tokenizer=tokenizer,
        tokens=followed.tokens,
        compute=compute.record,
        expected_memory=fitted.expected,
        warnings=[*warnings, *followed.warnings],
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


def _train(context: Context, roles: Roles, examples: rows.Examples, layout: Layout) -> loop.Followed:
    """Take all steps."""
    settings = context.settings
    objective = negative_mean(roles.base, settings.batch_tokens, layout)
    named = roles.parameters(POLICY) if settings.lora else roles.base.model.named_parameters()
    return loop.follow(context, examples.passes, objective, named)


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


@dataclass(frozen=True)
class _Outputs:
    """Outputs of the trained model on probes.

    Attributes:
        exact: In float32, with weights as the next stage loads them.
        own: In the run's precision.
        untrained: The same without the adapter.
    """

    exact: list[float]
    own: list[float]
    untrained: list[float]

    @classmethod
    def of(cls, roles: Roles, chosen: Sequence[Tree], role: str) -> _Outputs:
        with roles.use(REFERENCE):
            untrained = mean_logprobs(roles.base, chosen)
        with roles.use(role):
            return cls(_in_float32(roles.base, chosen), mean_logprobs(roles.base, chosen), untrained)


def _record_as_loaded(context: Context, compute: device.Compute, examples: Sequence[Tree], trained: _Outputs) -> None:
    """Record probes on the model as the next stage will load it, in the place of the one that was trained.

    Where merged weights are rounded to bfloat16, a part of the change is lost, and as much may differ.

    Raises:
        ArtifactError: It is another than gave the outputs `trained`: merging or storing went wrong.
    """
    gc.collect()  # modules refer to each other, so that letting go of a model does not free its memory
    saved, chosen = load_model(Artifact(context.directory, "model", ""), compute), probes.choose(examples)
    stored = json.loads((context.directory / "config.json").read_text()).get("dtype")
    if context.settings.lora is None or {stored, compute.record["dtype"]} == {"float32"}:
        probes.require_same(trained.exact, _in_float32(saved, chosen), probes.SAME, context.directory)
    else:
        change = max(abs(one - other) for one, other in zip(trained.own, trained.untrained, strict=True))
        tolerance = max(LOST * change, LEAST_LOST)
        probes.require_same(trained.own, mean_logprobs(saved, chosen), tolerance, context.directory)
    record_probes(context.directory, examples, saved)


def _in_float32(language_model: LanguageModel, chosen: Sequence[Tree]) -> list[float]:
    weights = language_model.compute.dtype
    return probes.computed_in_float32(
        language_model, chosen, lambda trees: mean_logprobs(language_model, trees), weights
    )


if __name__ == "__main__":
    from pipeline.launch import main

    main("sft")
