"""Train a causal language model on packed text, from nothing or from an existing model.

Next-token prediction. Documents, each closed by the end token, are laid end to end in a shuffled order and cut
into blocks of equal length; no token is padding and none is thrown away but the last incomplete block. Any
causal architecture of `transformers` serves. Weights are float32; matrix products run in the run's precision. With
`document_masks` the documents of a block do not attend to each other, and the first token of each is not
predicted. Left out: distributed training, and compiling the model, which docs/LOG.md has the figures of.

    python -m stages.pretrain CONFIG [key=value ...]
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from data.tree import Branch, Tree
from pipeline.contract import Artifact, Context, Result
from pipeline.errors import ConfigError, DataError
from stages.core import device, loop, memory, optim, rows
from stages.core.checkpointing import checkpoint_layers
from stages.core.handover import open_tokenizer
from stages.core.layout import choose_layout
from stages.core.models import LanguageModel, load_model, record, require_plain_head
from stages.core.scoring import loss_metrics, negative_mean, record_probes, replay_probes

HELD_OUT_BLOCKS = 64


def run(context: Context) -> Result:
    """Train on the training blocks; measure loss on held-out ones.

    Raises:
        DataError: There is not enough text for one block.
        NumericalError: A loss or gradient is not finite.
    """
    compute = device.for_stage(context)
    optim.require_support(context.settings.optimizer, compute.device)
    fitted = memory.fit(context, compute)
    context, settings = fitted.context, fitted.context.settings
    loop.seed_everything(context.seed)
    language_model = _open(context, compute)
    if settings.gradient_checkpointing:
        checkpoint_layers(language_model)
    documents = rows.documents(context, "data", language_model.tokenizer)
    blocks = documents.train.blocks(settings.max_length, settings.document_masks)
    if not len(blocks):
        raise DataError(
            f"less than {settings.max_length} tokens of text",
            where=", ".join(source.name for source in context.data.values()),
            hint=f"give more text or lower stages.{context.name}.max_length",
        )
    layout, warnings = choose_layout(language_model, blocks.pass_(0)[:2], context.say)
    objective = negative_mean(language_model, settings.batch_tokens, layout)
    followed = loop.follow(context, blocks, objective, language_model.model.named_parameters())
    language_model.model.eval()
    held_out = documents.held_out.blocks(settings.max_length, settings.document_masks).pass_(0)[:HELD_OUT_BLOCKS]
    metrics = loss_metrics(language_model, held_out, settings.batch_tokens, layout)
    language_model.save(context.directory)
    _record_probes(context, compute, held_out or blocks.pass_(0)[:HELD_OUT_BLOCKS])
    return Result(
        kind="model",
        metrics=metrics,
        data=documents.cards,
        tokenizer=record(language_model),
        tokens=followed.tokens,
        compute=compute.record,
        expected_memory=fitted.expected,
        warnings=[*warnings, *followed.warnings],
    )


def _open(context: Context, compute: device.Compute) -> LanguageModel:
    if "policy" in context.inputs:
        replay_probes(context.inputs["policy"], load_model(context.inputs["policy"], compute))
        language_model = load_model(context.inputs["policy"], compute, dtype=torch.float32)
        _require_positions(language_model, context.settings.max_length)
    else:
        tokenizer = open_tokenizer(context.inputs["tokenizer"])
        language_model = from_nothing(context.settings.architecture, tokenizer, compute, context.settings.max_length)
    language_model.model.requires_grad_(True).train()
    return language_model


def from_nothing(
    architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase, compute: device.Compute, max_length: int
) -> LanguageModel:
    """A model with random weights for the tokenizer's vocabulary, in evaluation mode.

    Raises:
        ConfigError: The architecture is unknown, has an unknown key, or is too short for the blocks.
    """
    options = dict(architecture)
    if "model_type" not in options:
        raise ConfigError("`model_type` is missing", where="architecture", hint="name one, as in `model_type: llama`")
    kind = options.pop("model_type")
    _require_known(kind, list(CONFIG_MAPPING.keys()), "architecture.model_type")
    filled = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    known = AutoConfig.for_model(kind)
    for key in options:
        if key in filled:
            raise ConfigError(f"`{key}` comes from the tokenizer", where="architecture", hint="leave it out")
        _require_known(key, [*known.to_dict(), *known.attribute_map], "architecture")
    try:
        config = AutoConfig.for_model(kind, **options, **filled)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except (ValueError, TypeError, ArithmeticError, RuntimeError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"transformers cannot build it: {reason}", where="architecture") from error
    language_model = LanguageModel(model.to(compute.device), tokenizer, compute)
    _require_positions(language_model, max_length)
    require_plain_head(model)
    return language_model


def _require_positions(language_model: LanguageModel, max_length: int) -> None:
    positions = language_model.longest(max_length)
    if positions < max_length:
        raise ConfigError(
            f"blocks of {max_length} tokens do not fit {positions} positions",
            where="max_length",
            hint="lower max_length, or train from nothing with a larger architecture.max_position_embeddings",
        )


def _require_known(name: Any, known: Sequence[str], where: str) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(str(name), known, 1)
    hint = f"did you mean `{close[0]}`?" if close else "see the configuration classes of transformers"
    raise ConfigError(f"`{name}` is not known to transformers", where=where, hint=hint)


def _record_probes(context: Context, compute: device.Compute, blocks: Sequence[Tree]) -> None:
    """Record them on the model as the next stage will load it."""
    saved = load_model(Artifact(context.directory, "model", ""), compute)
    short = [Tree(block.prompt, (Branch.of(block.branches[0].tokens[:32]),), block.number) for block in blocks]
    record_probes(context.directory, short, saved)


if __name__ == "__main__":
    from pipeline.launch import main

    main("pretrain")
