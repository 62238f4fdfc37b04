"""Which policy is handed on, and when the score falls while the reward rises."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import models
import numpy as np
import pytest
import rl
import torch

from data.mixture import Mixture
from data.schema import Prompt
from stages.core.rl.prompts import EncodedPrompt, Prompts
from stages.core.rl.rewards import Rewards, Scale
from stages.core.rl.sampling import Rollout
from stages.core.rl.selection import Look, Selection
from stages.core.roles import POLICY, Roles
from stages.core.rollout import Sample

ANSWER = {"answer": "four"}


def selection(roles: Roles, rollout: Rollout, gold: str, **changes: object) -> Selection:
    chosen = rl.settings(gold=gold, **changes)
    return Selection(roles, lambda: rollout, Rewards(roles, chosen), rl.collector(roles, chosen), chosen)


def answers(*texts: str, per_prompt: int = 2) -> Rollout:
    template = models.language_model().template
    samples = [Sample(template.response(text), True, (0.0,) * len(template.response(text))) for text in texts]
    prompts = [EncodedPrompt((7, 8, number), Prompt((), ANSWER, "row")) for number in range(len(texts) // per_prompt)]
    return Rollout(prompts, samples)


def test_the_score_of_a_prompt_is_the_mean_over_its_responses_by_the_rule() -> None:
    made = selection(rl.four_roles(), answers("four", "five", "no", "four", "four", "four"), "exact")
    assert made.look(0, Scale())["held_out"] == pytest.approx(4 / 6)
    assert made.looks[0].scores.tolist() == [0.5, 0.5, 1.0]


def test_without_a_rule_the_reward_is_the_score() -> None:
    made = selection(rl.four_roles(), answers("four", "five"), "none")
    found = made.look(0, Scale())
    assert found["held_out"] == found["held_out_reward"] != 0.0
    assert made.over_optimised == ""


def test_without_a_rule_the_score_is_what_is_trained_for_penalties_and_all() -> None:
    rollout = answers("four", "five")
    cut = Rollout(rollout.prompts, [rollout.samples[0], dataclasses.replace(rollout.samples[1], ended=False)])
    made = selection(rl.four_roles(), cut, "none", missing_eos_penalty=3.0, length_penalty=0.5)
    found = made.look(0, Scale(mean=0.25, deviation=2.0))
    penalties = (3.0 + 0.5 * sum(len(each.tokens) for each in cut.samples)) / 2
    assert found["held_out"] == pytest.approx((found["held_out_reward"] - 0.25) / 2.0 - penalties)


def test_a_policy_that_learnt_to_end_is_handed_on_though_its_rewards_are_the_same() -> None:
    roles, ends = rl.four_roles(), answers("four", "four")
    never = Rollout(ends.prompts, [dataclasses.replace(each, ended=False) for each in ends.samples])
    made = selection(roles, never, "none")
    made.look(0, Scale())
    made._look_at = lambda: ends  # type: ignore[method-assign]
    made.look(1, Scale())
    assert made.looks[0].rewards.tolist() == made.looks[1].rewards.tolist()
    assert made.best.round == 1


def test_that_nothing_learnt_is_handed_on_is_told_and_why() -> None:
    made = selection(rl.four_roles(), answers("four", "no"), "exact")
    made.look(0, Scale())
    made._look_at = lambda: answers("no", "no")  # type: ignore[method-assign]
    made.look(1, Scale())
    assert "the one that the stage began with: `gold: exact` gave no later one more" in made.idle
    assert "all prompts the same" not in made.idle
    made._look_at = lambda: answers("four", "four")  # type: ignore[method-assign]
    made.look(2, Scale())
    assert made.idle == ""
    blind = selection(rl.four_roles(), answers("no", "no"), "exact")
    for number in range(2):
        blind.look(number, Scale())
    assert "and all prompts the same every time" in blind.idle


def test_how_far_rewards_are_apart_is_told_within_prompts_or_where_each_has_one_response_between_them() -> None:
    chosen = {"reward": None, "rules": [{"rule": "exact"}]}
    for per_prompt, expected in ((2, [0.0, 1.0]), (1, [1.0, 1.0])):
        found = []
        for texts in (("four", "four", "no", "no"), ("four", "no", "no", "no")):
            made = selection(rl.four_roles(), answers(*texts, per_prompt=per_prompt), "none", **chosen)
            made.look(0, Scale())
            found.append(made.looks[0].apart)
        assert found == expected


def test_its_size_is_that_of_what_it_keeps() -> None:
    made = selection(rl.four_roles(), answers("four", "no"), "exact")
    expected = made.size
    made.look(0, Scale())
    assert expected == sum(each.nbytes for each in made.state().tensors.values()) > 0


def test_the_policy_that_did_best_is_put_back_bit_for_bit() -> None:
    roles = rl.four_roles()
    texts = {0: ("no", "no"), 1: ("four", "no"), 2: ("four", "four"), 3: ("four", "no")}
    made, weights = selection(roles, answers("no", "no"), "exact"), {}
    for number, said in texts.items():
        models.disturb(roles, POLICY, seed=number)
        weights[number] = [each.clone() for _, each in roles.parameters(POLICY)]
        made._look_at = lambda said=said: answers(*said)  # type: ignore[misc]
        made.look(number, Scale())
    assert made.best.round == 2
    made.restore()
    assert all(torch.equal(a, b) for a, (_, b) in zip(weights[2], roles.parameters(POLICY), strict=True))
    assert made.metrics["held_out"].value == 1.0
    assert made.metrics["held_out_gain"].value == 1.0
    assert made.metrics["chosen_round"].value == 2


def test_a_policy_that_stands_still_is_not_looked_at_again_however_far_its_rounds_are_from_held_out_prompts() -> None:
    made = selection(rl.four_roles(), answers("four", "no"), "exact")
    made.look(0, Scale())
    far = made.looks[0].kl + 10.0
    assert made.is_due(far)
    made.look(1, Scale(), far)
    assert not made.is_due(far)
    assert made.is_due(far + 1.1)
    other = selection(rl.four_roles(), answers("four", "no"), "exact")
    other.load_state(made.state())
    assert not other.is_due(far)


def test_of_equal_scores_the_earlier_policy_is_kept() -> None:
    made = selection(rl.four_roles(), answers("four", "no"), "exact")
    for number in range(3):
        made.look(number, Scale())
    assert made.best.round == 0


def seen(scores: Sequence[float], rewards: Sequence[float], noise: float = 0.0, prompts: int = 100) -> str:
    """What is said after looks with these means; prompts differ a lot, each from look to look by the noise."""
    made, generator = selection(rl.four_roles(), answers("four", "no"), "exact"), np.random.default_rng(0)
    hard = generator.normal(size=prompts)
    for number, (score, reward) in enumerate(zip(scores, rewards, strict=True)):
        moved = generator.normal(size=prompts) * noise
        made.looks.append(Look(number, hard + score + moved - moved.mean(), np.full(prompts, reward), 0.0, 0.0))
    return made.over_optimised


def test_a_score_that_falls_while_the_reward_rises_is_told_before_it_fell_by_a_twentieth() -> None:
    assert "fell by 0.030 from its best after round 1" in seen([0.5, 0.7, 0.67], [1.0, 2.0, 3.0], noise=0.05)


def test_a_score_that_falls_with_the_reward_is_another_matter() -> None:
    assert seen([0.5, 0.7, 0.6], [1.0, 2.0, 1.5]) == ""


def test_a_fall_within_the_noise_is_not_told() -> None:
    assert seen([0.5, 0.7, 0.66], [1.0, 2.0, 3.0], noise=0.5) == ""


def test_a_fall_too_small_to_matter_is_not_told() -> None:
    assert seen([0.5, 0.7, 0.69], [1.0, 2.0, 3.0]) == ""


def test_the_prompts_looked_at_are_drawn_from_all_that_are_held_out() -> None:
    held_out = [EncodedPrompt((7, number), Prompt((), ANSWER, "row")) for number in range(100)]
    prompts = Prompts(Mixture({"data": held_out[:1]}, None, 0), held_out, [])
    chosen = prompts.looked_at(20, seed=0)
    assert len({each.tokens for each in chosen}) == 20
    assert any(each in held_out[:50] for each in chosen)
    assert any(each in held_out[50:] for each in chosen)
    assert chosen == prompts.looked_at(20, seed=0) != prompts.looked_at(20, seed=1)
    assert prompts.looked_at(1000, seed=0) != held_out[:1000]


def test_looking_leaves_the_policy_and_its_gradients_alone() -> None:
    roles = rl.disturbed()
    before = models.snapshot(roles.base.model)
    selection(roles, rl.given(models.responses(4)), "none").look(0, Scale())
    assert not models.changed(roles.base.model, before)
    assert all(each.grad is None for _, each in roles.parameters(POLICY))
