"""What PPO and DPO start from: ratio 1, no divergence, margin 0, values that are the reward model's."""

from __future__ import annotations

import math
import random
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor

from data.batch import batches
from data.tree import Branch, Tree
from pipeline.config import DpoSettings, Optimizer, PpoSettings
from reward import shaping
from stages import dpo, ppo
from stages.core.device import Compute
from stages.core.experience import Experience, collect, state_values, trees_of, whiten_advantages
from stages.core.forward import token_logprobs
from stages.core.layout import LAYOUTS
from stages.core.loop import Part, Updater
from stages.core.roles import POLICY, REFERENCE, REWARD, VALUE, Roles, open_role
from stages.core.rollout import Sample
from stages.core.scoring import branch_scores, scores

PRECISIONS = [models.CPU, models.HALF]


def settings(**changes: object) -> PpoSettings:
    options = {"policy": "p", "reward": "r", "data": "d", "examples_per_step": 8, "max_new_tokens": 6, **changes}
    return PpoSettings.model_validate(options)


def four_roles(compute: Compute = models.CPU) -> Roles:
    """As the stage has them at its start: a fresh policy, a reward model, the value function its copy."""
    roles = models.roles(POLICY, REWARD, compute=compute)
    roles.add_head(REWARD)
    models.disturb(roles, REWARD)
    roles.heads[REWARD].mean.fill_(0.3)
    roles.copy(REWARD, VALUE)
    return roles


def prompts(count: int = 8) -> list[tuple[int, ...]]:
    return [tree.prompt for tree in models.responses(count)]


def rollout(roles: Roles, chosen: PpoSettings, layout: str = "tree") -> list[list[Experience]]:
    groups, _ = ppo._rollout(roles, prompts(chosen.examples_per_step), chosen, layout, seed=0)
    return groups


def shares(parts: list[Part]) -> dict[str, float]:
    return {name: sum(part.shares[name] for part in parts) for name in parts[0].shares}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("minibatches", [1, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [30, 1000])
def test_before_any_update_the_ratio_is_1_and_the_divergence_0(
    layout: str, minibatches: int, temperature: float, budget: int
) -> None:
    roles = four_roles()
    chosen = settings(minibatches=minibatches, temperature=temperature, tokens_per_batch=budget)
    groups = rollout(roles, chosen, layout)
    assert len(groups) == minibatches
    for group in groups:
        found = shares(list(ppo.policy_parts(roles, group, chosen)))
        assert found["ratio"] == pytest.approx(1, abs=1e-6)
        assert found["approximate_kl"] == pytest.approx(0, abs=1e-6)
        assert found["clip_fraction"] == 0
        for each in group:
            assert (each.logprobs - each.reference).abs().max() < 1e-6


def test_in_bfloat16_too_the_first_ratio_is_exactly_1() -> None:
    roles, chosen = four_roles(models.HALF), settings(minibatches=2)
    for group in rollout(roles, chosen):
        found = shares(list(ppo.policy_parts(roles, group, chosen)))
        assert found["ratio"] == pytest.approx(1, abs=1e-6)
        assert all(torch.equal(each.logprobs, each.reference) for each in group)


def test_an_adapter_to_start_from_is_its_own_reference(tmp_path: Path) -> None:
    roles = models.roles(POLICY)
    models.disturb(roles, POLICY)
    base = models.save_base(tmp_path / "base")
    adapter = models.save_role(roles, POLICY, tmp_path / "dpo", base)
    opened = open_role(adapter, POLICY, models.LORA, models.CPU)
    losses = list(dpo.objective(opened, DpoSettings(policy="p", data="d"), "tree")(models.pairs(4)))
    assert shares(losses)["margin"] == 0.0


@pytest.mark.parametrize("compute", PRECISIONS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 60, 1000])
def test_at_step_0_the_dpo_loss_is_ln_2_and_the_margin_exactly_0(compute: Compute, layout: str, budget: int) -> None:
    roles = models.roles(POLICY, compute=compute)
    chosen = DpoSettings(policy="p", data="d", beta=0.3, tokens_per_batch=budget)
    parts = list(dpo.objective(roles, chosen, layout)(models.pairs(6)))
    assert sum(part.loss.item() for part in parts) == pytest.approx(math.log(2), abs=1e-6)
    assert all(part.shares["margin"] == 0.0 for part in parts)


@pytest.mark.parametrize("compute", PRECISIONS, ids=["float32", "bfloat16"])
@torch.no_grad()
def test_the_value_of_a_finished_response_starts_as_its_reward_score(compute: Compute) -> None:
    roles, chosen = four_roles(compute), settings()
    for group in rollout(roles, chosen):
        for each in group:
            with roles.use(VALUE), compute.autocast():
                assert torch.equal(branch_scores(roles, VALUE, each.batch), each.rewards)


@torch.no_grad()
def test_the_value_before_a_token_is_the_reward_score_of_what_precedes_it() -> None:
    roles = four_roles()
    (tree,) = models.responses(1, seed=3)
    tokens = tree.branches[0].tokens
    (group,) = collect(roles, [tree], [Sample(tokens, True)], settings(), "tree")
    path = [*tree.prompt, *tokens]
    cuts = range(len(tree.prompt), len(path))
    slow = [
        scores(roles, REWARD, [Tree(tuple(path[: cut - 1]), (Branch.of(path[cut - 1 : cut]),))])[0][0]
        for cut in cuts
        if cut > 1
    ]
    assert group.values.tolist()[-len(slow) :] == pytest.approx(slow, abs=1e-5)
    assert torch.equal(state_values(roles, group.batch), group.values)


def disturbed() -> Roles:
    roles = four_roles()
    models.disturb(roles, POLICY, seed=5)
    models.disturb(roles, VALUE, seed=6)
    return roles


def test_advantages_and_returns_are_those_of_each_response_by_itself() -> None:
    roles, chance = disturbed(), random.Random(0)
    trees = models.responses(9)
    samples = [Sample(tree.branches[0].tokens, chance.random() < 0.5) for tree in trees]
    chosen = settings(kl_coefficient=0.3, gae_lambda=0.8, discount=0.97, missing_eos_penalty=2.0, tokens_per_batch=60)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for each in collect(roles, trees, samples, chosen, "tree"):
        split = zip(each.advantages.split(each.counts), each.returns.split(each.counts), strict=True)
        found.update(zip((tree.number for tree in each.batch.trees), split, strict=True))
    for tree, drawn in zip(trees, samples, strict=True):
        (alone,) = collect(roles, [tree], [drawn] * 9, chosen, "plain")
        score = scores(roles, REWARD, [tree])[tree.number][0] - (0.0 if drawn.ended else 2.0)
        rewards = -0.3 * (alone.logprobs - alone.reference)
        rewards[-1] += score
        following, expected = 0.0, []
        values = [*alone.values.tolist(), 0.0]
        for place in reversed(range(len(rewards))):
            following = rewards[place].item() + 0.97 * values[place + 1] - values[place] + 0.97 * 0.8 * following
            expected.insert(0, following)
        advantages, returns = found[tree.number]
        assert advantages.tolist() == pytest.approx(expected, abs=1e-4)
        assert returns.tolist() == pytest.approx([a + v for a, v in zip(expected, values, strict=False)], abs=1e-4)


def test_a_response_that_does_not_end_is_penalised_and_its_own_reward_kept() -> None:
    roles, trees = four_roles(), models.responses(4)
    found = [
        collect(roles, trees, [Sample(tree.branches[0].tokens, ended) for tree in trees],
                settings(missing_eos_penalty=1.5), "tree")[0]
        for ended in (True, False)
    ]  # fmt: skip
    assert torch.equal(found[0].rewards, found[1].rewards)
    assert torch.equal(found[0].scores, found[0].rewards)
    assert torch.allclose(found[1].scores, found[0].scores - 1.5)


def test_advantages_are_whitened_over_the_whole_rollout() -> None:
    groups = rollout(disturbed(), settings(minibatches=4, tokens_per_batch=30))
    joined = torch.cat([each.advantages for group in groups for each in group])
    assert joined.mean().item() == pytest.approx(0, abs=1e-6)
    assert joined.var(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    first = torch.cat([each.advantages for each in groups[0]])
    assert abs(first.mean().item()) > 1e-4


def test_whitening_keeps_each_advantage_with_its_response() -> None:
    roles = disturbed()
    samples = [Sample(tree.branches[0].tokens, True) for tree in models.responses(6)]
    found = collect(roles, models.responses(6), samples, settings(tokens_per_batch=30), "tree")
    before = [each.advantages.clone() for each in found]
    whiten_advantages(found)
    joined = torch.cat(before)
    expected = shaping.whiten(joined, torch.ones_like(joined, dtype=torch.bool))
    assert torch.equal(torch.cat([each.advantages for each in found]), expected)
    assert [len(each.advantages) for each in found] == [len(each) for each in before]


@pytest.mark.parametrize("which", ["policy", "value"])
def test_ppo_gradients_do_not_depend_on_the_size_of_batches(which: str) -> None:
    gradients = []
    for budget in (1, 10_000):
        roles = disturbed()
        chosen = settings(tokens_per_batch=budget)
        trees = models.responses(8)
        samples = [Sample(tree.branches[0].tokens, True) for tree in trees]
        group = collect(roles, trees, samples, chosen, "tree")
        whiten_advantages(group)
        for each in group:
            each.logprobs = each.logprobs - 0.05
            each.values = each.values - 0.1
        role, parts = {"policy": (POLICY, ppo.policy_parts), "value": (VALUE, ppo.value_parts)}[which]
        for part in parts(roles, group, chosen):
            part.loss.backward()
        gradients.append([each.grad for _, each in roles.parameters(role)])
    assert max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True)) < 1e-6


def test_one_round_moves_policy_and_value_and_nothing_else() -> None:
    roles = four_roles()
    chosen = settings(steps=1, minibatches=2, optimizer=Optimizer(warmup=0.0))
    before = models.snapshot(roles.base.model)
    heads = {role: models.snapshot(head) for role, head in roles.heads.items()}
    (figures,) = ppo.rounds(roles, prompts(), chosen, "tree", 0)
    own = {name for role in (POLICY, VALUE) for name, _ in roles.parameters(role)}
    moved = models.changed(roles.base.model, before)
    assert moved
    assert moved <= own
    assert not models.changed(roles.heads[REWARD], heads[REWARD])
    assert models.changed(roles.heads[VALUE], heads[VALUE])
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["kl"] == pytest.approx(0, abs=1e-5)


def test_the_policy_learns_what_is_rewarded() -> None:
    roles = models.roles(POLICY)
    before = sampled_chance(roles, 50)
    updater = Updater(roles.parameters(POLICY), Optimizer(learning_rate=0.02, warmup=0.0), 30)
    trees = trees_of([(7, 8)] * 2, [Sample((50,), True), Sample((60,), True)])
    for _ in range(5):
        roles_experience = experience(roles, trees, torch.tensor([1.0, -1.0]))
        updater.step(ppo.policy_parts(roles, [roles_experience], settings()))
    assert sampled_chance(roles, 50) > 1.5 * before


@torch.no_grad()
def sampled_chance(roles: Roles, token: int) -> float:
    with roles.use(POLICY):
        return torch.softmax(roles.base.model(torch.tensor([[7, 8]])).logits[0, -1], -1)[token].item()


@torch.no_grad()
def experience(roles: Roles, trees: list[Tree], advantages: Tensor) -> Experience:
    (batch,) = batches(trees, 1000)
    with roles.use(POLICY):
        logprobs = token_logprobs(roles.base.model, batch)
    with roles.use(REFERENCE):
        reference = token_logprobs(roles.base.model, batch)
    zeros = torch.zeros(2)
    return Experience(batch, logprobs, reference, zeros, zeros, zeros, zeros, advantages, zeros)
