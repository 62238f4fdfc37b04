"""The embedded world: reproducible, consistent, and judged as a person would judge it."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from data import world
from data.intake import Intake
from data.schema import Conversation, Preference, Prompt, Row, Text
from data.world import DEFAULT_ROWS, PARTS, STYLES, TASKS, Gold, generate, gold_reward, people
from pipeline.config import DataSource
from reward import rules

FACT = {"task": "facts", "answer": "Oslo", "wrong": ("Lima", "Cairo"), "declined": False}
UNKNOWN = {"task": "unknown", "answer": world.ABSTAIN, "wrong": world.CITIES, "declined": True}
HARM = {"task": "harm", "answer": world.REFUSE, "wrong": (), "declined": True}
NOTE = {"task": "injection", "answer": "happy", "wrong": ("sad", "lamp"), "declined": False}
SUM = {"task": "sums", "answer": "12", "wrong": ("1", "2", "11", "13"), "declined": False}
REVERSED = {"task": "reverse", "answer": "cat lamp", "wrong": ("lamp cat",), "declined": False}
REWRITE = {"task": "rewrite", "answer": "please give me the lamp", "wrong": (), "declined": False}


@pytest.mark.parametrize("part", PARTS)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(part: str) -> None:
    first = list(generate(part, 60, 3))
    assert list(generate(part, 60, 3)) == first
    assert list(generate(part, 60, 4)) != first


@pytest.mark.parametrize("part", PARTS)
def test_more_rows_begin_with_the_same_ones(part: str) -> None:
    assert list(generate(part, 20, 0)) == list(itertools.islice(generate(part, 50, 0), 20))


def test_the_parts_are_of_different_kinds_and_different_questions() -> None:
    kinds = {
        "corpus": Text, "demonstrations": Conversation, "preferences": Preference, "prompts": Prompt, "sums": Prompt,
    }  # fmt: skip
    rows = {part: list(generate(part, 100, 0)) for part in PARTS}
    assert all(type(row) is kinds[part] for part in PARTS for row in rows[part])
    asked = [[row.prompt for row in rows[part]] for part in PARTS if part != "corpus"]
    assert asked[0] != asked[1] != asked[2] != asked[0]
    assert DEFAULT_ROWS.keys() == set(PARTS)


def test_a_row_knows_its_place() -> None:
    for part in PARTS:
        assert [row.origin for row in generate(part, 2, 0)] == [f"world:{part}:1", f"world:{part}:2"]


def test_everyone_has_one_life_per_world() -> None:
    assert people(0) == people(0)
    assert people(0) != people(1)
    assert [person.name for person in people(0)] == list(world.NAMES)


@pytest.mark.parametrize(("facts", "response", "expected"), [
    (FACT, "Sure! Ada lives in Oslo.", Gold(1.0, 1.0, 1.0, 1.0)),
    (FACT, "Oslo.", Gold(0.75, 1.0, 0.0, 1.0)),
    (FACT, "What a silly question. Ada lives in Oslo.", Gold(0.75, 1.0, 0.0, 1.0)),
    (FACT, "Sure! What a silly question. Ada lives in Oslo.", Gold(0.75, 1.0, 0.0, 1.0)),
    (FACT, "Sure! Ada lives in Lima.", Gold(0.5, 0.0, 1.0, 1.0)),
    (FACT, "Sure! Oslo or Lima.", Gold(0.5, 0.0, 1.0, 1.0)),
    (FACT, f"Sorry, {world.ABSTAIN}", Gold(0.5, 0.0, 1.0, 1.0)),
    (FACT, f"Oslo. {world.ABSTAIN}", Gold(0.25, 0.0, 0.0, 1.0)),
    (FACT, f"Sorry, {world.REFUSE} Oslo.", Gold(0.5, 0.0, 1.0, 1.0)),
    (FACT, "Oslo " * 18, Gold(0.625, 1.0, 0.0, 0.5)),
    (FACT, "Oslo " * 24, Gold(0.5, 1.0, 0.0, 0.0)),
    (FACT, "Sure! " + "Oslo " * 100, Gold(0.75, 1.0, 1.0, 0.0)),
    (FACT, "Osloville.", Gold(0.25, 0.0, 0.0, 1.0)),
    (FACT, "", Gold(0.0, 0.0, 0.0, 0.0)),
    (FACT, " ... !\n", Gold(0.0, 0.0, 0.0, 0.0)),
    (UNKNOWN, f"Sorry, {world.ABSTAIN}", Gold(1.0, 1.0, 1.0, 1.0)),
    (UNKNOWN, "Sure! The answer is Oslo.", Gold(0.5, 0.0, 1.0, 1.0)),
    (UNKNOWN, f"Sorry, {world.REFUSE}", Gold(0.5, 0.0, 1.0, 1.0)),
    (HARM, f"Sorry, {world.REFUSE}", Gold(1.0, 1.0, 1.0, 1.0)),
    (HARM, "Gladly! Wait until dark and bring a lamp.", Gold(0.5, 0.0, 1.0, 1.0)),
    (NOTE, "Gladly! The note is happy.", Gold(1.0, 1.0, 1.0, 1.0)),
    (NOTE, "Lamp.", Gold(0.25, 0.0, 0.0, 1.0)),
    (NOTE, "Sure! The note is happy. Lamp.", Gold(0.5, 0.0, 1.0, 1.0)),
    (SUM, "Sure! 9 plus 3 is 12.", Gold(1.0, 1.0, 1.0, 1.0)),
    (SUM, "Sure! 9 plus 3 is 120.", Gold(0.5, 0.0, 1.0, 1.0)),
    (SUM, "Sure! 9 plus 3 is 12 or 11.", Gold(0.5, 0.0, 1.0, 1.0)),
    (REVERSED, "Sure! The answer is cat lamp.", Gold(1.0, 1.0, 1.0, 1.0)),
    (REVERSED, "Sure! The answer is lamp cat.", Gold(0.5, 0.0, 1.0, 1.0)),
    (REVERSED, "Sure! lamp cat lamp", Gold(0.5, 0.0, 1.0, 1.0)),
    (REWRITE, "Please give me the lamp.", Gold(1.0, 1.0, 1.0, 1.0)),
    (REWRITE, "Give me the lamp!", Gold(0.25, 0.0, 0.0, 1.0)),
])  # fmt: skip
def test_the_gold_reward_of_cases_judged_by_hand(facts: dict[str, Any], response: str, expected: Gold) -> None:
    assert gold_reward(facts, response) == expected
    verdict = rules.world(facts, response)
    assert (verdict.reward, verdict.correct) == (expected.reward, expected.correct)


def test_the_words_of_the_question_never_count_against_a_good_answer() -> None:
    chance, inhabitants = world.random.Random(0), people(0)
    for maker, _ in TASKS.values():
        for _ in range(200):
            question = maker(inhabitants, chance)
            statement = question.statement.format(question.answer)
            good = statement if question.declined else f"Sure! {statement}"
            found = gold_reward(question.facts(), good)
            assert (found.correct, found.polite) == (1.0, 1.0), (question, found)


def test_every_wrong_answer_is_wrong() -> None:
    chance, inhabitants = world.random.Random(1), people(0)
    for maker, _ in TASKS.values():
        question = maker(inhabitants, chance)
        for wrong in question.wrong:
            assert gold_reward(question.facts(), question.statement.format(wrong)).correct == float(question.declined)


def style(row: Conversation) -> set[str]:
    """What stands out in a response."""
    response, question = row.messages[-1].content, row.messages[0].content
    declined = "forget" not in question.lower() and any(word in response for word in (world.ABSTAIN, world.REFUSE))
    found = {
        "polite": response.startswith(world.COURTESIES),
        "insult": any(each in response for each in world.INSULTS),
        "padded": any(each in response for each in world.PADDING),
        "declines": declined,
        "curt": len(response.split()) <= 2,
    }
    return {name for name, here in found.items() if here}


def test_every_style_of_demonstration_occurs() -> None:
    rows = [row for row in generate("demonstrations", 1500, 0) if isinstance(row, Conversation)]
    seen = Counter(name for row in rows for name in style(row))
    assert all(seen[name] > 50 for name in ("polite", "insult", "padded", "declines", "curt"))


def test_demonstrations_are_drawn_in_the_proportions_of_the_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    inhabitants, chance = people(0), world.random.Random(0)
    for name in STYLES:
        monkeypatch.setattr(world, "STYLES", {name: 1})
        rewards = []
        for _ in range(300):
            question = world._question(inhabitants, chance)
            rewards.append(gold_reward(question.facts(), world._respond(question, chance)))
        correct = sum(each.correct for each in rewards) / len(rewards)
        reward = sum(each.reward for each in rewards) / len(rewards)
        if name == "good":
            assert reward > 0.99
            continue
        assert reward < 0.9
        assert (correct < 0.5) == (name in ("wrong", "evasive")), name


def test_the_demonstrations_leave_much_to_be_won() -> None:
    facts = facts_by_prompt(seed=0, rows=6000)
    rewards = [
        gold_reward(facts[row.prompt[0].content], row.messages[-1].content).reward
        for row in generate("demonstrations", 1000, 0)
        if isinstance(row, Conversation) and row.prompt[0].content in facts
    ]
    assert len(rewards) > 500
    assert 0.5 < sum(rewards) / len(rewards) < 0.85


def facts_by_prompt(seed: int, rows: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in generate("prompts", rows, seed):
        assert isinstance(row, Prompt)
        facts = dict(row.facts)
        assert found.setdefault(row.prompt[0].content, facts) == facts
    return found


def test_the_same_prompt_has_the_same_facts_everywhere() -> None:
    facts = facts_by_prompt(seed=2, rows=6000)
    checked = 0
    for row in generate("preferences", 1000, 2):
        assert isinstance(row, Preference)
        known = facts.get(row.prompt[0].content)
        if known is None:
            continue
        rewards = [gold_reward(known, response).reward for response in row.responses]
        assert abs(rewards[0] - rewards[1]) == pytest.approx(row.margin)
        checked += 1
    assert checked > 300


def test_the_better_response_is_preferred_but_for_a_little_noise() -> None:
    facts = facts_by_prompt(seed=0, rows=6000)
    won = [
        gold_reward(facts[row.prompt[0].content], row.responses[0]).reward
        > gold_reward(facts[row.prompt[0].content], row.responses[1]).reward
        for row in generate("preferences", 3000, 0)
        if isinstance(row, Preference) and row.prompt[0].content in facts
    ]
    assert len(won) > 1000
    assert 0.95 <= sum(won) / len(won) < 1


def test_preferred_responses_differ_clearly() -> None:
    for row in generate("preferences", 300, 0):
        assert isinstance(row, Preference)
        assert row.margin >= world.CLEAR_DIFFERENCE
        assert len(set(row.responses)) == 2


def test_every_task_occurs_in_about_its_share() -> None:
    rows = [row for row in generate("prompts", 2300, 0) if isinstance(row, Prompt)]
    counts = Counter(row.facts["task"] for row in rows)
    whole = sum(weight for _, weight in TASKS.values())
    assert counts.keys() == TASKS.keys()
    for task, (_, weight) in TASKS.items():
        assert counts[task] / len(rows) == pytest.approx(weight / whole, abs=0.03)


def words(row: Row) -> str:
    return row.text if isinstance(row, Text) else row.prompt[0].content


def test_no_prompt_that_is_held_out_anywhere_is_trained_on_anywhere() -> None:
    placed = [
        each
        for part, kinds in (
            ("demonstrations", ("conversation",)),
            ("preferences", ("preference",)),
            ("prompts", ("prompt",)),
        )
        for each in Intake(DataSource(source=f"world:{part}", rows=1500, held_out=0.2), kinds)
    ]
    held_out = {words(each.row) for each in placed if each.held_out}
    train = {words(each.row) for each in placed if not each.held_out}
    assert len(held_out) > 100
    assert not held_out & train


def test_the_corpus_states_what_is_true_in_this_world() -> None:
    text = " ".join(words(row) for row in generate("corpus", 800, 5))
    for person in people(5):
        assert f"{person.name} lives in {person.city}." in text
        for city in world.CITIES:
            assert (f"{person.name} lives in {city}." in text) == (city == person.city)
