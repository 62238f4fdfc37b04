"""PPO's own parts: updates, warm-up, early stops, and layers that are computed again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from random import Random
from unittest.mock import Mock

import models
import pytest
import rl
import torch
from torch import Tensor, equal

from data.template import TEMPLATE, tokenizer_record
from data.tokenizer import load_tokenizer
from pipeline.config import Lora, Optimizer, PpoSettings, RejectionSettings
from pipeline.contract import Artifact
from pipeline.errors import ArtifactError, ConfigError
from stages import ppo
from stages.core import probes
from stages.core.forward import token_logprobs
from stages.core.loop import Part
from stages.core.rl import updates
from stages.core.rl.experience import Experience, estimate, score
from stages.core.rl.health import Health
from stages.core.rl.learner import PolicyGradient
from stages.core.rl.opening import open_roles
from stages.core.rl.prompts import ECHO, echoes
from stages.core.rl.rewards import Scale
from stages.core.rl.trunk import Trunk
from stages.core.roles import POLICY, REFERENCE, REWARD, VALUE, Roles
from stages.core.scoring import branch_scores, record_probes, reward_scores


@pytest.mark.parametrize("length", [1, 2, ECHO - 1, ECHO, ECHO + 1, 500])
def test_checks_never_need_more_positions_than_a_prompt_or_two_short_ones(length: int) -> None:
    prompt = tuple(range(1, length + 1))
    (tree,) = echoes([prompt], branches=2)
    longest = len(tree.prompt) + max(len(branch.tokens) for branch in tree.branches)
    assert longest <= max(length, 2 * ECHO)
    assert tree.branches[0].tokens == prompt[-ECHO:]


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Artifact, Artifact]:
    """A policy and a reward model on it, as stages store them."""
    policy, trees = models.save_base(tmp_path / "policy"), models.responses(4)
    roles = models.roles(REWARD)
    with roles.use(REFERENCE):
        record_probes(policy.directory, trees, roles.base)
    roles.add_head(REWARD)
    models.disturb(roles, REWARD)
    reward = models.save_role(roles, REWARD, tmp_path / "reward", policy, "reward")
    probes.record(reward.directory, trees, lambda some: reward_scores(roles, REWARD, some), roles.base)
    return policy, reward


def gradients(roles: Roles, role: str, parts: Iterable[Part]) -> dict[str, Tensor]:
    for part in parts:
        part.loss.backward()
    return {name: each.grad for name, each in roles.parameters(role) if each.grad is not None}


def test_an_update_with_checkpointed_layers_has_the_same_gradients(inputs: tuple[Artifact, Artifact]) -> None:
    found = []
    for checkpointed in (False, True):
        settings = rl.settings(lora=models.LORA, examples_per_step=6, gradient_checkpointing=checkpointed)
        roles = open_roles(*inputs, settings, models.CPU)
        ppo.add_value(roles, settings)
        assert isinstance(roles.base.model.model.layers[0].forward, partial) == checkpointed
        models.disturb(roles, POLICY)
        group = rl.sampled(roles, settings, "plain")
        policy = gradients(roles, POLICY, rl.losses(roles, settings).policy(group, 0.05))
        value = gradients(roles, VALUE, rl.losses(roles, settings).value(group))
        assert len(policy) == len(roles.parameters(POLICY))
        assert len(value) == len(roles.parameters(VALUE))
        found.append(policy | value)
    assert any(gradient.any() for gradient in found[0].values())
    assert all(equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_the_value_function_starts_as_the_reward_model_or_as_nothing(inputs: tuple[Artifact, Artifact]) -> None:
    settings = rl.settings(lora=models.LORA)
    roles = open_roles(*inputs, settings, models.CPU)
    ppo.add_value(roles, settings)
    for (name, mine), (_, theirs) in zip(roles.parameters(VALUE), roles.parameters(REWARD), strict=True):
        assert equal(mine, theirs), name
    alone = PpoSettings.model_validate(
        {"policy": "p", "data": "d", "rules": [{"rule": "length", "words": 3}], "lora": models.LORA.model_dump()}
    )
    roles = open_roles(inputs[0], None, alone, models.CPU)
    ppo.add_value(roles, alone)
    assert roles.has(VALUE)
    assert not roles.has(REWARD)


def adapter_of(policy: Artifact, lora: Lora, directory: Path) -> Artifact:
    """A stage's adapter on a model, with probes."""
    roles = models.roles(POLICY, lora=lora)
    models.disturb(roles, POLICY)
    found = models.save_role(roles, POLICY, directory, policy)
    with roles.use(POLICY):
        record_probes(found.directory, models.responses(4), roles.base)
    return found


def test_a_value_function_without_a_reward_model_starts_as_the_policy_and_shares_its_lower_layers(
    inputs: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    top = Lora(rank=4, alpha=8.0, top_layers=1)
    policy = adapter_of(inputs[0], top, tmp_path / "sft")
    chosen = rl.settings(reward=None, rules=[{"rule": "length", "words": 3}], tokens_per_batch=80)
    roles = open_roles(policy, None, chosen, models.CPU)
    trunk = Trunk.of(roles.base, models.pairs(4), "packed")
    made = ppo.learner(chosen, roles, "packed", trunk)
    assert trunk.depth == Trunk.of(roles.base, models.pairs(4), "packed").depth == 1
    for (name, mine), (_, theirs) in zip(roles.parameters(VALUE), roles.parameters(POLICY), strict=False):
        assert equal(mine, theirs), name
    group = rl.sampled(roles, chosen)
    found = gradients(roles, VALUE, made.losses.value(group))
    assert found.keys() == {name for name, _ in roles.parameters(VALUE)}


@pytest.mark.parametrize(("given", "told"), [
    ({}, ""), ({"rank": 4, "alpha": 8.0, "top_layers": 1}, ""), ({"rank": 7}, "rank=7 (it has 4)"),
    ({"top_layers": 2, "variant": "dora"}, "top_layers=2 (it has 1), variant=dora (it has lora)"),
    ({"rank": 2, "alpha": 4.0, "initialisation": "pissa"}, ""),
    ({"rank": 4, "initialisation": "pissa"}, "rank=8 (it has 4)"),
])  # fmt: skip
def test_what_was_asked_of_an_adapter_that_is_there_already_is_told_to_have_no_say(
    inputs: tuple[Artifact, Artifact], tmp_path: Path, given: dict[str, object], told: str
) -> None:
    policy = adapter_of(inputs[0], Lora(rank=4, alpha=8.0, top_layers=1), tmp_path / "sft")
    roles = open_roles(policy, None, rl.settings(lora=given), models.CPU)
    assert len(roles.warnings) == bool(told)
    assert all(line.startswith("lora has no say, sft is an adapter already: ") for line in roles.warnings)
    assert all(told in line for line in roles.warnings)
    assert open_roles(inputs[0], None, rl.settings(lora=given), models.CPU).warnings == []


def test_layers_that_no_model_has_are_refused_with_what_to_name(inputs: tuple[Artifact, Artifact]) -> None:
    with pytest.raises(ConfigError, match="does not fit the model") as caught:
        open_roles(inputs[0], None, rl.settings(lora={"targets": ["nonsense"]}), models.CPU)
    assert caught.value.where == "lora.targets"
    assert "q_proj" in caught.value.hint


def test_a_reward_model_of_another_template_is_refused(inputs: tuple[Artifact, Artifact]) -> None:
    policy, reward = inputs
    assert reward.manifest is not None
    tokenizer = load_tokenizer(reward.directory)
    tokenizer.chat_template = TEMPLATE.replace(
        "{% else %}{{ message['content']", "{% else %}{{ '\n' + message['content']"
    )
    tokenizer.save_pretrained(reward.directory)
    known = tokenizer_record(tokenizer)
    other = reward.manifest.model_copy(update={"tokenizer": known})
    with pytest.raises(
        ArtifactError, match=f"reads the chat template {known['chat_template'][:12]}, the policy writes"
    ):
        open_roles(policy, dataclasses.replace(reward, manifest=other), rl.settings(lora=models.LORA), models.CPU)


def moving(**changes: object) -> PpoSettings:
    """Settings under which the first update moves weights."""
    return rl.settings(
        steps=4, optimizer=Optimizer(learning_rate=1e-2, warmup=0.0), value_learning_rate=1e-2, **changes
    )


def learner(roles: Roles, chosen: PpoSettings) -> PolicyGradient:
    return PolicyGradient(roles, chosen, Trunk(roles.base.model, 0))


def groups(roles: Roles, chosen: PpoSettings) -> tuple[object, list[list[Experience]]]:
    from stages.core.rl.experience import estimate, score
    from stages.core.rl.rewards import Scale
    from stages.core.rl.sampling import Sampler

    rollout = Sampler(roles, chosen).rollout(rl.prompts(chosen.examples_per_step), 0)
    trees, size = rollout.trees(), chosen.examples_per_step // chosen.minibatches
    collector, nothing = rl.collector(roles, chosen), [0.0] * len(rollout.samples)
    found = [collector.collect(rollout, trees[start : start + size], nothing) for start in range(0, len(trees), size)]
    together = [each for group in found for each in group]
    score(together, chosen, Scale())
    estimate(together, chosen, chosen.kl_coefficient)
    return rollout, found


def test_one_round_moves_policy_and_value_and_nothing_else() -> None:
    roles, chosen = rl.four_roles(), moving(minibatches=2)
    before = models.snapshot(roles.base.model)
    heads = {role: models.snapshot(head) for role, head in roles.heads.items()}
    rollout, found = groups(roles, chosen)
    figures = learner(roles, chosen).learn(rollout, found, 0, Random(0))
    own = {name for role in (POLICY, VALUE) for name, _ in roles.parameters(role)}
    moved = models.changed(roles.base.model, before)
    assert moved
    assert moved <= own
    assert not models.changed(roles.heads[REWARD], heads[REWARD])
    assert models.changed(roles.heads[VALUE], heads[VALUE])
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["ratio_first"] == pytest.approx(1, abs=1e-6)
    assert figures["updates"] == 2


@pytest.mark.parametrize("value", ["adapter", "head"])
@pytest.mark.parametrize("passes", [1, 3])
def test_what_a_round_did_is_measured_after_its_last_update(value: str, passes: int) -> None:
    roles = warm(value)
    chosen = moving(value=value, update_epochs=passes, tokens_per_batch=60)
    rollout, found = groups(roles, chosen)
    figures = learner(roles, chosen).learn(rollout, found, 0, Random(0))
    batch = max(found[0], key=lambda each: len(each.logprobs))
    with roles.use(POLICY), torch.no_grad():
        ratios = (token_logprobs(roles.base.model, batch.batch) - batch.logprobs).double().exp()
    assert len(found[0]) > 1
    assert figures["approximate_kl"] == pytest.approx((ratios - 1 - ratios.log()).mean().item(), rel=1e-3)
    assert figures["clip_fraction"] == pytest.approx(((ratios - 1).abs() > 0.2).double().mean().item(), abs=1e-6)
    assert figures["ratio_max"] >= ratios.max().item() * (1 - 1e-5) > 1
    assert figures["ratio_first"] == pytest.approx(1, abs=1e-6)
    assert ("value_clip_fraction" in figures) == (passes > 1)


def test_of_large_batches_the_smallest_that_tells_enough_is_looked_at() -> None:
    counts = [300, 260, 20, 900]
    some = [Mock(logprobs=range(count), batch=Mock(token_count=2 * count)) for count in counts]
    assert updates._telling(some) is some[1]
    assert updates._telling(some[2:3]) is some[2]


def test_a_single_large_step_sets_off_the_alarm() -> None:
    roles = rl.four_roles()
    chosen = rl.settings(optimizer=Optimizer(learning_rate=1.0, warmup=0.0), samples_per_prompt=16)
    rollout, found = groups(roles, chosen)
    figures = learner(roles, chosen).learn(rollout, found, 0, Random(0))
    assert [each.name for each in Health(chosen).watch(figures)] == ["ratio_explosion"]


@pytest.mark.parametrize("value", ["adapter", "head"])
def test_while_the_value_function_warms_up_the_policy_stays_bit_for_bit(value: str) -> None:
    roles, chosen = warm(value), moving(value=value, value_warmup=1)
    before = [each.clone() for _, each in roles.parameters(POLICY)]
    values = [each.clone() for _, each in roles.parameters(VALUE)]
    made, (rollout, found) = learner(roles, chosen), groups(roles, chosen)
    made.learn(rollout, found, 0, Random(0))
    assert all(equal(a, b) for a, (_, b) in zip(before, roles.parameters(POLICY), strict=True))
    assert not all(equal(a, b) for a, (_, b) in zip(values, roles.parameters(VALUE), strict=True))
    made.learn(rollout, found, 1, Random(0))
    assert not all(equal(a, b) for a, (_, b) in zip(before, roles.parameters(POLICY), strict=True))


def warm(value: str) -> Roles:
    if value == "adapter":
        return rl.four_roles()
    roles = models.roles(POLICY, REWARD)
    roles.add_head(REWARD)
    models.disturb(roles, REWARD)
    roles.add_head(VALUE)
    return roles


def test_a_value_head_learns_in_the_policys_own_pass() -> None:
    roles, chosen = warm("head"), moving(value="head", update_epochs=3)
    rollout, found = groups(roles, chosen)
    before = roles.heads[VALUE].linear.weight.clone()
    figures = learner(roles, chosen).learn(rollout, found, 0, Random(0))
    assert not equal(before, roles.heads[VALUE].linear.weight)
    assert figures["value_loss"] > 0
    (batch,) = found[0]
    # Three passes, and once more to see what they did.
    assert figures["tokens"] == 4 * batch.batch.token_count


def test_both_optimizers_have_the_published_epsilon_and_rates_of_their_own() -> None:
    made = learner(rl.four_roles(), rl.settings(optimizer=Optimizer(learning_rate=1e-3), value_learning_rate=5e-3))
    assert made.value is not None
    for updater, rate in ((made.policy, 1e-3), (made.value, 5e-3)):
        (optimizer,) = updater.optimizers
        assert {group["eps"] for group in optimizer.param_groups} == {1e-5}
        assert {group["lr"] for group in optimizer.param_groups} == {rate}


def test_by_default_the_policy_moves_slower_than_its_value_function() -> None:
    plain = PpoSettings.model_validate({"policy": "p", "reward": "r", "data": "d"})
    assert 1e-5 <= plain.optimizer.learning_rate <= 3e-5
    assert 2 <= plain.value_learning_rate / plain.optimizer.learning_rate <= 5


def test_every_pass_takes_every_minibatch_once() -> None:
    roles, chosen = rl.four_roles(), moving(minibatches=4, update_epochs=3)
    rollout, found = groups(roles, chosen)
    taken: list[int] = []
    made = learner(roles, chosen)
    plain = made._update
    made._update = lambda group, warming: taken.append(id(group)) or plain(group, warming)  # type: ignore[assignment, func-returns-value, method-assign]
    assert made.learn(rollout, found, 0, Random(0))["updates"] == 12
    for start in (0, 4, 8):
        assert sorted(taken[start : start + 4]) == sorted(map(id, found))


def test_a_round_ends_early_when_the_policy_has_moved_too_far() -> None:
    roles, chosen = rl.four_roles(), moving(update_epochs=8, stop_at_kl=1e-9)
    rollout, found = groups(roles, chosen)
    figures = learner(roles, chosen).learn(rollout, found, 0, Random(0))
    # At the first update the ratio is exactly 1, after it the policy has moved.
    assert figures["updates"] == 2


def test_the_largest_ratio_is_that_of_any_token() -> None:
    roles, chosen = rl.disturbed(), rl.settings()
    group = rl.sampled(roles, chosen)
    group[0].logprobs = group[0].logprobs - 1.5
    losses = rl.losses(roles, chosen)
    with torch.no_grad():
        list(losses.policy(group, 0.0))
    assert losses.take_largest_ratio() == pytest.approx(math.exp(1.5), abs=1e-3)
    assert losses.take_largest_ratio() == 0.0


def test_with_a_learning_rate_of_almost_nothing_every_round_looks_like_the_first() -> None:
    roles = rl.four_roles()
    chosen = rl.settings(optimizer=Optimizer(learning_rate=1e-30), value_learning_rate=1e-30, update_epochs=3)
    made, (rollout, found) = learner(roles, chosen), groups(roles, chosen)
    first = made.learn(rollout, found, 0, Random(0))
    again = made.learn(rollout, found, 1, Random(0))
    assert first["ratio"] == again["ratio"] == pytest.approx(1, abs=1e-6)
    assert {name: first[name] for name in first if name != "learning_rate"} == {
        name: again[name] for name in again if name != "learning_rate"
    }


def test_a_huge_penalty_pulls_the_policy_back_to_its_reference() -> None:
    roles = rl.disturbed()
    chosen = moving(kl_coefficient=1000.0, kl_in="loss", kl_estimator="k2", update_epochs=30)
    rollout, found = groups(roles, chosen)
    together = [each for group in found for each in group]
    before = rl.joined(together, "log_ratios").square().mean()
    learner(roles, chosen).learn(rollout, found, 0, Random(0))
    after = rl.collector(roles, chosen).collect(rollout, rollout.trees(), [0.0] * len(rollout.samples))
    assert rl.joined(after, "log_ratios").square().mean() < 0.2 * before


def test_values_begin_on_the_scale_of_the_scores() -> None:
    roles, chosen = rl.four_roles(), moving(reward_weight=5.0, reward_normalisation="deviation")
    rollout = rl.given(models.responses(6))
    made = learner(roles, chosen)
    group = rl.collector(roles, chosen).collect(rollout, rollout.trees(), [0.0] * 6)
    scale = Scale.of(rl.joined(group, "rewards"), chosen)
    made.begin(group, scale, of_rules=0.0)
    score(group, chosen, scale)
    again = rl.collector(roles, chosen).collect(rollout, rollout.trees(), [0.0] * 6)
    assert torch.allclose(rl.joined(group, "values"), rl.joined(again, "values"), atol=1e-4)
    for each in group:
        with torch.no_grad(), roles.use(VALUE):
            assert torch.allclose(branch_scores(roles, VALUE, each.batch), each.scores, atol=1e-4)


@pytest.mark.parametrize("how", ["none", "mean", "deviation"])
def test_what_rules_give_every_response_is_no_surprise_to_the_values(how: str) -> None:
    def surprise(of_rules: float) -> torch.Tensor:
        roles, chosen = rl.four_roles(), moving(reward_normalisation=how)
        rollout = rl.given(models.responses(6))
        group = rl.collector(roles, chosen).collect(rollout, rollout.trees(), [of_rules] * 6)
        scale = Scale.of(rl.joined(group, "rewards"), chosen)
        learner(roles, chosen).begin(group, scale, of_rules)
        score(group, chosen, scale)
        estimate(group, chosen, 0.0)
        return rl.joined(group, "estimates")

    assert torch.allclose(surprise(2.0), surprise(0.0), atol=1e-4)


def test_the_learning_rate_goes_on_by_rounds_past_updates_that_are_left_out() -> None:
    roles = rl.four_roles()
    chosen = rl.settings(steps=4, update_epochs=8, stop_at_kl=1e-9, optimizer=Optimizer(learning_rate=1e-2, warmup=0.0))
    made, (rollout, found) = learner(roles, chosen), groups(roles, chosen)
    for number in range(4):
        made.learn(rollout, found, number, Random(0))
    assert made.policy.taken == made.policy.total == 32


def test_the_policy_s_loss_is_its_own_beside_a_value_head() -> None:
    roles, chosen = warm("head"), moving(value="head", value_weight=10.0)
    rollout, found = groups(roles, chosen)
    figures = learner(roles, chosen).learn(rollout, found, 0, Random(0))
    # At ratio 1 the policy's loss is minus the mean of whitened advantages.
    assert figures["policy_loss"] == pytest.approx(0, abs=1e-5)
    assert figures["value_loss"] > 1e-3


def test_while_the_policy_is_frozen_its_coefficient_is_too() -> None:
    roles, chosen = rl.four_roles(), moving(kl_target=6.0, kl_horizon=10, value_warmup=2)
    made, (rollout, found) = learner(roles, chosen), groups(roles, chosen)
    made.learn(rollout, found, 0, Random(0))
    assert made.kl_coefficient == chosen.kl_coefficient


@pytest.mark.parametrize("changes", [
    {"value_warmup": 4}, {"stop_at_kl": 0.1}, {"stop_on": ["over_optimisation"]},
    {"kl_coefficient": 0.0, "kl_in": "loss", "kl_estimator": "k2"}, {"kl_in": "loss"},
    {"advantage": "grpo", "samples_per_prompt": 2}, {"advantage": "rloo", "samples_per_prompt": 2, "value_clip": 0.5},
    {"advantage": "rloo", "samples_per_prompt": 2, "stop_on": ["value_useless"]}, {"value_weight": 0.5},
    {"advantage": "rloo", "samples_per_prompt": 2, "reward_normalisation": "mean"}, {"kl_horizon": 5},
    {"reward": None}, {"advantage": "rloo"}, {"clip": 0.1}, {"dual_clip": 3.0}, {"value_clip": 0.1},
    {"stop_on": ["entropy_collapse"]}, {"reward": None, "rules": [{"rule": "exact"}], "gold": "exact",
    "stop_on": ["over_optimisation"]},
])  # fmt: skip
def test_settings_that_would_do_nothing_are_refused(changes: dict[str, object]) -> None:
    rl.settings(steps=4)
    with pytest.raises(ValueError, match="validation error"):
        rl.settings(steps=4, **changes)


@pytest.mark.parametrize("changes", [
    {"minibatches": 2, "clip": 0.1, "dual_clip": 3.0, "value_clip": 0.1},
    {"steps": 10, "stop_on": ["entropy_collapse"]},
    {"rules": [{"rule": "exact"}], "gold": "exact", "stop_on": ["over_optimisation"]},
    {"reward": None, "rules": [{"rule": "exact", "weight": -1}], "gold": "exact", "stop_on": ["over_optimisation"]},
])  # fmt: skip
def test_the_same_settings_are_taken_where_they_do_something(changes: dict[str, object]) -> None:
    rl.settings(**{"steps": 4, **changes})


def test_an_alarm_that_needs_more_rounds_than_there_are_is_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match="in steps=20 these cannot go off, the rounds needed are 50 for value_useless"):
        rl.settings(steps=20, stop_on=["value_useless", "unfinished"])
    with pytest.raises(ValueError, match="63 for gradient_spike"):
        rl.settings(steps=62, value_warmup=10, stop_on=["gradient_spike"])
    rl.settings(steps=63, value_warmup=10, stop_on=["gradient_spike"])


@pytest.mark.parametrize(("alarm", "needed"), [
    ("ratio_explosion", "ratios"), ("value_useless", "a value function"), ("over_optimisation", "a `gold`"),
])  # fmt: skip
def test_an_alarm_that_a_stage_has_not_is_refused_with_what_it_needs(alarm: str, needed: str) -> None:
    with pytest.raises(ValueError, match=f"{alarm} cannot go off here: {alarm} needs {needed}"):
        RejectionSettings(policy="p", reward="r", data="d", stop_on=[alarm])


def test_the_kl_coefficient_follows_its_target() -> None:
    roles, chosen = rl.disturbed(), moving(kl_target=1e-4, kl_horizon=100)
    made, (rollout, found) = learner(roles, chosen), groups(roles, chosen)
    divergence = sum(each.log_ratios.sum().item() for group in found for each in group)
    made.learn(rollout, found, 0, Random(0))
    assert made.kl_coefficient == pytest.approx(0.05 * (1 + math.copysign(0.2, divergence - 8e-4) * 8 / 100))
