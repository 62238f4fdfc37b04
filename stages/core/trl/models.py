"""Models for trainers of TRL, and what they have learnt for Baton.

A trainer gets a `PeftModel` that peft read from an adapter in Baton's own layout, fresh or the policy's own, and what
it has learnt goes back into that layout: it is then read, checked and stored like any other role's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from pipeline.config import Lora
from pipeline.contract import Artifact
from pipeline.errors import ArtifactError, ConfigError
from reward.head import ScalarHead
from stages.core.adapters import install_norms
from stages.core.device import Compute
from stages.core.models import LanguageModel, load_model
from stages.core.roles import ADAPTER_FILE, POLICY, REFERENCE, Roles, base_of, open_base
from stages.core.scoring import replay_probes
from stages.core.trl.arguments import expected_warnings

TRAINED = "default"
"""What TRL expects an adapter to be called."""
SCORE = "base_model.model.score.weight"


def open_policy(policy: Artifact, compute: Compute) -> Roles:
    """The policy in the role of the reference, checked against its probes."""
    roles = open_base(policy, compute)
    if policy.kind == "adapter":
        roles.load(REFERENCE, policy.directory)
    with roles.use(REFERENCE):
        replay_probes(policy, roles.base)
    return roles


def first_adapter(policy: Artifact, lora: Lora, compute: Compute, directory: Path) -> Path:
    """The directory of the adapter that training begins with: the policy's, or a fresh one that is written here."""
    if policy.kind == "adapter":
        return policy.directory
    roles = open_base(policy, compute)
    roles.add(POLICY, lora)
    directory.mkdir()
    roles.save(POLICY, directory)
    return directory


def adapted(policy: Artifact, adapter: Path, compute: Compute, *, scored: bool) -> PeftModel:
    """The policy's base with an adapter to train.

    Args:
        policy: Whose base.
        adapter: Directory of the adapter.
        compute: Device and precision.
        scored: Whether it gives scores in the place of tokens; the head is then a fresh one, and trained too.

    Raises:
        ArtifactError: The adapter does not fit.
    """
    base, quantization = base_of(policy)
    loaded = load_model(base, compute, quantization=quantization)
    model = _classifier(loaded) if scored else loaded.model
    config = LoraConfig.from_pretrained(str(adapter))
    config.inference_mode = False
    config.task_type = "SEQ_CLS" if scored else "CAUSAL_LM"
    with expected_warnings():
        made: Any = get_peft_model(model, config)
    install_norms((each for each in made.modules() if isinstance(each, LoraLayer)), TRAINED)
    tensors, targets = load_file(adapter / ADAPTER_FILE), _adapter(made)
    if {name: each.shape for name, each in tensors.items()} != {name: each.shape for name, each in targets.items()}:
        raise ArtifactError("the adapter does not fit its base", where=adapter, hint="train the policy again")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])
    return made


def whole(policy: Artifact, compute: Compute) -> PreTrainedModel:
    """The policy with all weights to train, in float32."""
    model = load_model(policy, compute, dtype=torch.float32).model
    model.requires_grad_(True)
    return model


def write_adapter(model: PeftModel, first: Path, directory: Path) -> None:
    """Write what a trainer has made of an adapter, and the head that it has trained, as a role is stored."""
    directory.mkdir()
    kept = {name: tensor.detach().float().cpu().contiguous() for name, tensor in _adapter(model).items()}
    save_file(kept, directory / ADAPTER_FILE, metadata={"format": "pt"})
    LoraConfig.from_pretrained(str(first)).save_pretrained(str(directory))
    weight = get_peft_model_state_dict(model, adapter_name=TRAINED).get(SCORE)
    if weight is not None:
        head = ScalarHead(weight.shape[1])
        with torch.no_grad():
            head.linear.weight.copy_(weight)
        head.save(directory)


def trained_weights(model: PreTrainedModel, policy: Artifact, compute: Compute) -> LanguageModel:
    """The policy's model with other weights, and otherwise as it was: trainers change its configuration."""
    stored = load_model(policy, compute, dtype=torch.float32)
    stored.model.load_state_dict(model.state_dict())
    return stored


def _adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    tensors = get_peft_model_state_dict(model, adapter_name=TRAINED)
    return {name: tensor for name, tensor in tensors.items() if name != SCORE}


def _classifier(language_model: LanguageModel) -> PreTrainedModel:
    """The base with a fresh linear score in the place of its language-model head, as `transformers` begins one."""
    base = language_model.model
    base.config.num_labels = 1
    try:
        with torch.device("meta"):  # its own base, which is replaced, takes no memory
            model: Any = AutoModelForSequenceClassification.from_config(base.config)
    except ValueError as error:
        raise _no_score(base) from error
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or score.bias is not None:
        raise _no_score(base)
    setattr(model, model.base_model_prefix, base.base_model)
    model.score = nn.Linear(score.in_features, 1, bias=False, device=language_model.compute.device)
    nn.init.normal_(model.score.weight, std=base.config.get_text_config().initializer_range)
    return model


def _no_score(model: PreTrainedModel) -> ConfigError:
    return ConfigError(
        f"transformers gives {type(model).__name__} no linear score",
        where="policy",
        hint="use a reward stage, which takes any model",
    )
