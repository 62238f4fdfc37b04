"""Kinds of adapters: each is what peft makes of the same tensors, begins as nothing, and leaves the base alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from data.batch import batches
from pipeline.config import Lora, Optimizer
from pipeline.errors import ConfigError
from stages.core import loop
from stages.core.forward import token_logprobs
from stages.core.roles import ADAPTER_FILE, POLICY, REFERENCE, REWARD, Roles
from stages.core.scoring import negative_mean

PATHS = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"variant": "rslora"},
    "dora": {"variant": "dora"},
    "pissa": {"initialisation": "pissa"},
    "pissa-rslora": {"variant": "rslora", "initialisation": "pissa"},
    "pissa-dora": {"variant": "dora", "initialisation": "pissa"},
    "top": {"top_layers": 1},
}
EVERY = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
PEFT: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-rslora": {"use_rslora": True, "init_lora_weights": "pissa"},
}
"""The same adapters as peft's users ask for them."""


def lora(options: dict[str, Any]) -> Lora:
    return Lora(rank=4, alpha=6.0, **options)


def disturbed(options: dict[str, Any], kind: str = "llama", *roles: str) -> Roles:
    """Roles whose adapters differ from fresh ones a little, as after some training."""
    made = models.roles(*(roles or (POLICY,)), kind=kind, lora=lora(options))
    for seed, role in enumerate(roles or (POLICY,)):
        shift(made.parameters(role), seed)
    return made


@torch.no_grad()
def shift(named: list[tuple[str, nn.Parameter]], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@torch.no_grad()
def logits(roles: Roles, role: str) -> Tensor:
    with roles.use(role), roles.base.compute.autocast():
        return roles.base.model(PATHS).logits


def peft_model(kind: str, options: dict[str, Any]) -> PeftModel:
    """peft's own model on the same base, in evaluation mode."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(models.model(kind), config)
    assert isinstance(made, PeftModel)
    return made.eval()


@EVERY
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("compute", [models.CPU, models.HALF], ids=["float32", "bfloat16"])
def test_a_fresh_adapter_of_any_kind_changes_nothing(options: dict[str, Any], kind: str, compute: Any) -> None:
    roles = models.roles(POLICY, kind=kind, compute=compute, lora=lora(options))
    assert torch.equal(logits(roles, POLICY), logits(roles, REFERENCE))


@pytest.mark.parametrize("kind", models.KINDS)
def test_roles_of_all_kinds_share_a_base_without_being_felt_by_each_other(tmp_path: Path, kind: str) -> None:
    together = Roles(models.language_model(kind))
    for name, options in OPTIONS.items():
        together.add(name, lora(options))
        shift(together.parameters(name))
    assert torch.equal(logits(together, REFERENCE), models.language_model(kind).model(PATHS).logits)
    for name in OPTIONS:
        directory = tmp_path / name
        directory.mkdir()
        together.save(name, directory)
        alone = models.roles(kind=kind)
        alone.load(name, directory)
        assert torch.equal(logits(together, name), logits(alone, name)), name


@EVERY
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_loads_a_saved_adapter_of_any_kind_with_equal_logits(
    tmp_path: Path, options: dict[str, Any], kind: str
) -> None:
    roles = disturbed(options, kind)
    roles.save(POLICY, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(models.model(kind), str(tmp_path))
    assert (loaded(PATHS).logits - logits(roles, POLICY)).abs().max() < 1e-5
    assert (logits(roles, POLICY) - logits(roles, REFERENCE)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_the_same_tensors_give_the_logits_and_gradients_that_peft_gives(tmp_path: Path, name: str, kind: str) -> None:
    roles = disturbed(OPTIONS[name], kind)
    roles.save(POLICY, tmp_path)
    peer = peft_model(kind, PEFT[name])
    set_peft_model_state_dict(peer, load_file(tmp_path / ADAPTER_FILE))
    ours, theirs = gradients(roles), dict(peft_gradients(peer))
    assert (peer(PATHS).logits - logits(roles, POLICY)).abs().max() < 1e-5
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        assert torch.allclose(gradient, theirs[key], atol=1e-5 * float(theirs[key].abs().max())), key


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["pissa", "pissa-rslora"])
def test_pissa_is_pefts_though_the_base_is_not_moved(name: str, kind: str) -> None:
    roles = models.roles(POLICY, kind=kind, lora=lora(OPTIONS[name]))
    before = models.snapshot(roles.base.model)
    peer = peft_model(kind, PEFT[name])
    ours = gradients(roles)
    theirs = dict(peft_gradients(peer))
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        assert torch.allclose(gradient, theirs[key], atol=1e-4 * float(theirs[key].abs().max())), key
    shift(roles.parameters(POLICY))
    shift([(each, parameter) for each, parameter in peer.named_parameters() if parameter.requires_grad])
    assert (peer(PATHS).logits - logits(roles, POLICY)).abs().max() < 1e-4
    assert all("lora_" in each for each in models.changed(roles.base.model, before))


def gradients(roles: Roles) -> dict[str, Tensor]:
    """Gradients of the policy's parameters by peft's names."""
    with roles.use(POLICY):
        loss(roles.base.model).backward()
    named = roles.parameters(POLICY)
    return {name.replace(".parametrizations.weight.original", ".weight"): taken(each) for name, each in named}


def peft_gradients(peer: PeftModel) -> list[tuple[str, Tensor]]:
    loss(peer).backward()
    named = [(name, each) for name, each in peer.named_parameters() if each.requires_grad]
    return [
        (name.removeprefix("base_model.model.").replace(".default", f".{POLICY}"), taken(each)) for name, each in named
    ]


def loss(model: nn.Module) -> Tensor:
    return model(PATHS).logits.log_softmax(-1)[..., 7].mean()


def taken(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@EVERY
def test_a_stored_adapter_of_any_kind_computes_bit_for_bit_as_the_trained_one(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    roles = disturbed(options)
    roles.save(POLICY, tmp_path)
    again = models.roles()
    again.load(POLICY, tmp_path)
    assert torch.equal(logits(again, POLICY), logits(roles, POLICY))
    again.copy(POLICY, "second")
    assert torch.equal(logits(again, "second"), logits(roles, POLICY))
    assert all(each.requires_grad for _, each in again.parameters("second"))
    roles.copy(POLICY, "second")
    assert torch.equal(logits(roles, "second"), logits(roles, POLICY))


@EVERY
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging_gives_the_logits_of_an_adapter_of_any_kind(tmp_path: Path, options: dict[str, Any], kind: str) -> None:
    base = models.save_base(tmp_path / "base", kind)
    roles = disturbed(options, kind)
    merged = roles.merged(POLICY, base)
    assert (merged.model(PATHS).logits - logits(roles, POLICY)).abs().max() < 2e-5
    assert set(models.snapshot(merged.model)) == set(models.snapshot(models.model(kind)))


@EVERY
def test_training_lowers_the_loss_and_moves_that_role_alone(options: dict[str, Any]) -> None:
    roles = models.roles(POLICY, REWARD, lora=lora(options))
    trees = models.responses(8)
    before = models.snapshot(roles.base.model)
    updater = loop.Updater(roles.parameters(POLICY), Optimizer(learning_rate=3e-3, schedule="constant", warmup=0.0), 8)
    objective = negative_mean(roles.base, 1000, "tree")
    with roles.use(POLICY):
        losses = [updater.step(objective(trees))["loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.05
    moved = models.changed(roles.base.model, before)
    assert moved == {name for name, _ in roles.parameters(POLICY)}


def test_weight_decay_takes_a_principal_start_back_to_the_base() -> None:
    roles = disturbed(OPTIONS["pissa"])
    far = (logits(roles, POLICY) - logits(roles, REFERENCE)).abs().max()
    settings = Optimizer(learning_rate=0.5, weight_decay=1.0, schedule="constant", warmup=0.0)
    updater = loop.Updater(roles.parameters(POLICY), settings, 20)
    for _ in range(20):
        with roles.use(POLICY):
            updater.step([loop.Part(0.0 * roles.base.model(PATHS).logits.sum())])
    assert (logits(roles, POLICY) - logits(roles, REFERENCE)).abs().max() < 1e-4 * far


@pytest.mark.parametrize(("name", "rank"), [("lora", 4), ("dora", 4), ("pissa", 8)])
def test_the_stored_configuration_is_pefts(tmp_path: Path, name: str, rank: int) -> None:
    disturbed(OPTIONS[name]).save(POLICY, tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"], stored["use_dora"]) == (rank, 6.0 * rank / 4, name == "dora")
    assert {tensor.shape[0] for key, tensor in load_file(tmp_path / ADAPTER_FILE).items() if "lora_A" in key} == {rank}


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("targets", ["all-linear", None])
def test_nothing_is_computed_backwards_below_the_adapted_layers(kind: str, targets: str | None) -> None:
    names = ["c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"]
    roles = models.roles(POLICY, kind=kind, lora=Lora(rank=4, top_layers=1, targets=targets or names))
    model = roles.base.model
    lower, upper = model.base_model.h if kind == "gpt2" else model.base_model.layers
    reached: list[str] = []
    model.get_input_embeddings().register_forward_hook(
        lambda *call: reached.append(f"embedding {call[2].requires_grad}")
    )
    lower.register_forward_hook(lambda *call: reached.append(f"lower {call[2].requires_grad}"))
    upper.register_forward_hook(lambda *call: reached.append(f"upper {call[2].requires_grad}"))
    (batch,) = batches(models.responses(3), 1000)
    with roles.use(POLICY):
        token_logprobs(model, batch).sum().backward()
    assert reached == ["embedding False", "lower False", "upper True"]
    named = [name for name, _ in roles.parameters(POLICY)]
    assert named
    assert all(".h.1." in name or ".layers.1." in name for name in named)
    assert all(each.grad is not None for _, each in roles.parameters(POLICY))


def test_a_second_role_adapts_the_same_top_layers() -> None:
    roles = models.roles(POLICY, REWARD, lora=Lora(rank=4, top_layers=1))
    first, second = ([name for name, _ in roles.parameters(role)] for role in (POLICY, REWARD))
    assert [name.replace(POLICY, REWARD) for name in first] == second


def test_more_top_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="top_layers=3, but the model has 2 decoder layers"):
        models.roles(POLICY, lora=Lora(top_layers=3))


def test_top_layers_need_names() -> None:
    with pytest.raises(ValueError, match="needs `targets` as a list of names"):
        Lora(top_layers=1, targets=".*q_proj")


def test_a_principal_start_of_too_large_a_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 20 is more than a matrix of 16 by 32 has"):
        models.roles(POLICY, lora=Lora(rank=20, initialisation="pissa"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["dora", "pissa"])
def test_layers_that_are_not_linear_are_refused_where_their_weights_are_needed(name: str, kind: str) -> None:
    linear, embedding = ("c_attn", "wte") if kind == "gpt2" else ("q_proj", "embed_tokens")
    models.roles(POLICY, REWARD, kind=kind, lora=lora({**OPTIONS[name], "targets": [linear]}))
    for targets in ([linear, embedding], f".*{embedding}"):
        with pytest.raises(ConfigError, match=rf"lora\.targets.*`.*{embedding}` is not a linear layer"):
            models.roles(POLICY, kind=kind, lora=lora({**OPTIONS[name], "targets": targets}))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "nothing"])
def test_top_layers_have_only_names_of_the_decoder_layers(target: str) -> None:
    with pytest.raises(ConfigError, match=f"the decoder layers have no `{target}`"):
        models.roles(POLICY, lora=Lora(targets=["q_proj", target], top_layers=1))
    roles = models.roles(POLICY, REWARD, lora=Lora(targets=["q_proj", "mlp.up_proj"], top_layers=1))
    assert len(roles.parameters(REWARD)) == 4


def test_targets_that_the_model_has_not_are_refused() -> None:
    with pytest.raises(ConfigError, match="the adapter does not fit the model"):
        models.roles(POLICY, lora=Lora(targets=["nothing"], top_layers=1))
