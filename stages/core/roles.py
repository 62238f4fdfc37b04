"""Several roles on one base: policy, reference, reward model and value function.

The base is in memory once. Each role is a LoRA adapter on it, with a scalar head where it yields numbers; the
reference is the base with adapters off, or a frozen adapter where the policy began as one. Switching a role
sets which adapter is active and nothing else: unlike peft's `set_adapter` it never touches `requires_grad`, so
a switch cannot lose a gradient. A backward pass under another role than its forward pass, which would compute
checkpointed layers again with the wrong adapter, is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.config import Lora
from pipeline.contract import Artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.manifest import Adaptation
from pipeline.model_files import unreadable
from reward.head import FILE_NAME as HEAD_FILE
from reward.head import ScalarHead
from stages.core import adapters, guards, handover
from stages.core.device import Compute
from stages.core.lora import speed_up
from stages.core.models import LanguageModel, load_model

POLICY, REFERENCE, REWARD, VALUE = "policy", "reference", "reward", "value"
ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


class Roles:
    """One base and the adapters on it.

    Attributes:
        base: The language model; its layers carry the adapters in place.
        heads: Scalar heads by role.
        warnings: What a stage's manifest has to say of them.
    """

    def __init__(self, base: LanguageModel) -> None:
        self.base = base
        self.heads: dict[str, ScalarHead] = {}
        self.warnings: list[str] = []
        self._peft: PeftModel | None = None
        self._trained: set[str] = set()
        self._current: str | None = None
        base.model.base_model.register_forward_hook(self._bind)

    def add(self, role: str, lora: Lora) -> None:
        """A fresh adapter to train; its update starts at zero.

        Raises:
            ConfigError: The adapter does not fit the model.
        """
        self._inject(role, adapters.peft_config(lora, self.base.model))
        if lora.initialisation == "pissa":
            adapters.start_principal(self._layers(), role)
        self._trained.add(role)
        self._freeze_the_rest()

    def load(self, role: str, directory: Path) -> None:
        """A frozen adapter from a stage directory, with its scalar head when it has one, as a reward model must.

        Raises:
            ArtifactError: A file or tensor is missing, unexpected, of another shape or not finite.
        """
        config, tensors = _read_adapter(directory)
        self._inject(role, config)
        self._fill(role, tensors, directory)
        if role == REWARD or (directory / HEAD_FILE).is_file():
            head = ScalarHead.load(directory, self.base.hidden_size)
            guards.require_finite_weights(head.state_dict().items(), directory / HEAD_FILE)
            self.heads[role] = head.to(self.base.compute.device)
        self._freeze_the_rest()

    def copy(self, source: str, role: str) -> None:
        """A new adapter to train that starts as a copy of another role's, head included."""
        assert self._peft is not None
        self._inject(role, self.config(source))
        self._fill(role, self._tensors(source), Path(source))
        if source in self.heads:
            self.add_head(role)
            self.heads[role].load_state_dict(self.heads[source].state_dict())
        self._trained.add(role)
        self._freeze_the_rest()

    def add_head(self, role: str) -> None:
        """A fresh scalar head."""
        self.heads[role] = ScalarHead(self.base.hidden_size).to(self.base.compute.device)

    @contextmanager
    def use(self, role: str) -> Iterator[None]:
        """Compute as this role; forward and backward both belong inside.

        REFERENCE without an adapter is the bare base.
        """
        layers = self._layers()
        before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
        has_adapter = self.has(role)
        if not has_adapter and role != REFERENCE:
            raise ValueError(f"no role `{role}`")
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [role], not has_adapter
        previous, self._current = self._current, role
        try:
            yield
        finally:
            self._current = previous
            for layer, (active, disabled) in zip(layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    def has(self, role: str) -> bool:
        """Whether the role has an adapter of its own."""
        return self._peft is not None and role in self._peft.peft_config

    def config(self, role: str) -> LoraConfig:
        """The shape of a role's adapter."""
        assert self._peft is not None
        config = self._peft.peft_config[role]
        assert isinstance(config, LoraConfig)
        return config

    def parameters(self, role: str) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of a role's adapter and head."""
        adapter = [(name, parameter) for name, parameter in self.base.model.named_parameters() if _belongs(name, role)]
        head = self.heads[role].named_parameters() if role in self.heads else ()
        return adapter + [(f"head.{name}", parameter) for name, parameter in head]

    def save(self, role: str, directory: Path) -> None:
        """Write the adapter as peft lays it out, the head beside it, and the tokenizer.

        `adapter_config.json` names no base: the manifest does.
        """
        assert self._peft is not None
        guards.require_finite_weights(self.parameters(role))
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors(role).items()}
        save_file(kept, directory / ADAPTER_FILE, metadata={"format": "pt"})
        config = self.config(role)
        config.base_model_name_or_path = None
        config.inference_mode = True
        if isinstance(config.target_modules, set):  # of names, in another order in every process
            config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(directory))
        if role in self.heads:
            self.heads[role].save(directory)
        self.base.tokenizer.save_pretrained(directory)

    def merged(self, role: str, artifact: Artifact, dtype: torch.dtype | str = "auto") -> LanguageModel:
        """A model of its own, in the precision it was stored in or another, with the role's adapter merged.

        The weights are read again rather than merged in place: this base may be held in a lower precision. They are
        read into the host's memory, so that an accelerator need not hold both.
        """
        assert self._peft is not None
        host = replace(self.base.compute, device=torch.device("cpu"))
        stored = Roles(load_model(artifact, host, dtype=dtype))
        stored._inject(role, self.config(role))
        stored._fill(role, self._tensors(role), artifact.directory)
        assert stored._peft is not None
        return LanguageModel(stored._peft.merge_and_unload(), self.base.tokenizer, host)

    def _bind(self, module: nn.Module, arguments: object, output: Any) -> None:
        """Have the backward pass of these hidden states refuse another role than this one."""
        states, role = output.last_hidden_state, self._current
        if states.requires_grad:
            states.register_hook(lambda gradient: self._require(role))

    def _require(self, role: str | None) -> None:
        if self._current != role:
            raise RuntimeError(f"the forward pass was {role}'s, the backward pass runs as {self._current}")

    def _inject(self, role: str, config: LoraConfig) -> None:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 a question by the name that it had before.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            # It transposes GPT-2's layers as they need, and says so.
            warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
            try:
                if self._peft is None:
                    self._peft = PeftModel(self.base.model, config, adapter_name=role)
                else:
                    self._peft.add_adapter(role, config)
            except ValueError as error:
                reason = " ".join(str(error).split())[:300]
                hint = "name linear layers of the model, as in [q_proj, v_proj], or leave it out to adapt all"
                what = f"the adapter does not fit the model: {reason}"
                raise ConfigError(what, where="lora.targets", hint=hint) from error
        adapters.install_norms(self._layers(), role)
        # peft puts new adapters on the processor and leaves the model in train mode.
        self._peft.to(self.base.compute.device)
        self._peft.eval()
        speed_up(self.base.model)

    def _tensors(self, role: str) -> dict[str, Tensor]:
        """A role's adapter by peft's names."""
        assert self._peft is not None
        found: dict[str, Tensor] = get_peft_model_state_dict(
            self._peft, state_dict=adapters.state_of(self._peft), adapter_name=role
        )
        return found

    def _fill(self, role: str, tensors: dict[str, Tensor], origin: Path) -> None:
        assert self._peft is not None
        targets = get_peft_model_state_dict(self._peft, adapter_name=role)
        expected = {name: tuple(tensor.shape) for name, tensor in targets.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            odd = sorted(set(found.items()) ^ set(expected.items()))[0][0]
            in_file, in_model = found.get(odd, "absent"), expected.get(odd, "absent")
            raise ArtifactError(
                f"the adapter does not fit its base at `{odd}`: {in_file} in the file, {in_model} in the model",
                where=origin,
                hint="use the base that the adapter was trained on",
            )
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(tensors[name])

    def _layers(self) -> list[LoraLayer]:
        return [module for module in self.base.model.modules() if isinstance(module, LoraLayer)]

    def _freeze_the_rest(self) -> None:
        self.base.model.requires_grad_(False)
        for role in self._trained:
            for _, parameter in self.parameters(role):
                parameter.requires_grad_(True)
        for role, head in self.heads.items():
            head.requires_grad_(role in self._trained)


def open_base(artifact: Artifact, compute: Compute) -> Roles:
    """The base under a model, adapter or reward artefact, alone in memory and frozen, with the artefact's tokenizer."""
    model, quantization = base_of(artifact)
    base = load_model(model, compute, quantization=quantization)
    return Roles(base if model is artifact else replace(base, tokenizer=handover.open_tokenizer(artifact)))


def open_role(artifact: Artifact, role: str, lora: Lora, compute: Compute) -> Roles:
    """The base with a role to train and a reference, which at the start computes the same.

    On a model, the role is a fresh adapter and the reference is the base with adapters off. On an adapter, the
    reference is that adapter, frozen, and the role a copy of it; `lora` then has no say, since the copy keeps
    its shape.
    """
    roles = open_base(artifact, compute)
    if artifact.kind == "model":
        roles.add(role, lora)
        return roles
    roles.load(REFERENCE, artifact.directory)
    roles.copy(REFERENCE, role)
    if otherwise := adapters.not_followed(lora, roles.config(REFERENCE)):
        roles.warnings.append(f"lora has no say, {artifact.source} is an adapter already: {', '.join(otherwise)}")
    return roles


def base_of(artifact: Artifact) -> tuple[Artifact, str]:
    """The model that an artefact sits on (itself, if it is one), and how it was quantized in training."""
    if artifact.kind == "model":
        return artifact, "none"
    if artifact.base is None or artifact.manifest is None or artifact.manifest.adaptation is None:
        raise ArtifactError("the adapter's base is not known", where=artifact.directory, hint="train the stage again")
    return artifact.base, artifact.manifest.adaptation.quantization


def adaptation(artifact: Artifact, *, reference: Artifact | None = None, merged: bool = False) -> Adaptation:
    """What the manifest of a stage that adapted `artifact` says of its base."""
    base, quantization = base_of(artifact)
    return Adaptation(
        base=base.digest,
        base_source=base.source,
        reference=reference.digest if reference else None,
        merged=merged,
        quantization=quantization,
    )


def _belongs(name: str, role: str) -> bool:
    """Whether a parameter is one of the role's adapter: `...lora_A.ROLE.weight`."""
    return any(kind.startswith("lora_") and owner == role for kind, owner in pairwise(name.split(".")))


def _read_adapter(directory: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    for path in (directory / ADAPTER_FILE, directory / CONFIG_FILE):
        if not path.is_file():
            raise ArtifactError("a file of the adapter is missing", where=path, hint="train the stage again")
    with unreadable(directory, "adapter"):
        config, tensors = LoraConfig.from_pretrained(str(directory)), load_file(directory / ADAPTER_FILE)
    guards.require_finite_weights(tensors.items(), directory / ADAPTER_FILE)
    return config, tensors
