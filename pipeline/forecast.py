"""What the stages of a run will need of memory and positions, as far as configuration files and headers of models tell.

Nothing is loaded, and nothing asks the device: where `auto` leaves device or precision open, the processor's flags and
the presence of NVIDIA's driver decide here, and the stage itself looks again when it starts.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import available, inputs, memory, shape
from pipeline.config import Batched, PretrainSettings, RunSettings, SftSettings, TokenizerSettings, TrlSettings
from pipeline.contract import Artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.manifest import MemoryEstimate
from pipeline.memory import Task
from pipeline.plan import Decision, sources
from pipeline.shape import Base, UnknownShape
from pipeline.suites import SampledSuite

DRIVER = Path("/proc/driver/nvidia/version")
FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
"""What processors that compute in bfloat16 say of themselves."""

Forecast = MemoryEstimate | str
"""The estimate, or why there is none."""


def forecasts(settings: RunSettings, decisions: Sequence[Decision]) -> dict[str, Forecast]:
    """Stage -> its estimate; stages that compute with no model are left out."""
    return _Forecaster(settings, decisions).all()


def require_fit(settings: RunSettings, decisions: Sequence[Decision]) -> None:
    """See that the stages that will run fit their models: that responses leave room for prompts in the positions, and
    that there are as many layers as are to be adapted.

    Models of which nothing tells that are left to the stage.

    Raises:
        ConfigError: They do not.
    """
    forecaster = _Forecaster(settings, decisions)
    for decision in decisions:
        if decision.run:
            forecaster.require_room(decision.stage)
            forecaster.require_layers(decision.stage)


def record(forecast: Forecast) -> dict[str, Any]:
    """For JSON."""
    if isinstance(forecast, str):
        return {"unknown": forecast}
    return {"total": forecast.total, **forecast.model_dump()}


def in_words(settings: RunSettings, stage: str, forecast: Forecast) -> str:
    """One line."""
    if isinstance(forecast, str):
        return f"memory unknown: {forecast}"
    is_auto = getattr(settings.stages[stage], "tokens_per_batch", None) == "auto"
    batches = f"at {forecast.tokens_per_batch:,} tokens a batch{' (auto)' if is_auto else ''}"
    return f"memory {memory.parts_in_words(forecast)}; {batches}"


class _Forecaster:
    def __init__(self, settings: RunSettings, decisions: Sequence[Decision]) -> None:
        self._settings = settings
        self._artifacts = {each.stage: each.wanted.artifacts for each in decisions}
        self._device = _device() if settings.device == "auto" else settings.device
        self._precision = _precision(self._device) if settings.dtype == "auto" else settings.dtype
        limit = settings.memory_limit
        self._free = available.memory(limit) if self._device == "cpu" else limit
        self._headers: dict[str, shape.Shape] = {}

    def all(self) -> dict[str, Forecast]:
        """Of every stage that computes with a model."""
        names = [name for name in self._artifacts if not isinstance(self._settings.stages[name], TokenizerSettings)]
        return {name: self._forecast(name) for name in names}

    def require_room(self, name: str) -> None:
        """Raise ConfigError where the responses of a stage or its suites may take all positions of a model."""
        stage = self._settings.stages[name]
        longest = {f"stages.{name}.max_new_tokens": getattr(stage, "max_new_tokens", None) or 0}
        suites = sources(self._settings, stage).items()
        sampled = {role: suite for role, suite in suites if isinstance(suite, SampledSuite)}
        longest |= {f"stages.{name}.{role}.max_new_tokens": suite.max_new_tokens for role, suite in sampled.items()}
        for role, reference in stage.roles().items():
            if role == "tokenizer":
                continue
            try:
                positions = self._base(name, role).shape.positions
            except (UnknownShape, ArtifactError):
                continue
            for where, tokens in longest.items():
                if positions is not None and tokens >= positions:
                    what = f"{reference} has {positions} positions, which leaves no room for a prompt"
                    raise ConfigError(f"{what} before {tokens} tokens", where=where, hint="lower it")

    def require_layers(self, name: str) -> None:
        """Raise ConfigError where more layers are to be adapted than the policy has."""
        stage = self._settings.stages[name]
        lora = getattr(stage, "lora", None)
        if lora is None or lora.top_layers is None or "policy" not in stage.roles():
            return
        try:
            layers = self._base(name, "policy").shape.layers
        except (UnknownShape, ArtifactError):
            return
        if lora.top_layers > layers:
            raise ConfigError(
                f"top_layers={lora.top_layers}, but {stage.roles()['policy']} has {layers} decoder layers",
                where=f"stages.{name}.lora.top_layers",
                hint="lower it, or leave it out to adapt all layers",
            )

    def _forecast(self, name: str) -> Forecast:
        stage = self._settings.stages[name]
        if isinstance(stage, TrlSettings):
            return "a trainer of TRL makes its own batches"
        assert isinstance(stage, Batched)
        try:
            task = self._task(name, stage)
        except (UnknownShape, ArtifactError) as error:
            return str(error)
        free = self._free
        if free is not None and self._device == "cpu":  # this process has not imported what a stage does
            free = max(0, free - memory.IMPORTS + (available.resident() or 0))
        tokens = memory.choose(task, free) if stage.tokens_per_batch == "auto" else stage.batch_tokens
        return memory.estimate(task, tokens)

    def _task(self, name: str, stage: Batched) -> Task:
        bases = {role: self._base(name, role) for role in stage.roles() if role != "tokenizer"}
        return Task.of(stage, bases or {"policy": self._from_nothing(stage)}, self._device, self._precision)

    def _base(self, name: str, role: str) -> Base:
        """What an input is, or will be."""
        reference = self._settings.stages[name].roles()[role]
        artifact = self._artifacts.get(name, {}).get(role)
        if artifact is not None:
            return self._of_artifact(artifact)
        if reference in self._settings.stages:
            return self._of_stage(reference)
        raise UnknownShape(f"`{reference}` is not downloaded yet")

    def _of_artifact(self, artifact: Artifact) -> Base:
        if artifact.manifest is None and artifact.source.endswith(inputs.GGUF) and not artifact.directory.is_dir():
            return Base(self._of_header(artifact.source), artifact.digest)
        return shape.of_artifact(artifact)

    def _of_stage(self, name: str) -> Base:
        """What a stage of the run will publish."""
        stage = self._settings.stages[name]
        if isinstance(stage, PretrainSettings) and stage.policy is None:
            return replace(self._from_nothing(stage), identity=name)
        policy = self._base(name, "policy")
        if isinstance(stage, PretrainSettings) or (isinstance(stage, SftSettings) and stage.quantization == "none"):
            return Base(policy.shape, name)
        if isinstance(stage, TrlSettings) and stage.produces == "model":
            return Base(policy.shape, name)
        quantization = stage.quantization if isinstance(stage, SftSettings) else policy.quantization
        return replace(policy, adapter=policy.adapter or getattr(stage, "lora", None), quantization=quantization)

    def _from_nothing(self, stage: Any) -> Base:
        tokenizer = self._settings.stages.get(stage.tokenizer)
        if not isinstance(tokenizer, TokenizerSettings):
            raise UnknownShape(f"`{stage.tokenizer}` is no tokenizer stage of this run")
        return Base(shape.planned(stage.architecture, tokenizer.vocab_size), "")

    def _of_header(self, file: str) -> shape.Shape:
        if file not in self._headers:
            from data import gguf

            self._headers[file] = shape.of_tensors(*gguf.outline(Path(file)))
        return self._headers[file]


def _device() -> str:
    if DRIVER.exists():
        return "cuda"
    return "mps" if (platform.system(), platform.machine()) == ("Darwin", "arm64") else "cpu"


def _precision(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if device != "cpu":
        return "bfloat16" if device == "cuda" else "float32"
    words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split()) if cpuinfo.is_file() else set()
    return "bfloat16" if words & set(FLAGS) else "float32"
