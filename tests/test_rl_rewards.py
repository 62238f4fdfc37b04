"""Rewards of rules and models, on one scale, with penalties."""

from __future__ import annotations

from dataclasses import replace

import models
import pytest
import rl
import torch

from data.schema import Message, Prompt
from pipeline.config import PpoSettings
from stages.core.rl.prompts import EncodedPrompt
from stages.core.rl.rewards import Rewards, Scale
from stages.core.rl.sampling import Rollout
from stages.core.roles import REWARD
from stages.core.rollout import Sample
from stages.core.scoring import scores


def ruled(**changes: object) -> PpoSettings:
    rules = [{"rule": "exact", "weight": 2.0}, {"rule": "length", "words": 1, "weight": -1.0}]
    return PpoSettings.model_validate(
        {"policy": "p", "data": "d", "rules": rules, "advantage": "rloo", "samples_per_prompt": 2, **changes}
    )


def answered(*texts: str) -> Rollout:
    """Two responses to each prompt, whose answer is `four`."""
    template = models.language_model().template
    row = Prompt((Message("user", "2 plus 2?"),), {"answer": "four"}, "row 1")
    samples = [Sample(template.response(text), True) for text in texts]
    return Rollout([EncodedPrompt((7, 8), row)] * (len(texts) // 2), samples)


def test_rules_are_added_by_weight_for_each_response_to_each_prompt() -> None:
    found = Rewards(models.roles("policy"), ruled()).of_rules(answered("four", "one two", "four five", "no"))
    # Of one word more than allowed, a response gets no reward for its length.
    assert found == pytest.approx([2.0 - 1.0, 0.0, 0.0, -1.0])


def test_without_rules_responses_get_nothing_from_them() -> None:
    assert Rewards(rl.four_roles(), rl.settings()).of_rules(answered("four", "five")) == [0.0, 0.0]


def test_a_models_score_is_added_to_the_rules_by_its_weight() -> None:
    roles, trees = rl.four_roles(), models.responses(5)
    chosen = rl.settings(reward_weight=0.5)
    rollout = rl.given(trees)
    group = rl.collector(roles, chosen).collect(rollout, rollout.trees(), [1.0, 2.0, 3.0, 4.0, 5.0])
    alone = scores(roles, REWARD, trees)
    for each in group:
        for place, reward in zip(rollout.of(each.batch), each.rewards.tolist(), strict=True):
            assert reward == pytest.approx(0.5 * alone[place][0] + 1.0 + place, abs=1e-5)


@pytest.mark.parametrize("how", ["none", "mean", "deviation"])
def test_the_scale_is_that_of_the_first_rewards(how: str) -> None:
    rewards = torch.tensor([1.0, 3.0, 5.0, 11.0])
    chosen = rl.settings(reward_normalisation=how, missing_eos_penalty=0.0)
    found = Scale.of(rewards, chosen).scores(rewards, torch.ones(4, dtype=torch.bool), torch.ones(4), chosen)
    if how == "none":
        assert torch.equal(found, rewards)
        return
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.std(unbiased=False).item() == pytest.approx(1 if how == "deviation" else rewards.std(unbiased=False))


def test_equal_rewards_have_a_scale_too() -> None:
    chosen = rl.settings(reward_normalisation="deviation")
    assert Scale.of(torch.full((3,), 2.0), chosen) == Scale(2.0, 1.0)


def test_rewards_are_clipped_on_their_scale_and_penalties_come_after() -> None:
    chosen = rl.settings(reward_clip=1.0, missing_eos_penalty=0.5, length_penalty=0.25)
    ended, lengths = torch.tensor([True, False, False]), torch.tensor([2, 4, 0])
    found = Scale(10.0, 2.0).scores(torch.tensor([30.0, 11.0, -10.0]), ended, lengths, chosen)
    assert found.tolist() == pytest.approx([1.0 - 0.5, 0.5 - 0.5 - 1.0, -1.0 - 0.5])


def test_equal_responses_to_a_prompt_have_one_reward_whatever_their_place_in_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roles = rl.four_roles()
    trees = [replace(tree, branches=(*tree.branches, tree.branches[0])) for tree in models.pairs(3)]
    monkeypatch.setattr(roles.heads[REWARD], "forward", lambda states: torch.arange(len(states)).float())
    rollout = rl.given(trees)
    (group,) = rl.collector(roles, rl.settings()).collect(rollout, rollout.trees(), [0.0] * 9)
    assert group.rewards.tolist() == [0.0, 1.0, 0.0, 3.0, 4.0, 3.0, 6.0, 7.0, 6.0]
