"""Loading and saving language models: strictly, from safetensors only, with tokenizer and chat template beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from data.template import ChatTemplate, tokenizer_record
from pipeline.contract import Artifact
from pipeline.errors import ConfigError
from pipeline.model_files import unreadable
from stages.core import guards, handover, norms
from stages.core.device import Compute
from stages.core.likelihood import logits_of

HEAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.02}
"""Logits that the head alone explains differ by rounding at most, of what is done to them after the head."""
QUANTIZED_LAYERS = ("Linear4bit", "Linear8bitLt")
"""The layers of bitsandbytes."""
QUANTIZED = ("cuda", "cpu")
"""Devices on which bitsandbytes computes with quantized weights and passes gradients on."""

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer and where it computes."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    compute: Compute

    def __post_init__(self) -> None:
        norms.speed_up(self.model)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of the tokenizer."""
        return ChatTemplate(self.tokenizer)

    @property
    def positions(self) -> int | None:
        """Tokens of the longest sequence that the model is made for; None where it has no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or None

    def longest(self, max_length: int) -> int:
        """`max_length`, but not more than the model's positions where it has a limit."""
        return min(max_length, self.positions or max_length)

    @property
    def hidden_size(self) -> int:
        """Width of the final hidden states."""
        return int(self.model.config.hidden_size)

    def end_turns(self) -> None:
        """Have `generate` end where the chat template ends a turn, and where the model ended its texts before."""
        before: Any = self.model.generation_config
        known = before.eos_token_id if isinstance(before.eos_token_id, list) else [before.eos_token_id]
        ends = [self.template.stop_id, *known, self.tokenizer.eos_token_id]
        own = {
            "eos_token_id": list(dict.fromkeys(each for each in ends if each is not None)),
            "pad_token_id": self.tokenizer.pad_token_id,
            "_from_model_config": False,  # or `generate` would take the ids of the model's configuration again
        }
        self.model.generation_config = GenerationConfig.from_dict({**before.to_dict(), **own})

    def save(self, directory: Path) -> None:
        """Write weights, configuration, tokenizer and template; refuses weights that are not finite."""
        guards.require_finite_weights(self.model.named_parameters())
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def load_model(
    artifact: Artifact, compute: Compute, *, dtype: torch.dtype | str | None = None, quantization: str = "none"
) -> LanguageModel:
    """Load the weights of a `model` artefact.

    Args:
        artifact: A verified model directory.
        compute: Device and precision.
        dtype: Precision of the weights; by default `compute.dtype`, which is right for frozen ones; `auto` is the
            stored one.
        quantization: `4bit` for NF4, `8bit` for LLM.int8.

    Raises:
        ArtifactError: It cannot be read; a tensor is missing, unexpected, of another shape or not finite; the
            vocabulary does not cover the tokenizer; the tokenizer is not the stage's own, or the configuration means
            other special tokens.
        ConfigError: The quantization is not to be had here.
    """
    options: dict[str, Any] = {"dtype": dtype or compute.dtype}
    if compute.device.type == "cuda":
        options["device_map"] = {"": compute.device}  # then they are not in the processor's memory first
    if quantization != "none":
        require_quantization(quantization, compute.device)
        options |= _quantized(quantization, compute)
    # With `output_loading_info` it returns a pair, which its annotation leaves out.
    with unreadable(artifact.directory, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            artifact.directory,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Then they are in the report, which is read below, instead of an error that does not name them.
            ignore_mismatched_sizes=True,
            **options,
        )
    model, report = loaded
    handover.require_complete(report, artifact.directory)
    if quantization == "none":
        model.to(compute.device)
    else:
        _keep_differentiable(model)
    guards.require_finite_weights(model.named_parameters(), artifact.directory)
    tokenizer = handover.open_tokenizer(artifact)
    handover.require_vocabulary(model, tokenizer, artifact.directory)
    handover.require_special_ids(artifact.directory, tokenizer)
    model.requires_grad_(False)
    model.eval()
    require_plain_head(model)
    return LanguageModel(model, tokenizer, compute)


@torch.no_grad()
def require_plain_head(model: PreTrainedModel) -> None:
    """Raise ConfigError when a model's logits are not what `logits_of` makes of its final hidden states.

    Baton runs the head only where a token is read; models that do more after it would be read wrongly.
    """
    device = next(model.parameters()).device
    tokens = torch.arange(8, device=device)[None]
    states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    own = model(input_ids=tokens, use_cache=False).logits
    rounding = HEAD_TOLERANCE.get(own.dtype, HEAD_TOLERANCE[torch.bfloat16])
    if not torch.allclose(logits_of(model, states), own.float(), rtol=rounding, atol=rounding):
        raise ConfigError(
            f"{type(model).__name__} changes its logits after the head, which is not supported",
            where="architecture",
            hint="use an architecture whose logits are the head's, such as Llama, Qwen, Mistral or GPT-2",
        )


def record(language_model: LanguageModel) -> dict[str, Any]:
    """What the manifest says of the tokenizer."""
    return tokenizer_record(language_model.tokenizer)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, lowest first.

    Raises:
        ConfigError: The architecture does not keep them in one list.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ConfigError(
        f"{type(model).__name__} does not keep its {count} decoder layers in one list",
        where="architecture",
        hint="leave out gradient_checkpointing and lora.top_layers, or use an architecture such as Llama or Qwen",
    )


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes' own; peft calls its adapters on them by the same names."""
    kinds = type(layer).__mro__
    return any(kind.__name__ in QUANTIZED_LAYERS and kind.__module__.startswith("bitsandbytes") for kind in kinds)


def require_quantization(quantization: str, device: torch.device) -> None:
    """Raise ConfigError where a base in 4 or 8 bits does not work on the device, or bitsandbytes is missing."""
    if device.type not in QUANTIZED:
        raise ConfigError(
            f"quantization={quantization} does not work on {device.type}",
            where="quantization",
            hint=f"use quantization=none, or device={' or '.join(QUANTIZED)}",
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization={quantization} needs bitsandbytes", where="quantization", hint="pip install bitsandbytes"
        )


def _quantized(quantization: str, compute: Compute) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    four_bit = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute.dtype,
    }
    settings = BitsAndBytesConfig(**(four_bit if quantization == "4bit" else {"load_in_8bit": True}))
    return {"quantization_config": settings, "device_map": {"": compute.device}}


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Switch off bitsandbytes' repacking of 4-bit layers for inference on processors with bfloat16 instructions.

    It repacks a layer for good when no gradient reaches its input, as behind a frozen embedding, and a repacked
    layer passes no gradient on.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
