"""Roles on one base: what computes, what is trained, what is stored."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.batch import batches
from pipeline.config import Lora, Optimizer
from pipeline.errors import ArtifactError
from stages.core import loop
from stages.core.forward import token_logprobs
from stages.core.models import load_model
from stages.core.roles import (
    ADAPTER_FILE,
    POLICY,
    REFERENCE,
    REWARD,
    VALUE,
    Roles,
    adaptation,
    base_of,
    open_base,
    open_role,
)
from stages.core.scoring import negative_mean, scores

PATHS = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(roles: Roles, role: str) -> Tensor:
    with roles.use(role):
        return roles.base.model(PATHS).logits


def three_roles(kind: str = "llama") -> Roles:
    roles = models.roles(POLICY, REWARD, kind=kind)
    roles.add_head(REWARD)
    for seed, role in enumerate((POLICY, REWARD), 1):
        models.disturb(roles, role, seed)
    roles.copy(REWARD, VALUE)
    return roles


@pytest.mark.parametrize("kind", models.KINDS)
def test_the_reference_is_exactly_the_bare_base(kind: str) -> None:
    bare = models.language_model(kind).model(PATHS).logits
    assert torch.equal(logits(three_roles(kind), REFERENCE), bare)


def test_a_fresh_role_computes_exactly_what_the_base_does() -> None:
    roles = models.roles(POLICY)
    assert torch.equal(logits(roles, POLICY), logits(roles, REFERENCE))


def test_each_role_computes_something_of_its_own() -> None:
    roles = three_roles()
    found = [logits(roles, role) for role in (POLICY, REWARD, REFERENCE)]
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert not torch.allclose(found[1], found[2])


def test_a_copy_computes_exactly_what_its_source_does_and_then_goes_its_own_way() -> None:
    roles = three_roles()
    before = logits(roles, REWARD)
    assert torch.equal(logits(roles, VALUE), before)
    tree = models.responses(3)
    assert scores(roles, VALUE, tree) == scores(roles, REWARD, tree)
    models.disturb(roles, VALUE, seed=9)
    assert torch.equal(logits(roles, REWARD), before)
    assert scores(roles, VALUE, tree) != scores(roles, REWARD, tree)


def test_use_restores_the_role_before_it_even_after_an_error() -> None:
    roles = three_roles()
    policy = logits(roles, POLICY)
    with roles.use(POLICY):
        with pytest.raises(RuntimeError, match="inside"), roles.use(REFERENCE):
            raise RuntimeError("inside")
        assert torch.equal(roles.base.model(PATHS).logits, policy)
        with roles.use(REWARD):
            pass
        assert torch.equal(roles.base.model(PATHS).logits, policy)


def test_an_unknown_role_is_refused_and_nothing_is_switched() -> None:
    roles = three_roles()
    policy = logits(roles, POLICY)
    with roles.use(POLICY):
        with pytest.raises(ValueError, match="no role `nobody`"), roles.use("nobody"):
            pass
        assert torch.equal(roles.base.model(PATHS).logits, policy)


@pytest.mark.parametrize("role", [POLICY, VALUE])
def test_gradients_reach_the_role_in_use_and_no_other_weight(role: str) -> None:
    roles = three_roles()
    (batch,) = batches(models.responses(3), 1000)
    with roles.use(role):
        token_logprobs(roles.base.model, batch).sum().backward()
    with_gradient = {name for name, each in roles.base.model.named_parameters() if each.grad is not None}
    assert with_gradient == {name for name, _ in roles.parameters(role) if not name.startswith("head.")}


def test_switching_roles_never_changes_what_is_trained() -> None:
    roles = three_roles()
    before = {name: each.requires_grad for name, each in roles.base.model.named_parameters()}
    for role in (POLICY, REFERENCE, REWARD, VALUE, REFERENCE):
        logits(roles, role)
    assert {name: each.requires_grad for name, each in roles.base.model.named_parameters()} == before


def test_a_loaded_role_is_frozen_with_its_head(tmp_path: Path) -> None:
    stored = three_roles()
    base = models.save_base(tmp_path / "base")
    reward = models.save_role(stored, REWARD, tmp_path / "reward", base)
    roles = open_role(base, POLICY, models.LORA, models.CPU)
    roles.load(REWARD, reward.directory)
    roles.copy(REWARD, VALUE)
    assert not any(each.requires_grad for _, each in roles.parameters(REWARD))
    for role in (POLICY, VALUE):
        assert all(each.requires_grad for _, each in roles.parameters(role))
    assert len(roles.parameters(VALUE)) == len(roles.parameters(REWARD))


@pytest.mark.parametrize("names", [("a", "ab", "b"), ("model-1", "model-10", "model"), ("mlp", "layers", "lora_A"),
                                   ("policy", "policy_old", "old")])  # fmt: skip
def test_parameters_of_roles_are_disjoint_even_if_their_names_contain_one_another(names: tuple[str, ...]) -> None:
    roles = models.roles(*names)
    parameters = [{id(each) for _, each in roles.parameters(name)} for name in names]
    adapters = {id(each) for name, each in roles.base.model.named_parameters() if "lora_" in name}
    assert len({len(each) for each in parameters}) == 1
    assert sum(map(len, parameters)) == len(adapters)
    assert set().union(*parameters) == adapters


def test_training_a_role_changes_no_other_weight_by_a_bit() -> None:
    roles = three_roles()
    before = models.snapshot(roles.base.model)
    heads = {role: models.snapshot(head) for role, head in roles.heads.items()}
    updater = loop.Updater(roles.parameters(POLICY), Optimizer(learning_rate=0.1, weight_decay=0.1), 3)
    for _ in range(3):
        with roles.use(POLICY):
            updater.step(negative_mean(roles.base, 100, "tree")(models.responses(4)))
    changed = models.changed(roles.base.model, before)
    assert changed == {name for name, _ in roles.parameters(POLICY)}
    assert not any(models.changed(roles.heads[role], heads[role]) for role in heads)


def test_the_base_is_in_memory_once() -> None:
    language_model = models.language_model()
    weights = {each.data_ptr(): each.numel() for each in language_model.model.parameters()}
    roles = Roles(language_model)
    for role in (POLICY, REWARD):
        roles.add(role, models.LORA)
    roles.copy(REWARD, VALUE)
    held = {each.data_ptr(): each.numel() for each in roles.base.model.parameters()}
    assert weights.items() <= held.items()
    adapters = sum(each.numel() for role in (POLICY, REWARD, VALUE) for _, each in roles.parameters(role))
    assert sum(held.values()) == sum(weights.values()) + adapters


def test_no_role_drops_anything_out() -> None:
    roles = three_roles()
    assert not any(module.training for module in roles.base.model.modules())
    assert torch.equal(logits(roles, POLICY), logits(roles, POLICY))


@pytest.mark.parametrize("kind", models.KINDS)
def test_a_merged_model_is_the_base_plus_the_adapter(tmp_path: Path, kind: str) -> None:
    base = models.save_base(tmp_path / "base", kind)
    roles = open_role(base, POLICY, models.LORA, models.CPU)
    models.disturb(roles, POLICY)
    merged = roles.merged(POLICY, base)
    expected = logits(roles, POLICY)
    assert (merged.model(PATHS).logits - expected).abs().max() < 1e-5
    (tmp_path / "merged").mkdir()
    merged.save(tmp_path / "merged")
    files = [path.name for path in (tmp_path / "merged").iterdir()]
    assert not any("adapter" in name for name in files)
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert names == load_file(base.directory / "model.safetensors").keys()
    again = load_model(models.Artifact(tmp_path / "merged", "model", "merged"), models.CPU)
    assert torch.equal(again.model(PATHS).logits, merged.model(PATHS).logits)


def test_merging_leaves_the_base_and_its_roles_as_they_were(tmp_path: Path) -> None:
    base = models.save_base(tmp_path / "base")
    roles = open_role(base, POLICY, models.LORA, models.CPU)
    models.disturb(roles, POLICY)
    before = models.snapshot(roles.base.model)
    roles.merged(POLICY, base)
    assert not models.changed(roles.base.model, before)
    assert set(models.snapshot(roles.base.model)) == set(before)


@pytest.mark.parametrize("kind", models.KINDS)
def test_peft_itself_loads_a_saved_adapter_with_equal_logits(tmp_path: Path, kind: str) -> None:
    roles = three_roles(kind)
    roles.save(POLICY, tmp_path)
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 a question by the name that it had before.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        loaded = PeftModel.from_pretrained(models.model(kind), str(tmp_path))
    assert torch.allclose(loaded(PATHS).logits, logits(roles, POLICY), rtol=0, atol=2e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_a_reloaded_reward_model_gives_exactly_the_same_scores(tmp_path: Path) -> None:
    roles = three_roles()
    base = models.save_base(tmp_path / "base")
    reward = models.save_role(roles, REWARD, tmp_path / "reward", base)
    torch.manual_seed(99)
    again = open_base(reward, models.CPU)
    again.load(REWARD, reward.directory)
    trees = models.forest(6)
    assert scores(again, REWARD, trees) == scores(roles, REWARD, trees)


def test_the_adapters_own_shape_is_kept_whatever_the_settings(tmp_path: Path) -> None:
    roles = three_roles()
    base = models.save_base(tmp_path / "base")
    adapter = models.save_role(roles, POLICY, tmp_path / "dpo", base)
    again = open_role(adapter, POLICY, Lora(rank=9), models.CPU)
    assert torch.equal(logits(again, POLICY), logits(roles, POLICY))
    assert torch.equal(logits(again, REFERENCE), logits(roles, POLICY))
    assert all(each.requires_grad for _, each in again.parameters(POLICY))
    assert not any(each.requires_grad for _, each in again.parameters(REFERENCE))


def drop_one(tensors: dict[str, Tensor]) -> None:
    del tensors[min(tensors)]


def add_one(tensors: dict[str, Tensor]) -> None:
    tensors["other.lora_A.weight"] = torch.zeros(4, 32)


def reshape_one(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)] = torch.zeros(3, 3)


@pytest.mark.parametrize("damage", [drop_one, add_one, reshape_one])
def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, damage: Callable[[dict[str, Tensor]], None]) -> None:
    three_roles().save(POLICY, tmp_path)
    tensors = load_file(tmp_path / ADAPTER_FILE)
    damage(tensors)
    save_file(tensors, tmp_path / ADAPTER_FILE)
    with pytest.raises(ArtifactError, match="the adapter does not fit its base"):
        models.roles().load(POLICY, tmp_path)


@pytest.mark.parametrize("name", [ADAPTER_FILE, "adapter_config.json"])
def test_an_adapter_with_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    three_roles().save(POLICY, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match="a file of the adapter is missing"):
        models.roles().load(POLICY, tmp_path)


def test_weights_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    roles = three_roles()
    roles.parameters(POLICY)[0][1].data[0, 0] = torch.nan
    with pytest.raises(ArtifactError, match="not finite"):
        roles.save(POLICY, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_its_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="base is not known"):
        base_of(models.Artifact(tmp_path, "adapter", ""))


def test_what_is_adapted_is_the_base_not_the_adapter(tmp_path: Path) -> None:
    base = models.Artifact(tmp_path, "model", "123", source="sft")
    roles = three_roles()
    adapter = models.save_role(roles, POLICY, tmp_path / "dpo", base)
    found = adaptation(adapter, reference=adapter)
    assert (found.base, found.base_source, found.reference, found.merged) == ("123", "sft", adapter.digest, False)
    assert adaptation(base).base == "123"
