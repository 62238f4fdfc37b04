"""Verifiable instructions: verdicts worked out by hand, those of lm-eval's checkers, and the generated prompts."""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench.instructions import judged, reference, sentences
from data import instruction_prompts, suite_rows
from data.schema import Message, Prompt
from pipeline import loader
from pipeline.config import EvaluateSettings
from pipeline.errors import DataError
from pipeline.figures import SUITE
from reward.instructions import CHECKS, followed
from reward.intervals import proportion_interval, ratio_interval
from reward.rules import Verdict, instructions, require_facts
from stages.core.answers import Responses
from stages.core.suites import _Ledger

PUBLISHED = Path(os.environ.get("BATON_DATA", "../shared/data")) / "ifeval" / "input_data.jsonl"
YES, NO = True, False


@pytest.fixture(scope="module")
def published() -> list[dict[str, Any]]:
    """The 541 prompts that the authors publish."""
    if not PUBLISHED.is_file():
        pytest.skip(f"no {PUBLISHED}: set BATON_DATA to the folder with ifeval/")
    return [json.loads(line) for line in PUBLISHED.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def checkers() -> Iterator[ModuleType]:
    """Those of lm-eval."""
    with reference() as module:
        yield module


def facts(kind: str, **arguments: Any) -> dict[str, Any]:
    return {"instruction_id_list": [kind], "kwargs": [arguments]}


@pytest.mark.parametrize(
    ("kind", "arguments", "follows", "does_not"),
    [
        ("keywords:existence", {"keywords": ["Rome", "sea"]}, "By the SEA lies rome.", "Rome lies inland."),
        ("keywords:existence", {"keywords": ["a.b"]}, "a.b", "acb"),
        ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, "Cats? A cat.", "A cat."),
        ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"}, "A cat.", "Cat, cat."),
        ("keywords:forbidden_words", {"forbidden_words": ["run", "bark"]}, "Runner, barking.", "They BARK!"),
        ("keywords:letter_frequency", {"letter": "e", "let_frequency": 2, "let_relation": "at least"}, "Eve", "end"),
        ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": "less than"}, "a", "#a"),
        ("language:response_language", {"language": "de"}, "Das Wetter ist heute sehr schön.", "The weather is fine."),
        ("language:response_language", {"language": "fi"}, "12 34", "The weather is fine today, is it not?"),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "Mr. X ran.", "A. So!"),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "It is. Oh.", "Dr. No"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\none\n***\ntwo", "one\n***\n***\ntwo"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 1}, "one", "one *** two"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a b-c", "a bc"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a bc", "a b-c"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
            'One.\n\n"Then, two.',
            "Then.\n\nTwo.",
        ),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
            "One.\n\nthen\n\n",
            "One.\n\nThen.\n\nThree.",
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a and b]"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np. s. more", "Bye. PS more"),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.P.S more", "P.S. more"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n - two", "* one\n**two**"),
        ("detectable_format:constrained_response", {}, "Well: My answer is no.", "No."),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b c*", "*a* and * *"),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "Part", "num_sections": 2},
            "Part 1 a Part 2",
            "Part 1",
        ),
        ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
        ("detectable_format:title", {}, "<<Rome>> by night", "<< >>"),
        ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
        ("combination:two_responses", {}, "a ****** b ******", "a ****** b ****** c"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi. "}, "say HI. Hi!", "Hi! Say hi."),
        ("startend:end_checker", {"end_phrase": "Bye."}, 'So, "bye."\n', "Bye. Or not"),
        ("startend:quotation", {}, ' "Hello." ', '"Hello.'),
        ("startend:quotation", {}, '""', '"'),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": 2, "capital_relation": "at least"},
            "A BIG dog",
            "a BIG dog",
        ),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": 2, "capital_relation": "less than"},
            "one BIG dog",
            "DON'T",  # two words: DO and N'T
        ),
        ("change_case:english_capital", {}, "THE WEATHER IS FINE TODAY.", "THE WEATHER IS FINE TODAy."),
        ("change_case:english_lowercase", {}, "the weather is fine today.", "The weather is fine today."),
        ("punctuation:no_comma", {}, "one; two", "one, two"),
    ],
)
def test_a_response_is_judged_as_by_hand(
    kind: str, arguments: dict[str, Any], follows: str, does_not: str, checkers: ModuleType
) -> None:
    asked = facts(kind, **arguments)
    assert followed(asked, follows) == [YES]
    assert followed(asked, does_not) == [NO]
    assert followed(asked, "") == followed(asked, " \n", loose=True) == [NO]


def test_loosely_a_first_or_last_line_and_asterisks_do_not_count() -> None:
    quotation, bare = facts("startend:quotation"), '"One."'
    for text in (
        f"Sure:\n{bare}",
        f"{bare}\nAnything else?",
        f"Sure:\n{bare}\nElse?",
        f"*{bare}*",
        f"Sure:\n**{bare}**",
    ):
        assert followed(quotation, text) == [NO]
        assert followed(quotation, text, loose=True) == [YES]
    assert followed(quotation, f"Sure:\nWell:\n{bare}", loose=True) == [NO]


def test_the_reward_is_the_share_of_instructions_and_correct_are_all_of_them() -> None:
    asked = {
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation", "keywords:existence"],
        "kwargs": [{}, {"language": None}, {"keywords": ["sea"], "num_words": None}],
    }
    assert instructions(asked, '"The sea."') == Verdict(1.0, 1.0)
    assert instructions(asked, "The sea.") == Verdict(2 / 3, 0.0)
    assert instructions(asked, "") == Verdict(0.0, 0.0)


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ({}, "the prompt has no `instruction_id_list`"),
        ({"instruction_id_list": ["punctuation:no_comma"]}, "the prompt has no `kwargs`"),
        ({"instruction_id_list": [], "kwargs": []}, "the prompt's `instruction_id_list` is empty"),
        ({"instruction_id_list": "punctuation:no_comma", "kwargs": [{}]}, "the prompt's `instruction_id_list` and"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "the prompt's `instruction_id_list` and"),
        ({"instruction_id_list": ["no_comma"], "kwargs": [{}]}, "the prompt's `instruction_id_list` has 'no_comma'"),
        ({"instruction_id_list": ["startend:quotation"], "kwargs": ["x"]}, "the prompt's `kwargs` has no mapping"),
        (facts("startend:quotation", letter="a"), "the prompt's `kwargs` for 'startend:quotation': letter: Unexpected"),
        (facts("keywords:existence"), "the prompt's `kwargs` for 'keywords:existence': keywords: Missing"),
        (facts("keywords:existence", keywords=[]), "the prompt's `kwargs` for 'keywords:existence': keywords: List"),
        (
            facts("length_constraints:number_words", num_words=3, relation="about"),
            "the prompt's `kwargs` for 'length_constraints:number_words': relation: Input should be 'less than' or",
        ),
        (
            facts("detectable_content:number_placeholders", num_placeholders="many"),
            "the prompt's `kwargs` for 'detectable_content:number_placeholders': num_placeholders: Input should be",
        ),
    ],
)
def test_malformed_instructions_are_refused_with_their_row(bad: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError) as caught:
        require_facts({"instructions"}, Prompt((Message("user", "Hi"),), bad, "file.jsonl:7"))
    assert (caught.value.where, caught.value.what.startswith(what)) == ("file.jsonl:7", True), caught.value.what
    assert "`instruction_id_list` and `kwargs`" in caught.value.hint


def responses_to(row: dict[str, Any], chance: random.Random) -> str:
    """Something that follows the instructions of a row now and then."""
    text = " ".join(chance.choices(PIECES, k=chance.randint(1, 60))) if chance.random() < 0.5 else row["prompt"]
    for arguments in row["kwargs"]:
        if arguments.get("language") in SENTENCES and chance.random() < 0.5:
            return SENTENCES[arguments["language"]]
        if arguments.get("first_word") and chance.random() < 0.5:
            text = "\n\n".join([f"{arguments['first_word']} {chance.choice(PIECES)}."] * arguments["num_paragraphs"])
    values = [value for arguments in row["kwargs"] for value in arguments.values() if value is not None]
    for value in chance.sample(values, chance.randint(0, len(values))):
        text += f" {' '.join(value) if isinstance(value, list) else value}" * chance.randint(1, 3)
    changes = (str.lower, str.upper, lambda text: f'"{text}"', json.dumps, lambda text: text.replace(". ", ".\n\n"))
    for change in chance.sample(changes, chance.randint(0, 2)):
        text = change(text)
    return text


SENTENCES = {
    "de": "Das Wetter ist heute sehr schön.",
    "hi": "आज मौसम बहुत अच्छा है।",
    "ko": "오늘은 날씨가 아주 좋습니다.",
}
PIECES = (
    "the", "a", "Dog", "RUNS", "fast,", "and", "slow.", "My answer is yes.", "[name]", "*bold*", "**very bold**",
    "\n* item", "\n - thing", "<<Title>>", "P.S.", "P. P. S", "******", "***", "\n\n", '{"a": 1}', "```", '"',
    "Dr. Smith", "U.S.A.", "isn't", "DON'T", "SECTION 1", "Section 2", "und der die das", "3.5%", "Ja!", "?!",
    "e.g.", "É", "ß",
)  # fmt: skip


def test_verdicts_are_those_of_lm_eval_but_for_letters_that_are_none(
    published: list[dict[str, Any]], checkers: ModuleType
) -> None:
    chance = random.Random(3)
    rows = [
        verdicts for row in published for verdicts in judged(checkers, row, responses_to(row, chance), str(row["key"]))
    ]
    differing = [
        (row["kwargs"][place]["letter"], kind)
        for row, pair in zip(published, zip(rows[::2], rows[1::2], strict=True), strict=True)
        for verdicts in pair
        for place, kind in enumerate(verdicts.kinds)
        if verdicts.ours[place] is not verdicts.theirs[place]
    ]
    # Where the "letter" is `#` or `!`, the published checker counts a letter drawn at random instead.
    assert {letter for letter, _ in differing} <= {"#", "!"}
    assert len(differing) <= 8
    seen = Counter((kind, verdict) for row in rows for kind, verdict in zip(row.kinds, row.theirs, strict=True))
    assert seen.keys() == {(kind, verdict) for kind in CHECKS for verdict in (True, False)}
    strict, loose, *_ = sentences(rows)
    assert strict.startswith("strict: 5")
    assert "of 541 responses have the same verdicts" in loose


def test_generated_prompts_have_every_kind_and_arguments_that_its_check_takes() -> None:
    prompts = list(instruction_prompts.generate(3000, 0))
    for prompt in prompts:
        require_facts({"instructions"}, prompt)
    kinds = Counter(kind for prompt in prompts for kind in prompt.facts["instruction_id_list"])
    assert kinds.keys() == CHECKS.keys()
    assert min(kinds.values()) > 100
    numbers = Counter(len(prompt.facts["kwargs"]) for prompt in prompts)
    assert [round(numbers[number] / 3000, 1) for number in (1, 2, 3)] == [0.6, 0.3, 0.1]
    assert [prompt.origin for prompt in prompts[:2]] == ["world:instructions:1", "world:instructions:2"]


def test_generated_instructions_do_not_rule_each_other_out() -> None:
    forbidding = {"keywords:forbidden_words", "punctuation:no_comma"}
    for prompt in instruction_prompts.generate(8000, 0):
        of_kind = dict(zip(prompt.facts["instruction_id_list"], prompt.facts["kwargs"], strict=True))
        if "detectable_format:constrained_response" in of_kind:
            assert len(of_kind) == 1
        less = {kind for kind, arguments in of_kind.items() if "less than" in arguments.values()}
        needed = []  # what a response holds in any case
        for arguments in of_kind.values():
            needed += arguments.get("keywords", [])
            needed += [
                arguments[name] for name in ("end_phrase", "prompt_to_repeat", "first_word") if name in arguments
            ]
        for kind in of_kind.keys() & (forbidding | less - {"keywords:frequency"}):
            for text in needed:
                assert CHECKS[kind](text, **of_kind[kind]), prompt.prompt[0].content
        if "change_case:english_lowercase" in of_kind:
            assert all(text == text.lower() for text in needed), prompt.prompt[0].content


def test_generated_prompts_are_those_of_their_seed() -> None:
    first, again, other = (list(instruction_prompts.generate(200, seed)) for seed in (1, 1, 2))
    assert first == again
    assert not {prompt.prompt for prompt in first} & {prompt.prompt for prompt in other[:20]}


def test_a_repeated_request_is_all_that_stands_before_the_instruction_to_repeat_it() -> None:
    for prompt in instruction_prompts.generate(3000, 5):
        of_kind = dict(zip(prompt.facts["instruction_id_list"], prompt.facts["kwargs"], strict=True))
        if "combination:repeat_prompt" in of_kind:
            request = of_kind["combination:repeat_prompt"]["prompt_to_repeat"]
            assert prompt.prompt[0].content.startswith(f"{request}\n\n")


def test_no_generated_prompt_shares_eight_words_in_a_row_with_a_published_one(published: list[dict[str, Any]]) -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}

    asked = set().union(*(runs(row["prompt"]) for row in published))
    assert len(asked) > 10_000
    for prompt in instruction_prompts.generate(8000, 0):
        assert not runs(prompt.prompt[0].content) & asked, prompt.prompt[0].content


def test_the_suite_reports_prompts_and_instructions_strictly_and_loosely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"key": 1, "prompt": "One?", **two("punctuation:no_comma", "startend:quotation")},
        {"key": 2, "prompt": "Two?", **facts("punctuation:no_comma")},
        {"key": 3, "prompt": "Three?", **facts("detectable_format:title")},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"kind": "suite", "measures": "Following.", "source": "rows.jsonl", "columns": {"id": "key"}}
    (tmp_path / "mine.yaml").write_text(json.dumps({**settings, "method": "instructions"}))
    suite = loader.suite(str(tmp_path / "mine.yaml"))[1]
    items = suite_rows.read(suite).chosen
    assert [item.id for item in items] == ["1", "2", "3"]
    from stages.core import suite_scores

    texts = ['Sure:\n"One"', "Two, or", "<<Three>>"]
    monkeypatch.setattr(suite_scores, "respond", lambda *_, **__: Responses([], [], texts, cut=0))
    settings_of_stage = EvaluateSettings(models=["sft"], prompts="prompts")
    measure = suite_scores.scorer(suite, items, settings_of_stage, 0)
    scores = measure(None)  # type: ignore[arg-type]
    ledger = _Ledger("mine", suite, items, suite_scores.observations(suite, items), measure)
    ledger.enter("sft", None, scores)
    figures = ledger.enter("dpo", "sft", scores)
    assert figures[f"{SUITE}mine"] == proportion_interval(1, 3)
    assert figures[f"{SUITE}mine.loose"] == proportion_interval(2, 3)
    assert figures[f"{SUITE}mine.by-instruction"] == ratio_interval([1.0, 0.0, 1.0], [2.0, 1.0, 1.0])
    assert figures[f"{SUITE}mine.by-instruction-loose"].value == 3 / 4
    assert figures[f"{SUITE}mine.punctuation"].value == 1 / 2
    assert figures[f"{SUITE}mine.startend"].value == 0.0
    assert figures[f"{SUITE}mine.punctuation"].n == 2
    assert figures[f"{SUITE}mine_gain"].value == figures[f"{SUITE}mine.by-instruction_gain"].value == 0.0
    assert ledger.pairs["dpo"].keys() == {f"{SUITE}mine", f"{SUITE}mine.loose"}
    first, second, _ = ledger.lines()
    assert first["parts"]["startend"] == {"sft": 0.0, "dpo": 0.0}
    assert "startend" not in second["parts"]


def two(*kinds: str) -> dict[str, Any]:
    return {"instruction_id_list": list(kinds), "kwargs": [{} for _ in kinds]}
