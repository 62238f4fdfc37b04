"""Where the tokens of data come from: the tokenizer and chat template of a stage, or those that the user names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import inputs
from pipeline.config import RunSettings, Stage
from pipeline.errors import ConfigError
from pipeline.store import RunDirectory
from pipeline.terminal import printable

if TYPE_CHECKING:
    from data.template import ChatTemplate


@dataclass(frozen=True)
class Origin:
    """What makes tokens."""

    tokenizer: str
    """A stage directory, a model directory or a hub model."""
    chat_template: str | None = None
    """The file of the chat template that replaces the tokenizer's own."""
    architecture: Mapping[str, Any] | None = field(default=None, hash=False)
    """Of the model, where a stage makes one from nothing."""


@dataclass(frozen=True)
class Encoder:
    """What makes tokens, opened."""

    template: ChatTemplate
    positions: int | None
    """Longest example that the model can read; None where there is no limit."""


def origin_of(settings: RunSettings, stage: Stage) -> Origin | None:
    """What a stage's tokens are made with; None for a stage without a tokenizer.

    Stages hand on their tokenizer as it is, but for the chat template of sft stages. So this is the tokenizer that the
    chain begins with and the last template on the way, and holds for stages that have not run with these settings.
    """
    fields: dict[str, Any] = dict(stage)
    roles = stage.roles()
    reference = roles.get("policy") or roles.get("tokenizer") or roles.get("models.0")
    if reference is None:
        return None
    chat_template: str | None = fields.get("chat_template")
    parent = settings.stages.get(reference)
    before = origin_of(settings, parent) if parent else None
    if before:
        return replace(before, chat_template=chat_template or before.chat_template)
    directory = str(RunDirectory.of(settings).stage(reference)) if parent else reference
    return Origin(directory, chat_template, fields.get("architecture"))


def open_template(origin: Origin, *, download: bool = True) -> ChatTemplate:
    """A tokenizer with its chat template.

    Raises:
        ArtifactError: There is no such tokenizer, it is damaged, or it would have to be downloaded against `download`.
        ConfigError: The chat template's file cannot be used.
    """
    from data.template import ChatTemplate, set_template
    from data.tokenizer import load_tokenizer

    artifact = inputs.resolve(origin.tokenizer, RunDirectory(Path()), (), download=download)
    tokenizer = load_tokenizer(artifact.directory)
    if origin.chat_template is not None:
        set_template(tokenizer, Path(origin.chat_template))
    return ChatTemplate(tokenizer)


def open_encoder(origin: Origin) -> Encoder:
    """The tokenizer with its chat template, and how much its model can read.

    Raises:
        ArtifactError: There is no such tokenizer, or it is damaged.
        ConfigError: The chat template's file or the architecture cannot be used.
    """
    template = open_template(origin)
    return Encoder(template, _positions(origin, Path(template.tokenizer.name_or_path)))


def _positions(origin: Origin, directory: Path) -> int | None:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig

    config: PreTrainedConfig
    try:
        if origin.architecture is not None:
            config = AutoConfig.for_model(**origin.architecture)
        elif (directory / "config.json").is_file():
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        else:
            return None
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = printable(" ".join(str(error).split()), 300)
        raise ConfigError(f"transformers cannot build the model: {reason}", where="architecture") from error
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found
