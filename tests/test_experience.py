"""What PPO and DPO start from: ratio 1, no divergence, margin 0, values that are the reward model's."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import models
import numpy as np
import pytest
import rl
import torch
from rl import disturbed, four_roles, settings
from torch import Tensor

from data.batch import Layout
from data.tree import Branch, Tree
from pipeline.config import DpoSettings, Optimizer, PpoSettings
from reward import shaping
from stages import dpo
from stages.core.device import Compute
from stages.core.layout import LAYOUTS
from stages.core.loop import Part, Updater
from stages.core.rl.experience import state_values
from stages.core.rl.trunk import Trunk
from stages.core.roles import POLICY, REWARD, VALUE, Roles, open_role
from stages.core.rollout import Sample, trees_of
from stages.core.scoring import branch_scores, scores

PRECISIONS = [models.CPU, models.HALF]


def shares(parts: list[Part]) -> dict[str, float]:
    return {name: sum(part.shares[name] for part in parts) for name in parts[0].shares}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [30, 1000])
def test_before_any_update_the_ratio_is_1_and_the_divergence_0(
    layout: Layout, samples: int, temperature: float, budget: int
) -> None:
    roles = four_roles()
    chosen = settings(samples_per_prompt=samples, temperature=temperature, tokens_per_batch=budget)
    group = rl.sampled(roles, chosen, layout)
    assert sum(each.batch.branches for each in group) == 8 * samples
    found = shares(list(rl.losses(roles, chosen).policy(group, 0.05)))
    assert found["ratio"] == pytest.approx(1, abs=1e-6)
    assert found["approximate_kl"] == pytest.approx(0, abs=1e-6)
    assert found["clip_fraction"] == 0
    assert rl.joined(group, "log_ratios").abs().max() < 1e-6


def test_in_bfloat16_too_the_first_ratio_is_exactly_1() -> None:
    roles, chosen = four_roles(models.HALF), settings(samples_per_prompt=2)
    group = rl.sampled(roles, chosen)
    found = shares(list(rl.losses(roles, chosen).policy(group, 0.05)))
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
    for each in rl.sampled(roles, chosen):
        with roles.use(VALUE), compute.autocast():
            assert torch.equal(branch_scores(roles, VALUE, each.batch), each.rewards)


@torch.no_grad()
def test_the_value_before_a_token_is_the_reward_score_of_what_precedes_it() -> None:
    roles = four_roles()
    (tree,) = models.responses(1, seed=3)
    tokens = tree.branches[0].tokens
    (group,) = rl.collected(roles, rl.given([tree]), settings())
    path = [*tree.prompt, *tokens]
    cuts = range(len(tree.prompt), len(path))
    slow = [
        scores(roles, REWARD, [Tree(tuple(path[: cut - 1]), (Branch.of(path[cut - 1 : cut]),))])[0][0]
        for cut in cuts
        if cut > 1
    ]
    assert group.values.tolist()[-len(slow) :] == pytest.approx(slow, abs=1e-5)
    assert torch.equal(state_values(roles, group.batch, Trunk(roles.base.model, 0)), group.values)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_advantages_and_returns_are_those_of_each_response_by_itself(samples: int, estimator: str) -> None:
    roles, chance = disturbed(), random.Random(0)
    trees = [tree for tree in models.forest(40, most_branches=samples) if len(tree.branches) == samples][:7]
    trees = [_read_whole(tree, number) for number, tree in enumerate(trees)]
    ended = [chance.random() < 0.5 for tree in trees for _ in tree.branches]
    chosen = settings(
        kl_coefficient=0.3, gae_lambda=0.8, discount=0.97, missing_eos_penalty=2.0, length_penalty=0.1,
        kl_estimator=estimator, tokens_per_batch=60,
    )  # fmt: skip
    rollout = rl.given(trees, ended)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for each in rl.collected(roles, rollout, chosen):
        split = zip((each.returns - each.values).split(each.counts), each.returns.split(each.counts), strict=True)
        found.update(zip(rollout.of(each.batch), split, strict=True))
    for place, tree in enumerate(path for whole in trees for path in whole.split()):
        (alone,) = rl.collected(roles, rl.given([dataclasses.replace(tree, number=0)]), chosen, "plain")
        score = scores(roles, REWARD, [tree])[tree.number][0] - (0.0 if ended[place] else 2.0) - 0.1 * tree.reads
        rewards = [-0.3 * _divergence(ratio, estimator) for ratio in alone.log_ratios.tolist()]
        rewards[-1] += score
        following, expected = 0.0, []
        values = [*alone.values.tolist(), 0.0]
        for step in reversed(range(len(rewards))):
            following = rewards[step] + 0.97 * values[step + 1] - values[step] + 0.97 * 0.8 * following
            expected.insert(0, following)
        advantages, returns = found[place]
        assert advantages.tolist() == pytest.approx(expected, abs=1e-4)
        assert returns.tolist() == pytest.approx([a + v for a, v in zip(expected, values, strict=False)], abs=1e-4)


def _read_whole(tree: Tree, number: int) -> Tree:
    return Tree(tree.prompt, tuple(Branch.of(branch.tokens) for branch in tree.branches), number)


def _divergence(ratio: float, estimator: str) -> float:
    return {"k1": ratio, "k2": ratio**2 / 2, "k3": math.exp(-ratio) - 1 + ratio}[estimator]


@pytest.mark.parametrize(("advantage", "kl_in"), [("rloo", "reward"), ("rloo", "loss"), ("grpo", "loss")])
def test_without_a_value_function_a_response_is_compared_with_the_others_to_its_prompt(
    advantage: str, kl_in: str
) -> None:
    roles = disturbed()
    trees = [tree for tree in models.forest(60, most_branches=3) if len(tree.branches) == 3][:6]
    trees = [_read_whole(tree, number) for number, tree in enumerate(trees)]
    chosen = settings(
        advantage=advantage,
        samples_per_prompt=3,
        kl_coefficient=0.2,
        kl_in=kl_in,
        kl_estimator="k3",
        tokens_per_batch=60,
    )
    group = rl.collected(roles, rl.given(trees), chosen)
    for each in group:
        divergences = each.batch.sum_by_branch((-each.log_ratios).exp() - 1 + each.log_ratios)
        worth = each.rewards - (0.2 if kl_in == "reward" else 0.0) * divergences
        for number, mine in enumerate(worth.tolist()):
            first = number - number % 3
            others = [worth[place].item() for place in range(first, first + 3) if place != number]
            everyone = np.array([mine, *others])
            expected = mine - sum(others) / 2 if advantage == "rloo" else (mine - everyone.mean()) / everyone.std()
            assert each.advantages[each.batch.branch_of_read == number].tolist() == pytest.approx(
                [expected] * each.counts[number], abs=1e-3
            )
        assert not each.returns.any()


def test_a_response_that_does_not_end_is_penalised_and_its_own_reward_kept() -> None:
    roles, trees = four_roles(), models.responses(4)
    chosen = settings(missing_eos_penalty=1.5)
    found = [rl.collected(roles, rl.given(trees, [ended] * 4), chosen)[0] for ended in (True, False)]
    assert torch.equal(found[0].rewards, found[1].rewards)
    assert torch.equal(found[0].scores, found[0].rewards)
    assert torch.allclose(found[1].scores, found[0].scores - 1.5)


def test_advantages_are_whitened_over_the_whole_rollout() -> None:
    group = rl.sampled(disturbed(), settings(tokens_per_batch=30))
    advantages, raw = rl.joined(group, "advantages"), rl.joined(group, "returns") - rl.joined(group, "values")
    assert advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages.var(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(advantages, shaping.whiten(raw, torch.ones_like(raw, dtype=torch.bool)), atol=1e-5)
    assert len(group) > 1
    assert abs(group[0].advantages.mean().item()) > 1e-4


@pytest.mark.parametrize("which", ["policy", "value"])
def test_ppo_gradients_do_not_depend_on_the_size_of_batches(which: str) -> None:
    gradients = []
    for budget in (1, 10_000):
        roles = disturbed()
        chosen = settings(tokens_per_batch=budget)
        group = rl.collected(roles, rl.given(models.responses(8)), chosen)
        for each in group:
            each.logprobs = each.logprobs - 0.05
            each.values = each.values - 0.1
        losses = rl.losses(roles, chosen)
        parts = losses.policy(group, 0.05) if which == "policy" else losses.value(group)
        for part in parts:
            part.loss.backward()
        gradients.append([each.grad for _, each in roles.parameters(which)])
    assert max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True)) < 1e-6


def test_the_policy_learns_what_is_rewarded() -> None:
    roles = models.roles(POLICY)
    before = sampled_chance(roles, 50)
    updater = Updater(roles.parameters(POLICY), Optimizer(learning_rate=0.02, warmup=0.0), 30)
    trees = trees_of([(7, 8)] * 2, [Sample((50,), True), Sample((60,), True)])
    for _ in range(5):
        (each,) = rl.collected(roles, rl.given(trees), unrewarded())
        each.advantages = torch.tensor([1.0, -1.0])
        updater.step(rl.losses(roles, unrewarded()).policy([each], 0.0))
    assert sampled_chance(roles, 50) > 1.5 * before


def unrewarded() -> PpoSettings:
    """Settings of a policy without reward model and value function."""
    rules = [{"rule": "length", "words": 3}]
    return PpoSettings.model_validate(
        {"policy": "p", "data": "d", "rules": rules, "advantage": "rloo", "samples_per_prompt": 2, "max_new_tokens": 6}
    )


@torch.no_grad()
def sampled_chance(roles: Roles, token: int) -> float:
    with roles.use(POLICY):
        return torch.softmax(roles.base.model(torch.tensor([[7, 8]])).logits[0, -1], -1)[token].item()
