"""A stage's model as plain files that `transformers` loads, and the proof that they hold the same model.

An adapter is merged into its base as that is stored, never into a quantized copy. What was written is then read again
the way a receiver reads it and computes the stage's probes beside the base with its adapter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from data.tokenizer import load_tokenizer
from data.tree import Tree
from pipeline.contract import Artifact
from pipeline.errors import ArtifactError, ConfigError
from reward.head import ScalarHead
from stages.core import guards, probes
from stages.core.device import Compute
from stages.core.likelihood import logits_of
from stages.core.models import LanguageModel, load_model
from stages.core.roles import REFERENCE, REWARD, Roles, base_of
from stages.core.scoring import replay_probes, reward_scores

ADAPTED = "exported"
FLOAT32 = "float32"
SMALLEST = 1e-6
"""What the adapter changes is taken to be at least this: an adapter without a step changes nothing."""
LEAST = 0.01
"""The largest value is taken to be at least this: scores of a head that has hardly been trained are rounding."""
SAME = 1e-4
"""Largest accepted difference, as a share of the largest value."""
LOST = 0.5
"""In lower precision, merged weights are rounded once more than the base and its adapter are. This is the largest
difference, as a share of what the adapter changes (root mean squares), with which the lower precision is kept."""


@dataclass(frozen=True)
class Parity:
    """How an exported model compares with the stage's on the stage's probes, both computed in float32.

    Attributes:
        difference: Largest difference of two logits, or of two scores.
        largest: Largest absolute value that was compared.
        values: How many were compared.
        dtype: Precision of the exported weights.
        lost: Root mean square of the differences, as a share of what the adapter changes.
        offset: Of a reward model: what has to be added to the exported model's scores to have the stage's.
    """

    difference: float
    largest: float
    values: int
    dtype: str
    lost: float
    offset: float | None = None


def write(artifact: Artifact, directory: Path) -> Parity:
    """Fill a directory with weights, configuration, tokenizer, chat template and generation settings.

    An adapter is merged in float32 first, where the result must be exact. Then weights get the precision in which the
    base is stored, unless too much is lost: a few steps of training change weights by less than bfloat16 tells apart.

    Args:
        artifact: A verified model, adapter or reward model.
        directory: Empty.

    Raises:
        ArtifactError: The stage's model is damaged, or the written one computes something else.
        ConfigError: `transformers` has no classifier on the reward model's architecture.
    """
    roles, role = _open(artifact)
    trees = probes.trees(artifact.directory)
    if artifact.kind == "model":
        return _exact(_write(roles, role, artifact, trees, directory, "auto"), artifact)
    parity = _exact(_write(roles, role, artifact, trees, directory, torch.float32), artifact)
    if _stored_precision(artifact) == FLOAT32:
        return parity
    _empty(directory)
    rounded = _write(roles, role, artifact, trees, directory, "auto")
    if rounded.lost <= LOST:
        return rounded
    _empty(directory)
    return _write(roles, role, artifact, trees, directory, torch.float32)


def _exact(parity: Parity, artifact: Artifact) -> Parity:
    """Raise ArtifactError where an exported model that was rounded nowhere differs from the stage's."""
    if not parity.difference <= SAME * max(parity.largest, LEAST):
        raise ArtifactError(
            f"the exported model differs from the stage's by up to {parity.difference:.3g}, at values of up to "
            f"{parity.largest:.3g} ({SAME:.0e} of that is accepted)",
            where=artifact.directory,
            hint="use the stage's own files: its base and the adapter beside it",
        )
    return parity


def _stored_precision(artifact: Artifact) -> str | None:
    """The precision that the base's configuration states."""
    config: dict[str, Any] = json.loads((base_of(artifact)[0].directory / "config.json").read_text())
    return config.get("dtype") or config.get("torch_dtype")


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def _write(
    roles: Roles, role: str, artifact: Artifact, trees: Sequence[Tree], directory: Path, dtype: torch.dtype | str
) -> Parity:
    merged = _merged(roles, role, artifact, dtype)
    if artifact.kind == "reward":
        return _write_reward(roles, merged, trees, directory)
    return _write_language_model(roles, role, merged, trees, directory)


def _open(artifact: Artifact) -> tuple[Roles, str]:
    """The stage's model in float32 on the processor, as a role on its base; what was recorded of it must hold."""
    compute = Compute(torch.device("cpu"), torch.float32)
    stored, quantization = base_of(artifact)
    base = load_model(stored, compute)
    roles = Roles(replace(base, tokenizer=load_tokenizer(artifact.directory)))
    role = {"model": REFERENCE, "adapter": ADAPTED, "reward": REWARD}[artifact.kind]
    if artifact.kind != "model":
        roles.load(role, artifact.directory)
    if quantization == "none":  # otherwise probes were recorded on a base that computes something else
        with roles.use(role):
            _replay(artifact, roles, role)
    return roles, role


def _replay(artifact: Artifact, roles: Roles, role: str) -> None:
    if artifact.kind == "reward":
        probes.replay(artifact.directory, lambda trees: reward_scores(roles, role, trees), roles.base)
    else:
        replay_probes(artifact, roles.base)


def _merged(roles: Roles, role: str, artifact: Artifact, dtype: torch.dtype | str) -> LanguageModel:
    """A model of its own; `auto` is the precision that the base is stored in."""
    stored, _ = base_of(artifact)
    if artifact.kind != "model":
        return roles.merged(role, stored, dtype)
    return replace(load_model(stored, roles.base.compute, dtype=dtype), tokenizer=roles.base.tokenizer)


def _write_language_model(
    roles: Roles, role: str, merged: LanguageModel, trees: Sequence[Tree], directory: Path
) -> Parity:
    merged.end_turns()
    merged.save(directory)
    written = _read(AutoModelForCausalLM, directory)
    tokens = [_tokens(tree) for tree in trees]

    @torch.no_grad()
    def logits(role: str) -> list[Tensor]:
        with roles.use(role):
            return [_logits(roles.base.model, each) for each in tokens]

    with torch.no_grad():
        found = [written(each).logits.float() for each in tokens]
    return _parity(found, logits(role), logits(REFERENCE), merged)


def _write_reward(roles: Roles, merged: LanguageModel, trees: Sequence[Tree], directory: Path) -> Parity:
    """The classifier that `transformers` makes of the architecture reads a score without a bias off the last token.

    Where responses end with the tokenizer's padding token, as with many published models, the classifier pads with
    another control token: it reads the last token that is not padding.
    """
    head = roles.heads[REWARD]
    classifier, padding = _classifier(merged, head), merged.template.padding_id
    guards.require_finite_weights(classifier.named_parameters())
    classifier.config.pad_token_id = padding
    classifier.save_pretrained(directory)
    merged.tokenizer.pad_token = merged.tokenizer.convert_ids_to_tokens(padding)
    merged.tokenizer.save_pretrained(directory)
    written = _read(AutoModelForSequenceClassification, directory)
    with torch.no_grad():
        scores = _classified(written, trees, padding)
    expected = torch.tensor(reward_scores(roles, REWARD, trees))
    offset = float(head.linear.bias.mean() - head.mean)
    with torch.no_grad(), roles.use(REFERENCE):
        states = [roles.base.model.base_model(_tokens(tree)).last_hidden_state[0, -1:] for tree in trees]
        unadapted = torch.cat([head(each) for each in states])
    return replace(_parity([scores + offset], [expected], [unadapted], merged), offset=offset)


def _classifier(merged: LanguageModel, head: ScalarHead) -> PreTrainedModel:
    model = merged.model
    config = model.config.__class__.from_dict({**model.config.to_dict(), "num_labels": 1, "architectures": None})
    try:
        classifier: Any = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
        weight = classifier.score.weight
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"transformers has no classifier with a score on {type(model).__name__}",
            where="architecture",
            hint="use the reward stage's adapter and head.safetensors as they are",
        ) from error
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    with torch.no_grad():
        weight.copy_(head.linear.weight.mean(0, keepdim=True))
    return classifier.eval()


def _classified(classifier: Any, trees: Sequence[Tree], padding: int) -> Tensor:
    """Scores of all probes in one batch, padded on the right as `transformers` pads them for a classifier."""
    rows = [_tokens(tree)[0] for tree in trees]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    found: Tensor = classifier(input_ids=padded, attention_mask=mask).logits[:, 0].float()
    return found


def _read(kind: Any, directory: Path) -> Any:
    """The written model as a receiver reads it, in float32."""
    model = kind.from_pretrained(
        directory, use_safetensors=True, local_files_only=True, trust_remote_code=False, dtype=torch.float32
    )
    return model.eval()


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return logits_of(model, model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)


def _tokens(tree: Tree) -> Tensor:
    """[1, tokens]"""
    return torch.tensor([[*tree.prompt, *tree.branches[0].tokens]])


def _parity(
    found: Sequence[Tensor], expected: Sequence[Tensor], unadapted: Sequence[Tensor], merged: LanguageModel
) -> Parity:
    differences = [one - other for one, other in zip(found, expected, strict=True)]
    changes = [one - other for one, other in zip(expected, unadapted, strict=True)]
    return Parity(
        difference=max(float(each.abs().max()) for each in differences),
        largest=max(float(each.abs().max()) for each in expected),
        values=sum(each.numel() for each in expected),
        dtype=str(merged.model.dtype).removeprefix("torch."),
        lost=_size(differences) / max(_size(changes), SMALLEST),
    )


def _size(tensors: Sequence[Tensor]) -> float:
    """Root mean square."""
    return torch.cat([each.flatten() for each in tensors]).square().mean().sqrt().item()
