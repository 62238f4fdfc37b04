"""Rules: rewards of responses judged by hand, against slow obvious oracles, and the errors of unfit prompts."""

from __future__ import annotations

import random
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from data.schema import Message, Prompt
from pipeline.errors import DataError
from pipeline.rules import RULES, Rule
from reward import rules
from reward.mixture import RuleMixture

ASKED = (Message("user", "How much is 40 plus 2?"),)
WORKED = "40 + 2 = <<40+2=42>>42\n#### 42"


def mixture(*settings: dict[str, Any]) -> RuleMixture:
    return RuleMixture([TypeAdapter(Rule).validate_python(each) for each in settings])


def score(response: str, *settings: dict[str, Any], **facts: Any) -> float:
    """What a mixture gives one response."""
    (found,) = mixture(*settings).scores([Prompt(ASKED, facts, "file.jsonl:7")], [response])
    return found


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (WORKED, "42"),
        ("It is 70,000.", "70000"),
        ("about $1,234.50.", "1234.5"),
        ("-5", "-5"),
        ("$-5", "-5"),
        ("-$5", "-5"),
        ("so \u22127", "-7"),
        ("from 3-5", "5"),
        ("16 - 3 = 13", "13"),
        ("f(5)-3", "3"),
        ("- 5 apples", "5"),
        ("1,2,3", "3"),
        ("-1,2", "2"),
        ("12,34,567", "1234567"),
        ("2,3456", "3456"),
        ("pi is 3.140", "3.14"),
        ("-.5", "-0.5"),
        ("version 1.2.3", "3"),
        ("1e-07", "0.0000001"),
        ("\\boxed{42}%", "42"),
        ("\u20ac5", "5"),
        ("007", "7"),
    ],
)
def test_the_last_number_is_the_one_that_a_reader_sees(text: str, number: str) -> None:
    assert rules.last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "\u00b2", ".", "-", "$,"])
def test_a_text_without_a_number_has_no_last_number(text: str) -> None:
    assert rules.last_number(text) is None


def test_numbers_are_read_as_they_were_written_however_they_were_written() -> None:
    chance = random.Random(0)
    for _ in range(500):
        number = chance.choice((1, -1)) * chance.randrange(10 ** chance.randrange(1, 13)) / 100
        written = chance.choice((f"{number:.2f}", f"{number:,.2f}", f"#### {number:,.2f} ", f"It is {number:,.2f}."))
        assert rules.last_number(f"First 9 and 8,000; {written}") == Decimal(f"{number:.2f}")


def test_reading_numbers_takes_time_in_proportion_to_the_text() -> None:
    began = time.process_time()
    for piece in ("1,", "11,", "-", ".", "1.", "1e", "-$", "9"):
        rules.last_number(piece * 100_000)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("It is 42.", WORKED, 1.0),
        ("42.0", "42", 1.0),
        ("42", 42, 1.0),
        ("0.5", 0.5, 1.0),
        ("43", WORKED, 0.0),
        ("-42", WORKED, 0.0),
        ("forty-two", WORKED, 0.0),
        ("42, or rather 41", "42", 0.0),
        ("", "42", 0.0),
    ],
)
def test_numeric_compares_last_numbers(response: str, answer: object, right: float) -> None:
    assert rules.numeric({"answer": answer}, response) == rules.Verdict(right, right)


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("Rome", "Rome", 1.0),
        ("  rome\n", "Rome", 1.0),
        ('"Rome."', "Rome", 1.0),
        ("\u201cRome\u201d!", "rome", 1.0),
        ("New\n York", "new york", 1.0),
        ("\uff32ome", "Rome", 1.0),
        ("stra\u00dfe", "STRASSE", 1.0),
        ("42", 42, 1.0),
        ("True", True, 1.0),
        ("...", "...", 1.0),
        ("In Rome", "Rome", 0.0),
        ("-5", "5", 0.0),
        ("314", "3.14", 0.0),
        ("", "...", 0.0),
        ("", "Rome", 0.0),
    ],
)
def test_exact_compares_what_was_said_and_not_how(response: str, answer: object, right: float) -> None:
    assert rules.exact({"answer": answer}, response) == rules.Verdict(right, right)


@pytest.mark.parametrize(
    ("rule", "facts", "what"),
    [
        ("exact", {}, "the prompt has no `answer`, which the rule `exact` needs"),
        ("numeric", {"task": "sums"}, "the prompt has no `answer`"),
        ("numeric", {"answer": "Rome"}, "the prompt's `answer` holds no number"),
        ("exact", {"answer": " "}, "the prompt's `answer` is no text or number"),
        ("exact", {"answer": ["Rome"]}, "the prompt's `answer` is no text or number"),
        ("exact", {"answer": None}, "the prompt's `answer` is no text or number"),
        ("world", {"answer": "Rome"}, "the prompt has no `declined`"),
        ("world", {"answer": 6, "wrong": ["5"], "declined": False}, "the prompt's `answer` is no text, or `wrong` no"),
        ("world", {"answer": "6", "wrong": [5], "declined": False}, "the prompt's `answer` is no text, or `wrong` no"),
        ("world", {"answer": "6", "wrong": 5, "declined": False}, "the prompt's `answer` is no text, or `wrong` no"),
    ],
)
def test_a_prompt_without_what_a_rule_needs_is_named(rule: str, facts: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError) as caught:
        score("Rome", {"rule": rule}, **facts)
    assert caught.value.where == "file.jsonl:7"
    assert caught.value.what.startswith(what)
    assert "docs/rewards.md" in caught.value.hint
    prompt, length = Prompt(ASKED, facts, "file.jsonl:7"), {"rule": "length", "words": 3}
    with pytest.raises(DataError) as at_once:
        mixture(length, {"rule": rule}).require_facts([prompt])
    assert str(at_once.value) == str(caught.value)
    mixture(length).require_facts([prompt])


def test_a_pattern_is_found_anywhere_or_where_it_says() -> None:
    assert score("so #### 42", {"rule": "pattern", "expression": r"#### \d+"}) == 1.0
    assert score("so #### 42", {"rule": "pattern", "expression": r"\A#### \d+"}) == 0.0
    assert score("YES", {"rule": "pattern", "expression": "(?i)yes"}) == 1.0


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ('{"a": [1, null]}', 1.0),
        (" 5 ", 1.0),
        ("1" * 5000, 1.0),
        ("", 0.0),
        ("NaN", 0.0),
        ("{'a': 1}", 0.0),
        ('{"a": 1} and more', 0.0),
        ('```json\n{"a": 1}\n```', 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_is_the_whole_response_or_nothing(response: str, found: float) -> None:
    assert score(response, {"rule": "format", "layout": "json"}) == found


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>\na < b\n</think>\n\n<answer></answer> ", 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("I <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer>.", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><think>c</think><answer>b</answer>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think><answer>a</think>b</answer>", 0.0),
        ("</think>a<think><answer>b</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("<THINK>a</THINK><answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_tags_are_exactly_the_parts_in_their_order(response: str, found: float) -> None:
    assert score(response, {"rule": "format", "layout": "tags", "tags": ["think", "answer"]}) == found


def test_length_is_full_up_to_the_limit_and_nothing_from_twice_as_many_words() -> None:
    rewards = [score("word, " * count, {"rule": "length", "words": 4}) for count in range(11)]
    assert rewards == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]


def test_repetition_is_the_share_of_runs_that_are_new() -> None:
    chance = random.Random(1)
    for _ in range(100):
        text, n = [chance.choice("abc") for _ in range(chance.randrange(12))], chance.randrange(1, 4)
        runs = [text[start : start + n] for start in range(len(text)) if start + n <= len(text)]
        repeated = sum(run in runs[:place] for place, run in enumerate(runs))
        expected = 1 - repeated / len(runs) if runs else 1.0
        assert score(" ".join(text), {"rule": "repetition", "n": n}) == pytest.approx(expected)
    assert score("Yes. yes, YES", {"rule": "repetition", "n": 1}) == pytest.approx(1 / 3)


def test_every_rule_stays_between_0_and_1_whatever_the_response() -> None:
    chance = random.Random(2)
    given = {"pattern": {"expression": "a"}, "format": {"layout": "json"}, "length": {"words": 3}}
    kinds = ["language:response_language", "change_case:capital_word_frequency", "detectable_format:json_format"]
    arguments = [{"language": "de"}, {"capital_frequency": 2, "capital_relation": "less than"}, {}]
    instructions = {"instruction_id_list": kinds, "kwargs": arguments}
    for name in RULES.keys() - {"server", "world"}:
        for _ in range(50):
            response = "".join(chance.choices('a1, .-<>{}[]"\n\u00e9\u0301\ud800', k=chance.randrange(30)))
            assert 0.0 <= score(response, {"rule": name, **given.get(name, {})}, answer="1", **instructions) <= 1.0


PIECES = [
    *(
        "__import__('os').system('touch CANARY')",
        "9**9**9",
        "10**10**10",
        "1e999",
        "-1e-999",
        "NaN",
        "Infinity",
        "0x1F",
    ),
    *(
        "\\frac{1}{0}",
        "\\boxed{open('CANARY','w')}",
        "lambda: 0",
        "{{7*7}}",
        "${7*7}",
        "`touch CANARY`",
        "(1).__class__",
    ),
    *(
        "1,",
        "1.",
        "-",
        "\u2212",
        "$",
        "1e",
        "e5",
        ".",
        "#### ",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<",
        ">",
    ),
    *("[", "{", '"', "\\", "\\u", "[[", '{"a":', "\0", "\ud800", "\u202e", "\u0301\u0316", "\u0661", "\u00bd"),
    *(" ", "\n", "\x85", "a", "A\u0130", "\uff9e\u0301", "\u2167"),
]


def hostile_texts(count: int) -> list[str]:
    """Texts of hostile pieces, some of them long repetitions."""
    chance = random.Random(0)
    return [
        "".join(chance.choice(PIECES) * chance.choice((1, 1, 1, 2, 30, 5_000)) for _ in range(chance.randint(1, 6)))
        for _ in range(count)
    ]


@pytest.mark.slow
def test_no_rule_runs_or_hangs_on_what_a_response_or_an_answer_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.process_time()
    for text in hostile_texts(200):
        judged = [rules.is_json(text), rules.tagged(text, ["think", "answer"]), rules.length(text, 5)]
        judged += [rules.repetition(text, 3), rules.pattern(text, r"\d+ apples")]
        if text.strip():
            judged.append(rules.JUDGES["exact"]({"answer": text}, text).reward)
        if rules.last_number(text) is not None:
            judged.append(rules.JUDGES["numeric"]({"answer": text}, text).reward)
        assert all(0.0 <= each <= 1.0 for each in judged)
    assert time.process_time() - began < 60
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_is_the_weighted_sum_of_its_rules() -> None:
    numeric, length = {"rule": "numeric", "weight": 2.0}, {"rule": "length", "words": 1, "weight": -0.5}
    prompts = [Prompt(ASKED, {"answer": answer}) for answer in ("42", "41")]
    assert mixture(numeric, length).scores(prompts, ["42", "it is 42"]) == [1.5, 0.0]
    assert mixture(numeric).scores([], []) == []
