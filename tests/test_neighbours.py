"""Rejection sampling and online DPO: what is learnt from, and that it is learnt."""

from __future__ import annotations

import random
from random import Random

import models
import pytest
import rl
import torch

from data.tree import Branch, Tree
from pipeline.config import OnlineDpoSettings, Optimizer, RejectionSettings, Rounds
from stages import online_dpo, rejection
from stages.core.rl.ranking import Ranking, best_of, pairs_of
from stages.core.rl.sampling import Sampler
from stages.core.rl.trunk import Trunk
from stages.core.roles import POLICY, Roles
from stages.core.scoring import logprobs

BASIS = {"policy": "p", "reward": "r", "data": "d", "max_new_tokens": 6, "steps": 40}
FAST = Optimizer(learning_rate=0.02, warmup=0.0, schedule="constant")


def forest(prompts: int, branches: int) -> list[Tree]:
    chance = random.Random(0)
    return [
        Tree((7, number), tuple(Branch.of((chance.randrange(5, 200),)) for _ in range(branches)), number)
        for number in range(prompts)
    ]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_best_responses_are_kept_best_first(keep: int) -> None:
    trees, scores = forest(5, 4), torch.randn(5, 4)
    for tree, best, own in zip(trees, best_of(trees, scores, keep), scores.tolist(), strict=True):
        order = sorted(range(4), key=lambda place: -own[place])[:keep]
        assert best.branches == tuple(tree.branches[place] for place in order)
        assert best.prompt == tree.prompt


def test_no_response_is_learnt_that_is_as_bad_as_the_worst() -> None:
    trees, scores = forest(3, 4), torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0], [3.0, 1.0, 2.0, 0.0]])
    best = [each.branches for each in best_of(trees, scores, 3)]
    places = [[1], [0, 2, 3], [0, 2, 1]]
    assert best == [tuple(tree.branches[place] for place in own) for tree, own in zip(trees, places, strict=True)]


def test_a_pair_is_the_best_response_and_the_worst() -> None:
    trees, scores = forest(5, 4), torch.randn(5, 4)
    for tree, pair, own in zip(trees, pairs_of(trees, scores), scores.tolist(), strict=True):
        assert pair.branches == (tree.branches[own.index(max(own))], tree.branches[own.index(min(own))])


def test_prompts_whose_responses_are_all_alike_teach_nothing() -> None:
    trees, scores = forest(3, 2), torch.tensor([[1.0, 2.0], [0.5, 0.5], [2.0, 1.0]])
    assert [tree.number for tree in pairs_of(trees, scores)] == [0, 2]
    assert [tree.number for tree in best_of(trees, scores, 1)] == [0, 2]


@pytest.mark.parametrize("kind", ["rejection", "online_dpo"])
def test_a_round_without_anything_to_learn_changes_nothing(kind: str) -> None:
    roles = rl.four_roles()
    made, chosen = learner(kind, roles)
    rollout = Sampler(roles, chosen).rollout(rl.prompts(4), 0)
    group = rl.collector(roles, chosen).collect(rollout, rollout.trees(), [0.0] * len(rollout.samples))
    for each in group:
        each.scores = torch.ones(each.batch.branches)
    before = models.snapshot(roles.base.model)
    assert made.learn(rollout, [group], 0, Random(0))["tokens"] == 0.0
    assert not models.changed(roles.base.model, before)


def learner(kind: str, roles: Roles) -> tuple[Ranking, Rounds]:
    trunk = Trunk(roles.base.model, 0)
    if kind == "rejection":
        chosen = RejectionSettings.model_validate({**BASIS, "optimizer": FAST})
        return rejection.learner(chosen, roles, "packed", trunk), chosen
    own = OnlineDpoSettings.model_validate({**BASIS, "optimizer": FAST, "samples_per_prompt": 4})
    return online_dpo.learner(own, roles, "packed", trunk), own


def test_the_same_response_many_times_teaches_nothing_though_its_scores_differ_by_rounding() -> None:
    same = Tree((7,), (Branch.of((50, 1)),) * 3)
    near = Tree((7,), (Branch.of((50, 1)), Branch.of((60, 1)), Branch.of((70, 1))))
    scores = torch.tensor([[0.1, 0.3, 0.2], [0.1, 0.1 + 1e-6, 0.1]])
    assert pairs_of([same, near], scores) == []
    assert best_of([same, near], scores, 1) == []


@pytest.mark.parametrize("kind", ["rejection", "online_dpo"])
def test_responses_of_higher_scores_become_likelier(kind: str) -> None:
    roles = models.roles(POLICY)
    made, _ = learner(kind, roles)
    trees = [Tree((7, 8, number), (Branch.of((50,)), Branch.of((60,))), number) for number in range(4)]
    rollout = rl.given(trees)
    with roles.use(POLICY):
        before = logprobs(roles.base, trees)
    for number in range(5):
        group = rl.collector(roles, rl.settings(reward=None, rules=[{"rule": "length", "words": 3}])).collect(
            rollout, trees, [0.0] * 8
        )
        for each in group:
            each.scores = torch.tensor([float(place % 2 == 0) for place in rollout.of(each.batch)])
        made.learn(rollout, [group], number, Random(0))
    with roles.use(POLICY):
        after = logprobs(roles.base, trees)
    for number in range(4):
        assert after[number][0] - after[number][1] > before[number][0] - before[number][1] + 0.1
        if kind == "rejection":
            assert after[number][0] > before[number][0]
