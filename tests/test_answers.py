"""Answers of a model: n to each prompt side by side, each judged by itself."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import pytest

from data.schema import Message, Prompt
from data.tree import Branch, Tree
from pipeline.config import EvaluateSettings
from pipeline.contract import Artifact
from pipeline.errors import ConfigError
from reward.best_of_n import Frontier
from stages.core.answers import PLAIN, Answers, answer
from stages.core.lineup import Contestant
from stages.core.roles import REFERENCE, REWARD, Roles
from stages.core.scoring import scores

PROMPTS = [
    Prompt((Message("user", f"What is {number} plus {number}?"),), {"answer": "7"}, f"prompts:{number}")
    for number in range(5)
]


def settings(**changes: object) -> EvaluateSettings:
    return EvaluateSettings.model_validate(
        {"models": ["sft"], "reward": "rm", "prompts": "prompts", "gold": "numeric", "max_new_tokens": 6} | changes
    )


@pytest.fixture(scope="module")
def judge() -> Roles:
    roles = models.roles(REWARD)
    roles.add_head(REWARD)
    models.disturb(roles, REWARD)
    return roles


@pytest.fixture
def contestant(judge: Roles) -> Contestant:
    return Contestant("sft", Artifact(Path(), "model", "sft", None, "sft", None), judge, REFERENCE, None)


def test_several_answers_to_a_prompt_stand_side_by_side(contestant: Contestant, judge: Roles) -> None:
    found = answer(contestant, PROMPTS, judge, settings(), seed=0, per_prompt=3)
    template = judge.base.template
    assert [len(tree.branches) for tree in found.trees] == [3] * 5
    texts = [template.decode(branch.tokens) for tree in found.trees for branch in tree.branches]
    assert found.texts == texts
    assert len(found.gold) == len(found.correct) == len(found.rewards) == 15
    assert found.tokens == sum(len(branch.tokens) for tree in found.trees for branch in tree.branches)
    assert len(set(texts)) > 5


def test_each_answer_is_judged_by_itself_and_to_its_own_prompt(contestant: Contestant, judge: Roles) -> None:
    found = answer(contestant, PROMPTS, judge, settings(), seed=0, per_prompt=2)
    template = judge.base.template
    for place, reward in enumerate(found.rewards):
        tree = found.trees[place // 2]
        ended = tree.branches[place % 2].tokens[-1] == template.stop_id
        tokens = template.response(found.texts[place])
        alone = Tree(tree.prompt, (Branch.of(tokens if ended else tokens[:-1]),), 0)
        assert scores(judge, REWARD, [alone], layout=PLAIN)[0] == pytest.approx([reward], abs=1e-5)


def test_one_answer_each_is_the_default_and_the_seed_decides_it(contestant: Contestant, judge: Roles) -> None:
    first, again, other = (answer(contestant, PROMPTS, judge, settings(), seed) for seed in (0, 0, 1))
    assert len(first.texts) == 5
    assert first == again
    assert first.texts != other.texts


def test_prompts_that_lose_their_beginning_are_counted(contestant: Contestant) -> None:
    long = Prompt((Message("user", "word " * 60),), {"answer": "7"}, "prompts:9")
    given = settings(max_length=60, reward=None)
    assert answer(contestant, PROMPTS, None, given, seed=0).cut == 0
    found = answer(contestant, [*PROMPTS, long], None, given, seed=0)
    assert found.cut == 1
    assert len(found.trees[-1].prompt) == 60 - 6


def test_a_response_as_long_as_all_positions_is_refused(contestant: Contestant) -> None:
    with pytest.raises(ConfigError, match="sft has 256 positions, which leaves no room for a prompt before 256 tokens"):
        answer(contestant, PROMPTS, None, settings(max_new_tokens=256, reward=None), seed=0)


def test_without_judges_there_are_no_figures(contestant: Contestant) -> None:
    found = answer(contestant, PROMPTS, None, settings(gold="none", reward=None), seed=0)
    assert (found.gold, found.correct, found.rewards, found.judged) == ([], [], [], [])


@pytest.mark.parametrize("has_gold", [True, False])
def test_the_frontier_chooses_among_the_answers_to_one_prompt(has_gold: bool) -> None:
    dice = np.random.default_rng(0)
    rewards, gold = dice.normal(size=(4, 6)), dice.normal(size=(4, 6)) if has_gold else None
    answers = Answers(
        texts=["yes"] * 24,
        trees=[Tree((1,), (Branch.of((2,)),) * 6, number) for number in range(4)],
        gold=[] if gold is None else gold.flatten().tolist(),
        correct=[],
        rewards=rewards.flatten().tolist(),
    )
    found, expected = answers.frontier(), Frontier.of(rewards, gold)
    assert found.counts == expected.counts == (1, 2, 4, 6)
    assert found.rewards == pytest.approx(expected.rewards)
    assert answers.judged == (answers.gold if has_gold else answers.rewards)
    if gold is None:
        assert found.gold is None
    else:
        assert found.gold == pytest.approx(expected.gold)
