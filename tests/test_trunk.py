"""Layers below the adapters are computed once, and nothing comes out otherwise for it."""

from __future__ import annotations

import contextlib
import itertools

import models
import pytest
import rl
import torch
from torch import Tensor, nn

from pipeline.config import Lora, PpoSettings
from stages.core.device import Compute
from stages.core.layout import LAYOUTS
from stages.core.models import decoder_layers
from stages.core.rl.experience import Collector, Experience, estimate, score
from stages.core.rl.rewards import Rewards, Scale
from stages.core.rl.sampling import Sampler
from stages.core.rl.trunk import Trunk
from stages.core.rl.updates import Losses
from stages.core.roles import POLICY, VALUE, Roles

TOP = Lora(rank=4, alpha=8.0, top_layers=1)
TREES = models.pairs(4)


def moved(compute: Compute = models.CPU, **options: object) -> Roles:
    roles = rl.four_roles(compute, lora=TOP, **options)
    models.disturb(roles, POLICY, seed=5)
    models.disturb(roles, VALUE, seed=6)
    return roles


def experience(roles: Roles, chosen: PpoSettings, trunk: Trunk, layout: str) -> list[Experience]:
    rollout = Sampler(roles, chosen).rollout(rl.prompts(6), 0)
    collector = Collector(roles, chosen, Rewards(roles, chosen), layout, trunk)  # type: ignore[arg-type]
    found = collector.collect(rollout, rollout.trees(), [0.0] * len(rollout.samples))
    score(found, chosen, Scale())
    estimate(found, chosen, 0.05)
    return found


def gradients(roles: Roles, chosen: PpoSettings, trunk: Trunk, group: list[Experience]) -> list[Tensor]:
    losses = Losses(roles, chosen, trunk)
    for part in itertools.chain(losses.policy(group, 0.05), losses.value(group)):
        part.loss.backward()
    found = [each.grad.clone() for role in (POLICY, VALUE) for _, each in roles.parameters(role)]
    roles.base.model.zero_grad()
    roles.heads[VALUE].zero_grad()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("compute", [models.CPU, models.HALF], ids=["float32", "bfloat16"])
def test_scores_and_gradients_are_bit_for_bit_those_of_the_whole_model(
    layout: str, kind: str, compute: Compute
) -> None:
    roles, chosen = moved(compute, kind=kind), rl.settings(tokens_per_batch=80, samples_per_prompt=2)
    trunk, whole = Trunk.of(roles.base, TREES, layout), Trunk(roles.base.model, 0)  # type: ignore[arg-type]
    assert trunk.depth == 1
    with_trunk, without = (experience(roles, chosen, each, layout) for each in (trunk, whole))
    for name in ("logprobs", "reference", "values", "rewards", "entropy", "advantages"):
        assert torch.equal(rl.joined(with_trunk, name), rl.joined(without, name)), name
    found, expected = gradients(roles, chosen, trunk, with_trunk), gradients(roles, chosen, whole, without)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(each.any() for each in found)


def test_lower_layers_are_computed_once_for_all_roles_and_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, chosen = moved(), rl.settings()
    trunk = Trunk.of(roles.base, TREES, "packed")
    rollout = Sampler(roles, chosen).rollout(rl.prompts(6), 0)
    counts = [0, 0]
    for number, layer in enumerate(decoder_layers(roles.base.model)):
        layer.register_forward_pre_hook(lambda *_, number=number: counts.__setitem__(number, counts[number] + 1))
    collector = Collector(roles, chosen, Rewards(roles, chosen), "packed", trunk)
    group = collector.collect(rollout, rollout.trees(), [0.0] * 6)
    score(group, chosen, Scale())
    estimate(group, chosen, 0.05)
    gradients(roles, chosen, trunk, group)
    assert counts == [len(group), 6 * len(group)]


def test_layers_of_different_kinds_are_never_taken_up_in_the_middle() -> None:
    roles = moved(kind="qwen2")
    assert Trunk.of(roles.base, TREES, "plain").depth == 1
    roles.base.model.config.layer_types = ["full_attention", "sliding_attention"]
    assert Trunk.of(roles.base, TREES, "plain").depth == 0


def test_with_adapters_on_all_layers_there_is_no_trunk() -> None:
    assert Trunk.of(rl.four_roles().base, TREES, "packed").depth == 0


def test_one_role_on_a_lower_layer_takes_the_trunk_away_from_all() -> None:
    roles = moved()
    roles.add("other", models.LORA)
    assert Trunk.of(roles.base, TREES, "packed").depth == 0


def test_an_architecture_that_keeps_its_layers_otherwise_has_no_trunk() -> None:
    roles = models.roles(POLICY, kind="gpt2", lora=TOP)
    assert Trunk.of(roles.base, TREES, "plain").depth == 0


def test_a_model_that_comes_out_otherwise_when_taken_up_in_the_middle_has_no_trunk() -> None:
    roles = models.roles(POLICY, lora=TOP)
    body = roles.base.model.base_model

    def scaled(module: nn.Module, arguments: tuple[object, ...], named: dict[str, Tensor]) -> object:
        if named.get("inputs_embeds") is not None:
            named["inputs_embeds"] = named["inputs_embeds"] * 2
        return arguments, named

    body.register_forward_pre_hook(scaled, with_kwargs=True)
    assert Trunk.of(roles.base, TREES, "packed").depth == 0


def test_the_model_is_whole_again_after_an_error() -> None:
    roles = moved()
    trunk, layers = Trunk.of(roles.base, TREES, "packed"), roles.base.model.base_model.layers
    with contextlib.suppress(ZeroDivisionError), trunk._upper_layers():
        assert len(roles.base.model.base_model.layers) == 1
        raise ZeroDivisionError
    assert roles.base.model.base_model.layers is layers
