"""Bases in 4 and 8 bits: what they compute, what is trained on them, what is handed on, and where they do not work."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import tiny
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import cli
from pipeline import manifest as manifests
from pipeline.config import Lora, Optimizer, RunSettings, SftSettings
from pipeline.contract import Artifact
from pipeline.errors import ConfigError
from pipeline.manifest import Adaptation, Manifest
from stages.core import loop, lora
from stages.core.checkpointing import checkpoint_layers
from stages.core.device import Compute
from stages.core.float32 import in_float32
from stages.core.layout import choose_layout
from stages.core.models import load_model, record
from stages.core.roles import ADAPTER_FILE, POLICY, REFERENCE, Roles, open_base, open_role
from stages.core.scoring import negative_mean, record_probes, replay_probes

PATHS = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
BITS = {"4bit": "Params4bit", "8bit": "Int8Params"}
each_quantization = pytest.mark.parametrize("quantization", BITS)
each_compute = pytest.mark.parametrize("compute", [models.CPU, models.HALF], ids=["float32", "bfloat16"])


@pytest.fixture
def stored(tmp_path: Path) -> Artifact:
    return models.save_base(tmp_path / "base")


def opened(stored: Artifact, quantization: str, compute: Compute = models.CPU) -> Roles:
    return Roles(load_model(stored, compute, quantization=quantization))


@torch.no_grad()
def logits(roles: Roles, role: str) -> Tensor:
    with roles.use(role), roles.base.compute.autocast():
        return roles.base.model(PATHS).logits.float()


def dequantized(roles: Roles, stored: Artifact) -> Roles:
    """A plain model with the weights that a quantized one stands for."""
    plain = load_model(stored, models.CPU)
    linear = {name: module for name, module in plain.model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in roles.base.model.named_modules():
        kind = type(getattr(module, "weight", None)).__name__
        if kind == "Params4bit":
            linear[name].weight.data.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))
        if kind == "Int8Params":
            linear[name].weight.data.copy_(module.weight.data * module.state.SCB[:, None] / 127)
    return Roles(plain)


@each_quantization
@each_compute
def test_a_quantized_base_computes_what_its_weights_stand_for(
    stored: Artifact, quantization: str, compute: Compute
) -> None:
    roles = opened(stored, quantization, compute)
    kinds = [type(each).__name__ for each in roles.base.model.parameters()]
    assert kinds.count(BITS[quantization]) == 14
    found, meant = logits(roles, REFERENCE), logits(dequantized(roles, stored), REFERENCE)
    exact = logits(Roles(load_model(stored, models.CPU)), REFERENCE)
    rounding = 1e-5 if compute == models.CPU and quantization == "4bit" else 0.04
    assert (found - meant).norm() < rounding * meant.norm()
    assert (meant - exact).norm() < (0.9 if quantization == "4bit" else 0.05) * exact.norm()
    assert not torch.equal(meant, exact)
    assert not any(each.requires_grad for each in roles.base.model.parameters())


@each_quantization
@each_compute
@torch.no_grad()
def test_what_samples_from_an_adapter_on_it_computes_what_peft_does(
    stored: Artifact, quantization: str, compute: Compute
) -> None:
    roles = opened(stored, quantization, compute)
    for role in (POLICY, "other"):
        roles.add(role, models.LORA)
        models.disturb(roles, role, seed=len(role))
    for role in (POLICY, "other", REFERENCE):
        expected = logits(roles, role)
        with roles.use(role), compute.autocast(), lora.held(roles.base.model):
            layers = [module for module in roles.base.model.modules() if isinstance(module, LoraLayer)]
            held = [module for module in layers if "forward" in vars(module)]
            found = roles.base.model(PATHS).logits.float()
        # Without autocast it is peft's own forward, and so it is for the base alone.
        assert len(held) == (14 if compute == models.HALF and role != REFERENCE else 0)
        assert (found - expected).norm() <= (0.04 if held else 0.0) * expected.norm()
        assert torch.equal(logits(roles, role), expected)


@pytest.mark.parametrize("quantization", ["none", *BITS])
@torch.no_grad()
def test_an_adapter_that_is_held_twice_is_let_go_once_by_either(stored: Artifact, quantization: str) -> None:
    roles = opened(stored, quantization, models.HALF)
    roles.add(POLICY, models.LORA)
    models.disturb(roles, POLICY)
    model, before = roles.base.model, logits(roles, POLICY)
    with roles.use(POLICY), models.HALF.autocast(), lora.held(model):
        alone = model(PATHS).logits
        with lora.held(model):
            assert torch.equal(model(PATHS).logits, alone)
        assert torch.equal(model(PATHS).logits, alone)
    assert torch.equal(logits(roles, POLICY), before)


@each_quantization
def test_gradients_are_those_of_the_weights_that_the_base_stands_for(stored: Artifact, quantization: str) -> None:
    roles = opened(stored, quantization)
    plain = dequantized(roles, stored)
    found = []
    for made in (roles, plain):
        made.add(POLICY, models.LORA)
        models.disturb(made, POLICY)
        logits(made, REFERENCE)  # a pass without gradients first: layers must still pass them on
        with made.use(POLICY):
            made.base.model(PATHS).logits.log_softmax(-1)[..., 7].mean().backward()
        found.append({name: each.grad for name, each in made.parameters(POLICY)})
    ours, expected = found
    tolerance = 1e-4 if quantization == "4bit" else 0.1  # in 8 bits the inputs are rounded too
    for name, gradient in expected.items():
        assert gradient is not None
        assert (ours[name] - gradient).norm() <= tolerance * gradient.norm(), name


@each_quantization
@pytest.mark.parametrize(
    "options", [{}, {"variant": "rslora"}, {"variant": "dora"}, {"initialisation": "pissa"}, {"top_layers": 1}], ids=str
)
def test_adapters_of_all_kinds_begin_as_nothing_learn_and_come_back(
    stored: Artifact, tmp_path: Path, quantization: str, options: dict[str, Any]
) -> None:
    roles = opened(stored, quantization)
    roles.add(POLICY, Lora(rank=4, alpha=8.0, **options))
    bare = logits(roles, REFERENCE)
    assert torch.equal(logits(roles, POLICY), bare)
    settings = Optimizer(learning_rate=3e-3, schedule="constant", warmup=0.0)
    updater = loop.Updater(roles.parameters(POLICY), settings, 5)
    trees = models.responses(8)
    objective = negative_mean(roles.base, 1000, "plain")
    with roles.use(POLICY):
        losses = [updater.step(objective(trees))["loss"] for _ in range(5)]
    assert losses[-1] < losses[0]
    assert torch.equal(logits(roles, REFERENCE), bare)
    roles.save(POLICY, tmp_path)
    again = opened(stored, quantization)
    again.load(POLICY, tmp_path)
    assert torch.equal(logits(again, POLICY), logits(roles, POLICY))


@each_quantization
def test_checkpointed_layers_give_the_same_gradients(stored: Artifact, quantization: str) -> None:
    found = []
    for checkpointed in (False, True):
        roles = opened(stored, quantization)
        roles.add(POLICY, models.LORA)
        models.disturb(roles, POLICY)
        if checkpointed:
            checkpoint_layers(roles.base)
        with roles.use(POLICY):
            roles.base.model(PATHS).logits.log_softmax(-1)[..., 7].mean().backward()
        found.append([each.grad for _, each in roles.parameters(POLICY)])
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


@each_quantization
@each_compute
def test_an_adapter_is_handed_on_with_its_quantized_base(
    stored: Artifact, tmp_path: Path, quantization: str, compute: Compute
) -> None:
    roles = opened(stored, quantization, compute)
    roles.add(POLICY, models.LORA)
    models.disturb(roles, POLICY)
    directory = tmp_path / "sft"
    directory.mkdir()
    roles.save(POLICY, directory)
    with roles.use(POLICY):
        record_probes(directory, models.responses(8), roles.base)
    adaptation = Adaptation(base=stored.digest, base_source=stored.source, quantization=quantization)
    manifest = Manifest.model_construct(adaptation=adaptation, inputs={}, settings={}, tokenizer=record(roles.base))
    adapter = Artifact(directory, "adapter", "sft", manifest, "sft", stored)
    expected = logits(roles, POLICY)
    alone = open_base(adapter, compute)
    kinds = {type(each).__name__ for each in alone.base.model.parameters()}
    assert BITS[quantization] in kinds
    received = open_role(adapter, POLICY, Lora(rank=9), compute)
    for role in (POLICY, REFERENCE):
        assert torch.equal(logits(received, role), expected)
        with received.use(role):
            replay_probes(adapter, received.base)
    assert {each.shape[0] for name, each in load_file(directory / ADAPTER_FILE).items() if "lora_A" in name} == {4}


@each_quantization
def test_in_float32_a_quantized_base_computes_exactly_what_its_weights_stand_for(
    stored: Artifact, quantization: str
) -> None:
    roles = opened(stored, quantization)
    logits(roles, REFERENCE)  # 8-bit layers put their weights in order when they are first used
    meant = logits(dequantized(roles, stored), REFERENCE)
    with in_float32(roles.base.model):
        found = logits(roles, REFERENCE)
    assert (found - meant).norm() < 1e-5 * meant.norm()


@each_quantization
def test_trees_are_not_mistrusted_for_the_rounding_of_a_quantized_base(stored: Artifact, quantization: str) -> None:
    roles = opened(stored, quantization)
    said: list[str] = []
    layout, warnings = choose_layout(roles.base, models.forest(6), said.append)
    assert layout != "plain"
    assert warnings == said == []


@each_quantization
def test_a_device_that_cannot_is_refused_before_anything_is_loaded(tmp_path: Path, quantization: str) -> None:
    nowhere = Artifact(tmp_path / "absent", "model", "")
    apple = replace(models.CPU, device=torch.device("mps"))
    with pytest.raises(ConfigError, match=f"quantization={quantization} does not work on mps"):
        load_model(nowhere, apple, quantization=quantization)


@each_quantization
def test_a_device_that_cannot_is_refused_when_the_configuration_is_read(quantization: str) -> None:
    stage = SftSettings(policy="base", data="chats", quantization=quantization)
    data: Any = {"chats": {"source": "world:demonstrations"}}
    assert RunSettings(output="run", device="cpu", data=data, stages={"sft": stage}).device == "cpu"
    with pytest.raises(ValueError, match=f"stages.sft.quantization: {quantization} does not work on device=mps"):
        RunSettings(output="run", device="mps", data=data, stages={"sft": stage})


@each_quantization
def test_a_quantized_base_needs_an_adapter(quantization: str) -> None:
    with pytest.raises(ValueError, match="cannot be trained itself"):
        SftSettings(policy="base", data="chats", quantization=quantization, lora=None)


RUN = """\
output: {root}/run
device: cpu
dtype: float32
data:
  chats: {{source: "world:demonstrations", rows: 60, held_out: 0.2}}
  pairs: {{source: "world:preferences", rows: 60, held_out: 0.2}}
stages:
  sft: {{kind: sft, policy: {base}, data: chats, steps: 2, examples_per_step: 4, quantization: 8bit,
    gradient_checkpointing: true, lora: {{rank: 2, variant: dora, initialisation: pissa, top_layers: 1}},
    optimizer: {{name: adamw8bit, schedule: wsd, decay: 0.5}}}}
  dpo: {{kind: dpo, policy: sft, data: pairs, steps: 2, examples_per_step: 4}}
"""


@pytest.mark.chain
def test_a_chain_on_eight_bits_runs_from_end_to_end(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base", "llama", ["Say seven, please."] * 20)
    config = tmp_path / "config.yaml"
    config.write_text(RUN.format(root=tmp_path, base=base))
    assert cli.execute(cli.app, ["run", str(config)]) == 0
    assert cli.execute(cli.app, ["verify", str(tmp_path / "run")]) == 0
    stages = tmp_path / "run" / "stages"
    for name in ("sft", "dpo"):
        found = manifests.load(stages / name)
        assert found.kind == "adapter"
        assert found.adaptation is not None
        assert (found.adaptation.quantization, found.adaptation.merged) == ("8bit", False)
        assert {len(each) for key, each in load_file(stages / name / ADAPTER_FILE).items() if "lora_A" in key} == {4}
    losses = [json.loads(line)["loss"] for line in (stages / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert cli.execute(cli.app, ["plan", str(config)]) == 0
