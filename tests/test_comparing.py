"""A model against its parent: what `evaluate` says of their answers and of the text that both read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import exp

import numpy as np
import pytest

from data.schema import Message, Prompt
from data.tree import Branch, Tree
from pipeline import gate
from pipeline.manifest import Metric
from reward.comparison import Judgement, mcnemar, prompts_needed
from reward.intervals import paired_difference, proportion_difference
from reward.length_control import length_controlled
from stages.core.answers import Answers
from stages.core.comparison import Comparison, compare, corrected_tests
from stages.core.documents import Likelihood
from stages.evaluate import _of_text_against

TASKS = ["sums"] * 6 + ["facts"] * 5 + ["rare"]
PROMPTS = [Prompt((Message("user", str(number)),), {"task": task}) for number, task in enumerate(TASKS)]


def answers(gold: list[float], correct: list[float], texts: list[str], rewards: list[float] | None = None) -> Answers:
    trees = [Tree((1,), (Branch.of((2,) * (len(text) + 1)),), number) for number, text in enumerate(texts)]
    return Answers(texts, trees, gold, correct, rewards or [])


def counts(found: Comparison, judge: str) -> tuple[int, int, int, int]:
    """What one judge says."""
    said = found.judgements[judge]
    return said.won, said.tied, said.lost, said.unread


@pytest.fixture
def both() -> tuple[Answers, Answers]:
    """A model and its parent, which is as good at facts and worse at sums."""
    own = answers([0.9] * 4 + [0.5] * 8, [1.0] * 8 + [0.5] * 4, ["long answer"] * 6 + ["ab"] * 6)
    parent = answers([0.1] * 3 + [0.9] + [0.5] * 8, [0.0] * 5 + [1.0] * 3 + [0.0] * 4, ["abc"] * 12)
    return own, parent


def test_gains_are_paired_and_wins_are_counted_by_gold(both: tuple[Answers, Answers]) -> None:
    own, parent = both
    found = compare(own, parent, PROMPTS, {})
    assert counts(found, "gold") == (3, 9, 0, 0)
    assert found.metrics["gold_gain"] == paired_difference(own.gold, parent.gold)
    assert found.metrics["accuracy_gain"].value == pytest.approx(5 / 12)
    assert found.metrics["accuracy.sums_gain"].value == pytest.approx(5 / 6)
    assert found.metrics["accuracy.facts_gain"].value == 0
    sums = proportion_difference([1.0] * 6, [0.0] * 5 + [1.0])
    assert found.metrics["accuracy.sums_gain"] == sums
    assert found.metrics["win_rate.gold"].value == pytest.approx((3 + 4.5) / 12)
    longer = [len(a) - len(b) for a, b in zip(own.texts, parent.texts, strict=True)]
    won = [1.0] * 3 + [0.5] * 9
    assert found.metrics["win_rate_length_controlled.gold"] == length_controlled(won, longer)
    assert found.metrics["length_ratio"].value == pytest.approx((6 * 12 + 6 * 3) / (12 * 4))


def test_a_task_of_one_prompt_has_a_test_and_no_gain(both: tuple[Answers, Answers]) -> None:
    found = compare(*both, PROMPTS, {})
    assert "accuracy.rare_gain" not in found.metrics
    assert found.correct["accuracy.rare"] == ([0.0], [0.0])


def test_the_prompts_needed_are_named_only_where_nothing_is_clear(both: tuple[Answers, Answers]) -> None:
    own, parent = both
    unclear = answers([0.4, 0.6] * 6, [0.0] * 12, own.texts)
    other = answers([0.5, 0.4] * 6, [0.0] * 12, own.texts)
    differences = np.array(unclear.gold) - np.array(other.gold)
    assert compare(unclear, other, PROMPTS, {}).needed == {"gold": prompts_needed(differences, differences.mean())}
    assert "accuracy" not in compare(own, parent, PROMPTS, {}).needed


def test_two_prompts_that_are_both_gained_are_no_clear_gain_and_need_no_two_prompts_to_be_one() -> None:
    texts = ["a", "b"]
    found = compare(answers([1.0] * 2, [1.0] * 2, texts), answers([0.0] * 2, [0.0] * 2, texts), PROMPTS[:2], {})
    required = {"dpo": {"accuracy": "> parent", "gold": "> parent"}}
    assert [each.holds for each in gate.check(required, _named(found.metrics))] == [False, False]
    mostly = compare(answers([], [1, 1, 0], ["a"] * 3), answers([], [0, 0, 0], ["a"] * 3), PROMPTS[:3], {})
    assert prompts_needed([1, 1, 0], 2 / 3) == 6
    assert mostly.needed["accuracy"] == 6


def test_three_wins_of_three_are_no_clear_preference(both: tuple[Answers, Answers]) -> None:
    judge = Judgement([1.0] * 3 + [None] * 9, changed=0)
    found = compare(*both, PROMPTS, {"gpt": judge})
    rate, more = found.metrics["win_rate.gpt"], proportion_difference([1.0] * 3, [0.0] * 3)
    assert (rate.value, rate.low, rate.high, rate.n) == (1.0, 0.5 + (more.low or 0) / 2, 1.0, 3)
    assert rate.low < 0.5  # type: ignore[operator]
    assert not any(each.holds for each in gate.check({"dpo": {"win_rate.gpt": "> 0.5"}}, _named(found.metrics)))


def test_ties_alone_leave_a_preference_open(both: tuple[Answers, Answers]) -> None:
    rate = compare(*both, PROMPTS, {"gpt": Judgement([0.5] * 12, changed=0)}).metrics["win_rate.gpt"]
    assert rate.value == 0.5
    assert rate.low < 0.5 < rate.high  # type: ignore[operator]


def _named(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    return {f"dpo.{name}": each for name, each in metrics.items()}


def test_the_reward_decides_without_a_gold_reward_and_beside_one(both: tuple[Answers, Answers]) -> None:
    own = answers([], [], both[0].texts, [1.0] * 12)
    parent = answers([], [], both[1].texts, [0.0] * 11 + [2.0])
    found = compare(own, parent, PROMPTS, {})
    assert counts(found, "reward") == (11, 0, 1, 0)
    assert found.judgements.keys() == {"reward"}
    assert found.correct == {}
    beside = compare(replace(both[0], rewards=own.rewards), replace(both[1], rewards=parent.rewards), PROMPTS, {})
    assert counts(beside, "reward") == (11, 0, 1, 0)
    assert counts(beside, "gold") == (3, 9, 0, 0)


def test_without_any_judge_nothing_is_won(both: tuple[Answers, Answers]) -> None:
    found = compare(answers([], [], both[0].texts), answers([], [], both[1].texts), PROMPTS, {})
    assert found.metrics.keys() == {"length_ratio"}
    assert found.judgements == found.tested == {}


def test_pairs_that_a_judge_of_pairs_did_not_decide_are_in_no_win_rate_of_it(both: tuple[Answers, Answers]) -> None:
    judge = Judgement([1.0] * 2 + [0.0] * 5 + [0.5] * 2 + [None] * 3, changed=1)
    found = compare(*both, PROMPTS, {"gpt": judge})
    assert counts(found, "gpt") == (2, 2, 5, 3)
    assert found.metrics["win_rate.gpt"].n == found.metrics["win_rate_length_controlled.gpt"].n == 9
    assert found.metrics["win_rate.gpt"].value == pytest.approx(3 / 9)
    assert found.metrics["win_rate.gold"].n == 12
    assert found.tested["win_rate.gpt"] == ([1.0] * 2 + [0.0] * 7, [0.0] * 2 + [1.0] * 5 + [0.0] * 2)


def test_only_a_judge_of_pairs_is_counted_as_unread_or_changed(both: tuple[Answers, Answers]) -> None:
    found = compare(*both, PROMPTS, {"gpt": Judgement([1.0] * 11 + [None], changed=1)}).as_json({})
    assert found["judges"] == {
        "gold": {"won": 3, "tied": 9, "lost": 0},
        "gpt": {"won": 11, "tied": 0, "lost": 0, "unread": 1, "changed": 1},
    }


def test_rules_judge_by_their_scores_and_each_judge_has_figures_of_its_own(both: tuple[Answers, Answers]) -> None:
    own, parent = replace(both[0], by_rules={"short": [0.5] * 12}), replace(both[1], by_rules={"short": [1.0] * 12})
    found = compare(own, parent, PROMPTS, {"gpt": Judgement([1.0] * 12, changed=0)})
    assert list(found.judgements) == ["gold", "gpt", "short"]
    assert counts(found, "short") == (0, 0, 12, 0)
    assert found.metrics["score.short_gain"].value == -0.5
    assert [found.metrics[f"win_rate.{judge}"].value for judge in found.judgements] == [0.625, 1.0, 0.0]


def test_the_prompts_needed_are_those_of_each_judge(both: tuple[Answers, Answers]) -> None:
    outcomes = [1.0, 0.0, 0.5] * 3 + [1.0, 0.0, 1.0]
    judges = {"gpt": Judgement([*outcomes], changed=0), "clear": Judgement([1.0] * 11 + [0.5], changed=0)}
    needed = compare(*both, PROMPTS, judges).needed
    assert needed["win_rate.gpt"] == prompts_needed(np.array(outcomes) - 0.5, np.mean(outcomes) - 0.5)
    assert needed["win_rate.gold"] == needed["gold"]  # all differences are of one size
    assert "win_rate.clear" not in needed


def test_where_no_verdict_could_be_read_there_is_no_win_rate(both: tuple[Answers, Answers]) -> None:
    found = compare(*both, PROMPTS, {"gpt": Judgement([None] * 12, changed=0)})
    assert "win_rate.gpt" not in found.metrics | found.tested
    assert counts(found, "gpt") == (0, 0, 0, 12)


def test_accuracies_of_all_models_are_corrected_together(both: tuple[Answers, Answers]) -> None:
    comparison = compare(*both, PROMPTS, {})
    correct = comparison.correct
    alone, together = corrected_tests({"dpo": correct}), corrected_tests({"dpo": correct, "ppo": correct})
    assert alone["dpo"]["accuracy.sums"].p == together["ppo"]["accuracy.sums"].p == mcnemar(5, 0)
    assert alone["dpo"]["accuracy.sums"].adjusted == pytest.approx(4 * mcnemar(5, 0))
    assert together["dpo"]["accuracy.sums"].adjusted == pytest.approx(8 * mcnemar(5, 0))
    assert comparison.as_json(alone["dpo"])["tests"]["accuracy.sums"]["gained"] == 5


def documents(losses: dict[int, float], tokens: int) -> dict[int, Likelihood]:
    """Documents of so many tokens each, by their losses."""
    return {number: Likelihood(loss, tokens, bytes=3 * tokens) for number, loss in losses.items()}


def test_text_is_compared_on_the_documents_that_both_read() -> None:
    parent = documents({0: 10.0, 1: 20.0, 2: 30.0}, tokens=10)
    own = documents({1: 22.0, 2: 33.0, 3: 99.0}, tokens=10)
    found = _of_text_against(own, parent)
    assert found["bits_per_byte_ratio"].value == pytest.approx(55 / 50)
    assert found["perplexity_ratio"].value == pytest.approx(exp(55 / 20) / exp(50 / 20))
    low, high = found["perplexity_ratio"].low, found["perplexity_ratio"].high
    assert low is not None
    assert high is not None
    assert exp(0.2) == pytest.approx(low)
    assert exp(0.3) == pytest.approx(high)


def test_perplexities_of_other_tokens_are_not_compared() -> None:
    losses = {0: 10.0, 1: 9.0}
    assert _of_text_against(documents(losses, 5), documents(losses, 10)).keys() == {"bits_per_byte_ratio"}
    assert _of_text_against({}, documents(losses, 10)) == {}
