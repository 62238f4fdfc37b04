"""Formats: what is recognised and read, and what is refused because it leaves a choice."""

from __future__ import annotations

import random
from typing import Any, get_args

import pytest
import yaml

from data.findings import MISSING_COLUMN, MIXED_LAYOUT, TOO_MANY_RESPONSES, WRONG_TYPE, BadRow
from data.formats import FORMATS, Format, NoFormat, detect, final_answer
from data.formats.values import NUMBER
from data.schema import ChatRole, Conversation, Message, Preference, Prompt, Rated, Row, RowKind, Text
from pipeline.errors import DataError

USER = {"role": "user", "content": "Where is Ann?"}
GOOD = {"role": "assistant", "content": "In Rome."}
BAD = {"role": "assistant", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN = {"from": "human", "value": "Where is Ann?"}
GPT = {"from": "gpt", "value": "In Rome."}
GPT_BAD = {"from": "gpt", "value": "Why?"}
ASKED = Message("user", "Where is Ann?")
BRIEFLY = Message("system", "Be brief.")
ANSWERED = (ASKED, Message("assistant", "In Rome."))
HH = "\n\nHuman: Where is Ann?\n\nAssistant:"
FEEDBACK = {"prompt": "Where is Ann?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}


def pair(margin: float = 0.0, *before: Message) -> Preference:
    return Preference((*before, ASKED), ("In Rome.", "Why?"), margin, "f:1")


def spoken(*before: Message) -> Conversation:
    return Conversation((*before, *ANSWERED), "f:1")


HISTORY = (Message("user", "Hi."), Message("assistant", "Hello."))
ACCEPTED: list[tuple[str, dict[str, Any], Row]] = [
    ("text", {"text": "Ann is in Rome."}, Text("Ann is in Rome.", "f:1")),
    ("messages", {"messages": [USER, GOOD]}, spoken()),
    ("messages", {"messages": [SYSTEM, USER, GOOD], "id": 3}, spoken(BRIEFLY)),
    ("messages", {"messages": [USER, GOOD], "system": "Be brief."}, spoken(BRIEFLY)),
    ("sharegpt", {"conversations": [HUMAN, GPT]}, spoken()),
    ("sharegpt", {"conversations": [HUMAN, GPT], "system": "Be brief."}, spoken(BRIEFLY)),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT], "system": ""},
        spoken(BRIEFLY),
    ),
    ("alpaca", {"instruction": "Where is Ann?", "output": "In Rome."}, spoken()),
    ("alpaca", {"instruction": "Where is Ann?", "input": "", "output": "In Rome.", "system": None}, spoken()),
    (
        "alpaca",
        {"instruction": "Where is", "input": "Ann?", "output": "In Rome."},
        Conversation((Message("user", "Where is\nAnn?"), ANSWERED[1]), "f:1"),
    ),
    (
        "alpaca",
        {"instruction": "Where is Ann?", "output": "In Rome.", "system": "Be brief.", "history": [["Hi.", "Hello."]]},
        spoken(BRIEFLY, *HISTORY),
    ),
    ("prompt_completion", {"prompt": "Where is Ann?", "completion": "In Rome."}, spoken()),
    ("prompt_completion", {"prompt": [USER], "completion": [GOOD]}, spoken()),
    ("question_answer", {"question": "Where is Ann?", "answer": "In Rome."}, spoken()),
    ("question_answer", {"question": "Where is Ann?", "answer": "In Rome.", "system": "Be brief."}, spoken(BRIEFLY)),
    ("prompt", {"prompt": "Where is Ann?"}, Prompt((ASKED,), {}, "f:1")),
    (
        "prompt",
        {"prompt": [USER], "answer": "Rome", "level": 2, "hard": True, "notes": None, "tags": ["a"], "more": {"a": 1}},
        Prompt((ASKED,), {"answer": "Rome", "level": 2, "hard": True, "tags": ["a"], "more": {"a": 1}}, "f:1"),
    ),
    ("prompt", {"prompt": "Where is Ann?", "system": "Be brief."}, Prompt((BRIEFLY, ASKED), {}, "f:1")),
    ("prompt", {"prompt": HH}, Prompt((ASKED,), {}, "f:1")),
    ("prompt", {"prompt": HH.removesuffix("\n\nAssistant:")}, Prompt((ASKED,), {}, "f:1")),
    (
        "prompt",
        {"prompt": f"\n\nHuman: Hi.\n\nAssistant: Hello.{HH}", "system": "Be brief."},
        Prompt((BRIEFLY, *HISTORY, ASKED), {}, "f:1"),
    ),
    ("prompt_completion", {"prompt": HH, "completion": "In Rome."}, spoken()),
    (
        "rated",
        {"prompt": "Where is Ann?", "completion": "In Rome.", "label": True},
        Rated((ASKED,), "In Rome.", True, "f:1"),
    ),
    ("rated", {"prompt": [USER], "completion": [BAD], "label": "False"}, Rated((ASKED,), "Why?", False, "f:1")),
    ("explicit", {"prompt": "Where is Ann?", "chosen": "In Rome.", "rejected": "Why?"}, pair()),
    ("explicit", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, pair()),
    ("explicit", FEEDBACK, pair()),
    ("explicit", {"prompt": HH, "chosen": "In Rome.", "rejected": "Why?"}, pair()),
    ("explicit", {"prompt": HH, "chosen": HH + " In Rome.", "rejected": HH + " Why?"}, pair()),
    ("explicit", {**FEEDBACK, "system": "Be brief."}, pair(0.0, BRIEFLY)),
    ("explicit", {"prompt": "Where is Ann?", "chosen": "In Rome.", "rejected": "Why?", "margin": 2}, pair(2.0)),
    ("explicit", {"prompt": "Where is Ann?", "chosen": "In Rome.", "rejected": "Why?", "margin": " 2.50"}, pair(2.5)),
    ("explicit", {"prompt": "Where is Ann?", "chosen": "In Rome.", "rejected": "Why?", "margin": ""}, pair()),
    ("implicit", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, pair()),
    ("implicit", {"chosen": [USER, GOOD], "rejected": [USER, BAD], "system": "Be brief."}, pair(0.0, BRIEFLY)),
    ("hh", {"chosen": HH + " In Rome.", "rejected": HH + "  Why? "}, pair()),
    ("hh", {"chosen": HH + " In Rome.", "rejected": HH + " Why?", "system": "ignored", "margin": 3}, pair(3.0)),
    (
        "ultrafeedback",
        {**FEEDBACK, "score_chosen": 8.5, "score_rejected": 4, "messages": [USER, GOOD], "prompt_id": "x"},
        pair(4.5),
    ),
    (
        "ultrafeedback",
        {
            "prompt": "Where is Ann?",
            "chosen": "In Rome.",
            "rejected": "Why?",
            "score_chosen": "8",
            "score_rejected": "-1e0",
        },
        pair(9.0),
    ),
    ("sharegpt_preference", {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT_BAD, "margin": 1}, pair(1.0)),
    (
        "sharegpt_preference",
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT_BAD, "system": "Be brief."},
        pair(0.0, BRIEFLY),
    ),
    (
        "alpaca_preference",
        {"instruction": "Where is Ann?", "input": "", "chosen": "In Rome.", "rejected": "Why?"},
        pair(),
    ),
    (
        "alpaca_preference",
        {"instruction": "Where is Ann?", "chosen": "In Rome.", "rejected": "Why?", "history": [["Hi.", "Hello."]]},
        pair(0.0, *HISTORY),
    ),
    (
        "ranked",
        {"prompt": "Where is Ann?", "responses": ["In Rome.", " Rome", "Why?"]},
        Preference((ASKED,), ("In Rome.", " Rome", "Why?"), 0.0, "f:1"),
    ),
    ("ranked", {"prompt": [USER], "responses": [[GOOD], [BAD]]}, pair()),
    ("scored", {"prompt": "Where is Ann?", "responses": ["Why?", "In Rome."], "scores": [1, 4.5]}, pair(3.5)),
    ("scored", {"prompt": [USER], "responses": [[USER, BAD], [USER, GOOD]], "scores": ["0.25", "1"]}, pair(0.75)),
    (
        "scored",
        {"prompt": "Where is Ann?", "responses": [{"text": "Why?", "score": -1}, {"content": "In Rome.", "score": 1}]},
        pair(2.0),
    ),
    (
        "scored",
        {
            "prompt": "Where is Ann?",
            "responses": [
                {"response": "In Rome.", "score": 2},
                {"response": "Why?", "score": 1},
                {"response": "Rome", "score": 2},
            ],
        },
        pair(1.0),
    ),
    ("choices", {"prompt": "Where is Ann?", "choices": ["Why?", "In Rome."], "answer": 1}, pair()),
    ("choices", {"prompt": [USER], "choices": ["Why?", "In Rome."], "answer": "In Rome."}, pair()),
    (
        "choices",
        {"prompt": "Where is Ann?", "choices": ["Why?", "In Rome."], "answer": 1, "system": "Be brief."},
        pair(0.0, BRIEFLY),
    ),
]


def named(name: str) -> Format:
    return next(each for each in FORMATS if each.name == name)


def parse(record: dict[str, Any], wanted: str = "auto") -> Row:
    return detect(record, wanted, "f:1").parse(record, "f:1")


@pytest.mark.parametrize(("name", "record", "row"), ACCEPTED)
def test_each_layout_is_recognised_and_read(name: str, record: dict[str, Any], row: Row) -> None:
    assert detect(record, "auto", "f:1").name == name
    assert parse(record) == row


@pytest.mark.parametrize(("name", "record", "row"), ACCEPTED)
def test_naming_the_kind_or_the_format_gives_the_same_row(name: str, record: dict[str, Any], row: Row) -> None:
    kind = named(name).kind
    assert kind is not None
    assert parse(record, kind) == parse(record, name) == row


@pytest.mark.parametrize(("name", "record", "row"), ACCEPTED)
def test_every_column_that_is_read_is_declared(name: str, record: dict[str, Any], row: Row) -> None:
    layout = named(name)
    declared = layout.columns | layout.optional
    kept = {column: value for column, value in record.items() if column in declared or layout.facts}
    assert layout.parse(kept, "f:1") == row
    assert layout.numbers <= declared


def test_every_format_and_every_kind_is_tried() -> None:
    assert {name for name, _, _ in ACCEPTED} == {each.name for each in FORMATS}
    assert {each.kind for each in FORMATS} == set(get_args(RowKind))


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({"text": "a", "messages": [USER, GOOD]}, ["text", "messages"]),
        ({"text": "a", "prompt": "b"}, ["text", "prompt"]),
        ({"text": "a", "instruction": "b", "input": "", "output": "c"}, ["text", "alpaca"]),
        ({"messages": [USER, GOOD], "conversations": [HUMAN, GPT]}, ["messages", "sharegpt"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": [USER, GOOD]}, ["messages", "explicit"]),
        ({"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}, ["prompt_completion", "explicit"]),
        ({"prompt": "a", "completion": "b", "label": True, "responses": ["b", "c"]}, ["rated", "ranked"]),
        ({"conversations": [HUMAN, GPT], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ["sharegpt", "implicit"]),
    ],
)
def test_ambiguous_columns_are_refused_with_the_candidates(record: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(DataError, match="several formats") as caught:
        detect(record, "auto", "f:1")
    assert [name for name in (each.name for each in FORMATS) if f"`{name}`" in caught.value.what] == names
    suggested = caught.value.hint.rpartition("format: ")[2].rstrip("`")
    assert detect(record, suggested, "f:1").name in names
    assert [detect(record, name, "f:1").name for name in names] == names


@pytest.mark.parametrize(
    ("record", "wanted", "words"),
    [
        ({"input": "a", "output": "b"}, "auto", "no format has the columns 'input', 'output'"),
        ({"text": "a"}, "preference", "no format of `preference` has the columns 'text'"),
        ({"text": "a"}, "sharegtp", "no format 'sharegtp'"),
        ({"chosen": "plain", "rejected": "text"}, "auto", "chosen: 'plain'"),
        ({"chosen": None, "rejected": HH + " x"}, "auto", "chosen: null"),
        ({"prompt": "a", "completion": "b", "label": True}, "conversation", "completion: 'b'"),
        ({"prompt": "a", "completion": "b", "label": None}, "conversation", "completion: 'b'"),
        ({"prompt": "a", "chosen": "b"}, "auto", "no column `rejected` beside `chosen`"),
        ({1: "a", None: "b"}, "auto", "no format has the columns 1, None"),
        ({}, "auto", "no format"),
    ],
)
def test_an_unknown_layout_is_refused_with_what_it_holds(record: dict[Any, Any], wanted: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        detect(record, wanted, "f:1")
    assert words in caught.value.what
    assert caught.value.where == "f:1"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("label", "good"),
    [
        *((label, True) for label in (True, 1, 1.0, "1", "1.0", " TRUE ", "true")),
        *((label, False) for label in (False, 0, 0.0, -0.0, "0", "0.0", "False\n")),
    ],
)
def test_a_verdict_may_be_a_number_or_text(label: object, good: bool) -> None:
    record = {"prompt": "Where is Ann?", "completion": "In Rome.", "label": label}
    assert parse(record) == Rated((ASKED,), "In Rome.", good, "f:1")


@pytest.mark.parametrize("label", [None, "good", "bad", "", 2, -1, 0.5, float("nan"), 10**30, [True], {}])
def test_a_response_with_a_label_is_only_imitated_when_that_is_asked_for(label: object) -> None:
    record = {"prompt": "Where is Ann?", "completion": "In Rome.", "label": label}
    layout = detect(record, "auto", "f:1")
    assert layout.name == "rated"
    with pytest.raises(BadRow, match="expected true or false, 1 or 0") as caught:
        layout.parse(record, "f:1")
    assert caught.value.kind is WRONG_TYPE
    assert "`format: prompt_completion`" in caught.value.hint
    assert parse(record, "prompt_completion") == spoken()


@pytest.mark.parametrize("column", ["response", "output", "completions"])
def test_a_prompt_beside_what_looks_like_a_response_is_no_prompt_unless_it_is_called_one(column: str) -> None:
    record: dict[str, Any] = {"prompt": "Where is Ann?", column: "In Rome."}
    with pytest.raises(NoFormat, match=f"`{column}` looks like a response") as caught:
        detect(record, "auto", "f:1")
    assert "`format: prompt`" in caught.value.hint
    assert parse(record, "prompt") == Prompt((ASKED,), {column: "In Rome."}, "f:1")


@pytest.mark.parametrize(
    ("names", "setting"),
    [
        (["Prompt", "Chosen", "Rejected"], "{chosen: Chosen, prompt: Prompt, rejected: Rejected}"),
        (["system", "question", "chosen", "rejected"], "{prompt: question}"),
        (["prompt", "response"], "{completion: response}"),
        (["prompt", "output"], "{completion: output}"),
        (["prompt", "completions"], "{responses: completions}"),
        (["prompt", "Chosen", "rejected"], "{chosen: Chosen}"),
        (["prompt", "response", "label"], "{completion: response}"),
        (["Instruction", "Output"], "{instruction: Instruction, output: Output}"),
        ([" text"], "{text: ' text'}"),
    ],
)
def test_the_setting_that_a_refusal_proposes_makes_the_columns_fit(names: list[str], setting: str) -> None:
    record: dict[str, Any] = dict.fromkeys(names, "words")
    with pytest.raises(NoFormat) as caught:
        detect(record, "auto", "f:1")
    assert f"`columns: {setting}`" in caught.value.hint
    assert ("case-sensitive" in caught.value.hint) == any(name.lower() != name for name in names)
    for new, old in yaml.safe_load(setting).items():
        record[new] = record.pop(old)
    record = {name: [1, 2] if name == "responses" else value for name, value in record.items()}
    assert detect(record, "auto", "f:1").columns >= set(yaml.safe_load(setting))


@pytest.mark.parametrize("name", [each.name for each in FORMATS])
def test_a_missing_column_is_named_in_every_format(name: str) -> None:
    layout = named(name)
    record = next(record for other, record, _ in ACCEPTED if other == name)
    for column in layout.columns:
        with pytest.raises(BadRow, match=f"no column `{column}`") as caught:
            detect(record, name, "f:1").parse({k: v for k, v in record.items() if k != column}, "f:7")
        assert (caught.value.kind, caught.value.where) == (MISSING_COLUMN, "f:7")


@pytest.mark.parametrize(
    ("first", "later", "words"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            "chosen: [{",
        ),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            {"prompt": [USER], "chosen": "b", "rejected": "c"},
            "chosen: 'b'",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"chosen": HH + " a", "rejected": HH + " b"}, "chosen: '"),
        ({"chosen": HH + " a", "rejected": HH + " b"}, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "chosen: [{"),
        ({"prompt": "a"}, {"prompt": [USER]}, "prompt: [{"),
        ({"messages": [USER, GOOD]}, {"messages": "hello"}, "messages: 'hello'"),
    ],
)
def test_a_row_in_the_other_layout_is_told_from_those_before(
    first: dict[str, Any], later: dict[str, Any], words: str
) -> None:
    layout = detect(first, "auto", "f:1")
    layout.parse(first, "f:1")
    with pytest.raises(BadRow) as caught:
        layout.parse(later, "f:7")
    assert (caught.value.kind, caught.value.where) == (MIXED_LAYOUT, "f:7")
    assert words in caught.value.what
    assert "in other rows" in caught.value.what


def random_dialogue(draw: random.Random) -> list[Message]:
    roles: list[ChatRole] = ["user", "assistant"] * draw.randint(1, 4)
    turns = [Message(role, f"{role} {draw.randint(0, 999)}") for role in roles]
    return [Message("system", "s"), *turns] if draw.random() < 0.5 else turns


def test_every_spelling_of_a_dialogue_gives_the_same_row() -> None:
    draw = random.Random(0)
    for _ in range(200):
        turns = random_dialogue(draw)
        plain = [{"role": turn.role, "content": turn.content} for turn in turns]
        sharegpt = [
            {"from": {"user": "human", "assistant": "gpt"}.get(turn.role, turn.role), "value": turn.content}
            for turn in turns
        ]
        system = turns[0].content if turns[0].role == "system" else None
        talk = turns[1:] if system else turns
        pairs = [[talk[i].content, talk[i + 1].content] for i in range(0, len(talk), 2)]
        alpaca = {"instruction": pairs[-1][0], "output": pairs[-1][1], "history": pairs[:-1], "system": system}
        expected = Conversation(tuple(turns), "f:1")
        assert parse({"messages": plain}) == parse({"conversations": sharegpt}) == parse(alpaca) == expected
        assert parse({"messages": plain[1:] if system else plain, "system": system}) == expected


def test_every_spelling_of_a_pair_gives_the_same_row() -> None:
    draw = random.Random(1)
    for _ in range(200):
        *before, last = random_dialogue(draw)
        other = Message("assistant", last.content + " but no")
        margin = float(draw.randint(1, 5))
        before_, best, worst = (
            [{"role": m.role, "content": m.content} for m in ms] for ms in (before, [last], [other])
        )
        expected = Preference(tuple(before), (last.content, other.content), margin, "f:1")
        spellings: list[dict[str, Any]] = [
            {"prompt": before_, "chosen": best, "rejected": worst, "margin": margin},
            {"prompt": before_, "chosen": before_ + best, "rejected": before_ + worst, "margin": margin},
            {"chosen": before_ + best, "rejected": before_ + worst, "margin": margin},
            {"prompt": before_, "responses": [best, worst], "margin": margin},
            {"prompt": before_, "responses": [worst, best], "scores": [-margin, 0]},
            {"prompt": before_, "chosen": best, "rejected": worst, "score_chosen": margin, "score_rejected": 0},
        ]
        assert [parse(record) for record in spellings] == [expected] * len(spellings)


def test_scores_order_responses_as_sorting_them_by_hand_does() -> None:
    draw = random.Random(2)
    for _ in range(300):
        scores = [draw.randint(0, 3) for _ in range(draw.randint(2, 6))]
        responses = [f"r{index}" for index in range(len(scores))]
        record = {"prompt": "a", "responses": responses, "scores": scores}
        levels = sorted(set(scores), reverse=True)
        if len(levels) == 1:
            with pytest.raises(BadRow, match=f"scores: {levels[0]} for all"):
                parse(record)
            continue
        row = parse(record)
        assert isinstance(row, Preference)
        assert row.responses == tuple(responses[scores.index(level)] for level in levels)
        assert row.margin == levels[0] - levels[-1]


def test_a_common_beginning_of_two_responses_stays_in_the_responses() -> None:
    row = parse({"chosen": HH + " I think Rome.", "rejected": HH + " I think so."})
    assert row == Preference((ASKED,), ("I think Rome.", "I think so."), 0.0, "f:1")


def test_string_responses_keep_their_white_space() -> None:
    row = parse({"prompt": "a", "chosen": " b\n", "rejected": "\tc"})
    assert isinstance(row, Preference)
    assert row.responses == (" b\n", "\tc")


def test_a_preference_may_have_an_empty_prompt() -> None:
    for record in (
        {"prompt": " ", "chosen": "a", "rejected": "b"},
        {"prompt": "", "responses": ["a", "b"]},
        {"chosen": "\n\nHuman: \n\nAssistant: a", "rejected": "\n\nHuman: \n\nAssistant: b"},
        {"instruction": "", "chosen": "a", "rejected": "b"},
    ):
        row = parse(record)
        assert isinstance(row, Preference)
        assert not row.prompt[-1].content.strip()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("9 - 3 = 6\n#### 18", "18"),
        ("#### 1,234,567 \n", "1234567"),
        ("so\n####-5", "-5"),
        ("so\n#### $2.50", "2.50"),
        ("so\n#### .5", ".5"),
        ("#### 18\nand more", "#### 18\nand more"),
        ("#### eighteen", "#### eighteen"),
        ("18", "18"),
        ("", ""),
    ],
)
def test_the_final_answer_is_the_number_after_the_marker(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_text_that_almost_is_a_number_is_refused_however_long_it_is() -> None:
    digits = "1" * 200_000
    for almost in (f"{digits}x", f"{digits}.{digits}x", f"{digits}e{digits}x", " " * 200_000 + "x"):
        assert not NUMBER.fullmatch(almost)
        assert bool(NUMBER.fullmatch(almost, 0, len(almost) - 1)) == almost.startswith("1")
        assert final_answer(f"#### {almost}") == f"#### {almost}"
    assert final_answer(f"#### {digits}") == digits
    assert final_answer("#### " + "1," * 200_000) == "#### " + "1," * 200_000


def test_a_ranking_may_be_of_a_thousand_responses_and_no_more() -> None:
    responses = [f"answer {number}" for number in range(1001)]
    row = parse({"prompt": "a", "responses": responses[:1000]})
    assert isinstance(row, Preference)
    assert row.responses == tuple(responses[:1000])
    for record in (
        {"prompt": "a", "responses": responses},
        {"prompt": "a", "responses": responses * 200},
        {"prompt": "a", "responses": responses, "scores": list(range(1001))},
    ):
        with pytest.raises(BadRow, match=r"responses: [\d,]+ \(at most 1,000\)") as caught:
            parse(record)
        assert caught.value.kind is TOO_MANY_RESPONSES


def test_of_many_equal_responses_the_first_two_are_named() -> None:
    with pytest.raises(BadRow, match=r"responses\[1\] and responses\[2\]: 'b'"):
        parse({"prompt": "x", "responses": ["a", "b", " b", "c", "b"]})
