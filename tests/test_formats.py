"""Formats: what is recognised, what is refused with its place, what is dropped with its reason."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from data.formats import FORMATS, Unusable, detect, shown
from data.schema import Conversation, Message, Preference, Prompt, Row, Text
from pipeline.errors import DataError

DATA = Path(os.environ.get("BATON_DATA", Path(__file__).parents[1] / "../shared/data"))
HH_FILE = DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz"

USER = {"role": "user", "content": "Where is Ann?"}
GOOD = {"role": "assistant", "content": "In Rome."}
BAD = {"role": "assistant", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be brief."}
PROMPT = (Message("user", "Where is Ann?"),)
ANSWERED = (*PROMPT, Message("assistant", "In Rome."))
PAIR = Preference(PROMPT, ("In Rome.", "Why?"), 0.0, "f:1")
HH = "\n\nHuman: Where is Ann?\n\nAssistant:"

ACCEPTED: list[tuple[str, dict[str, Any], Row]] = [
    ("text", {"text": "Ann is in Rome."}, Text("Ann is in Rome.", "f:1")),
    ("messages", {"messages": [USER, GOOD]}, Conversation(ANSWERED, "f:1")),
    (
        "messages",
        {"messages": [SYSTEM, USER, GOOD], "id": 3},
        Conversation((Message("system", "Be brief."), *ANSWERED), "f:1"),
    ),
    (
        "prompt_completion",
        {"prompt": "Where is Ann?", "completion": "In Rome."},
        Conversation(ANSWERED, "f:1"),
    ),
    ("prompt_completion", {"prompt": [USER], "completion": [GOOD]}, Conversation(ANSWERED, "f:1")),
    ("question_answer", {"question": "Where is Ann?", "answer": "In Rome."}, Conversation(ANSWERED, "f:1")),
    ("prompt", {"prompt": "Where is Ann?"}, Prompt(PROMPT, {}, "f:1")),
    (
        "prompt",
        {"prompt": [USER], "answer": "Rome", "level": 2, "hard": True, "notes": None, "tags": ["a"]},
        Prompt(PROMPT, {"answer": "Rome", "level": 2, "hard": True}, "f:1"),
    ),
    ("explicit", {"prompt": "Where is Ann?", "chosen": "In Rome.", "rejected": "Why?"}, PAIR),
    ("explicit", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, PAIR),
    ("explicit", {"prompt": "Where is Ann?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, PAIR),
    ("implicit", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, PAIR),
    ("hh", {"chosen": HH + " In Rome.", "rejected": HH + "  Why? "}, PAIR),
    (
        "ranked",
        {"prompt": "Where is Ann?", "responses": ["In Rome.", " Rome", "Why?"]},
        Preference(PROMPT, ("In Rome.", " Rome", "Why?"), 0.0, "f:1"),
    ),
    ("ranked", {"prompt": [USER], "responses": [[GOOD], [BAD]]}, PAIR),
    (
        "explicit",
        {"prompt": "Where is Ann?", "chosen": "In Rome.", "rejected": "Why?", "margin": 2},
        Preference(PROMPT, ("In Rome.", "Why?"), 2.0, "f:1"),
    ),
]


def parse(record: dict[str, Any], wanted: str = "auto") -> Row:
    return detect(record, wanted, "f:1").parse(record, "f:1")


@pytest.mark.parametrize(("name", "record", "row"), ACCEPTED)
def test_each_layout_is_recognised_and_read(name: str, record: dict[str, Any], row: Row) -> None:
    assert detect(record, "auto", "f:1").name == name
    assert parse(record) == row


@pytest.mark.parametrize(("name", "record", "row"), ACCEPTED)
def test_naming_the_kind_or_the_format_gives_the_same_row(name: str, record: dict[str, Any], row: Row) -> None:
    kind = next(each.kind for each in FORMATS if each.name == name)
    assert parse(record, kind) == parse(record, name) == row


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({"text": "a", "messages": [USER, GOOD]}, ["text", "messages"]),
        ({"text": "a", "prompt": "b"}, ["text", "prompt"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": [USER, GOOD]}, ["messages", "explicit"]),
        (
            {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"},
            ["prompt_completion", "explicit"],
        ),
    ],
)
def test_ambiguous_columns_are_refused_with_the_candidates(record: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(DataError, match="several formats") as caught:
        detect(record, "auto", "f:1")
    assert [name for name in (each.name for each in FORMATS) if f"`{name}`" in caught.value.what] == names
    assert "format:" in caught.value.hint
    kind = next(each.kind for each in FORMATS if each.name == names[-1])
    assert detect(record, kind, "f:1").kind == kind


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"input": "a", "output": "b"}, "no format has the columns 'input', 'output'"),
        ({"chosen": "plain", "rejected": "text"}, "chosen: 'plain'"),
        ({"chosen": None, "rejected": HH + " x"}, "chosen: null"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired"),
        ({}, "no format"),
    ],
)
def test_an_unknown_layout_is_refused_with_what_it_holds(record: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        detect(record, "auto", "f:1")
    assert words in caught.value.what
    assert caught.value.where == "f:1"
    assert caught.value.hint


MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("text", {"text": 5}, "text: 5 (expected text)"),
    ("text", {"text": None}, "text: null"),
    ("text", {"text": "a\0b"}, "NUL"),
    ("text", {"text": "a\ud800b"}, "surrogate"),
    ("explicit", {"prompt": HH, "chosen": " b", "rejected": " c"}, "prompt: '\\n\\nHuman"),
    ("prompt", {"prompt": HH}, "prompt: '\\n\\nHuman"),
    ("explicit", {"prompt": "a", "chosen": "b"}, "no column `rejected`"),
    ("explicit", {"prompt": "a", "chosen": None, "rejected": "c"}, "chosen: null"),
    ("explicit", {"prompt": "a", "chosen": 5, "rejected": "c"}, "chosen: 5"),
    ("explicit", {"prompt": "a", "chosen": "b", "rejected": [BAD]}, "rejected: [{"),
    ("explicit", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, "margin: nan"),
    ("explicit", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "margin: 1000"),
    ("explicit", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "margin: True"),
    ("explicit", {"prompt": [USER], "chosen": [SYSTEM, GOOD], "rejected": [BAD]}, "chosen[0]: `system`"),
    ("explicit", {"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "prompt[1]: `assistant`"),
    ("messages", {"messages": []}, "messages: []"),
    ("messages", {"messages": "hello"}, "messages: 'hello'"),
    ("messages", {"messages": [USER]}, "messages[0]: `user`"),
    ("messages", {"messages": [GOOD]}, "messages[0]: `assistant`"),
    ("messages", {"messages": [SYSTEM, GOOD]}, "messages[0]: `system` among the turns system"),
    (
        "messages",
        {"messages": [USER, GOOD, GOOD]},
        "messages[1]: `assistant` among the turns user, assistant",
    ),
    (
        "messages",
        {"messages": [USER, SYSTEM, GOOD]},
        "messages[1]: `system` among the turns user, system, assistant",
    ),
    ("messages", {"messages": [USER, "hello"]}, "messages[1]: 'hello'"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content: null"),
    ("messages", {"messages": [USER, {"content": "x"}]}, "messages[1].role: null"),
    ("ranked", {"prompt": "a", "responses": ["b"]}, "responses: ['b']"),
    ("ranked", {"prompt": "a", "responses": "bc"}, "responses: 'bc'"),
    ("ranked", {"prompt": "a", "responses": ["b", 3]}, "responses[1]: 3"),
    ("hh", {"chosen": "Hi" + HH + " x", "rejected": HH + " y"}, "chosen: 'Hi"),
    ("hh", {"chosen": HH + " x\n\nHuman: more", "rejected": HH + " y"}, "chosen[2]: `user`"),
    ("hh", {"chosen": "no markers", "rejected": HH + " y"}, "chosen: 'no markers'"),
]


@pytest.mark.parametrize(("name", "record", "words"), MALFORMED)
def test_a_malformed_row_is_refused_with_place_and_field(name: str, record: dict[str, Any], words: str) -> None:
    layout = next(each for each in FORMATS if each.name == name)
    with pytest.raises(DataError) as caught:
        layout.parse(record, "pairs.jsonl:7")
    assert caught.value.where == "pairs.jsonl:7"
    assert words in caught.value.what
    assert caught.value.hint


@pytest.mark.parametrize(("given", "meant"), [("human", "user"), ("gpt", "assistant"), ("bot", "assistant")])
def test_another_name_of_a_role_is_refused_with_ours(given: str, meant: str) -> None:
    with pytest.raises(DataError) as caught:
        parse({"messages": [{"role": given, "content": "hi"}, GOOD]})
    assert "system, user, assistant" in caught.value.what
    assert f"`{meant}`" in caught.value.hint


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": " \n"}, "empty text"),
        ({"prompt": "  "}, "empty prompt"),
        ({"prompt": "a", "completion": " "}, "empty response"),
        ({"messages": [{"role": "user", "content": ""}, GOOD]}, "empty prompt"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty response"),
        ({"prompt": "a", "chosen": "b", "rejected": " b\n"}, "equal responses"),
        ({"prompt": "a", "responses": ["b", "c", "b"]}, "equal responses"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "?"}, BAD]}, "dialogues differ"),
        ({"chosen": HH + " a", "rejected": "\n\nHuman: Else?\n\nAssistant: b"}, "dialogues differ"),
        ({"chosen": HH + " a\n\nAssistant: b", "rejected": HH + " a\n\nAssistant: c"}, "no human turn"),
    ],
)
def test_a_row_without_a_lesson_is_dropped_with_the_reason(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        parse(record)


def test_a_common_beginning_of_two_responses_stays_in_the_responses() -> None:
    row = parse({"chosen": HH + " I think Rome.", "rejected": HH + " I think so."})
    assert row == Preference(PROMPT, ("I think Rome.", "I think so."), 0.0, "f:1")


def test_string_responses_keep_their_white_space() -> None:
    row = parse({"prompt": "a", "chosen": " b\n", "rejected": "\tc"})
    assert isinstance(row, Preference)
    assert row.responses == (" b\n", "\tc")


def test_values_are_shown_escaped_and_short() -> None:
    for value in ("\x1b[31mred", "a\u202eb", "x" * 500, ["\x9b" * 100], "\ud800"):
        text = shown(value)
        assert text.isprintable()
        assert len(text) <= 80


def test_real_pairs_split_where_the_last_assistant_turn_begins() -> None:
    if not HH_FILE.exists():
        pytest.skip(f"no {HH_FILE}: set BATON_DATA to the folder with hh-rlhf/")
    with gzip.open(HH_FILE, "rt", encoding="utf-8") as stream:
        records = [json.loads(line) for line in stream]
    marker = "\n\nAssistant:"
    reasons = []
    for record in records:
        prompt, _, chosen = record["chosen"].rpartition(marker)
        _, _, rejected = record["rejected"].rpartition(marker)
        try:
            row = parse(record)
        except Unusable as reason:
            reasons.append(str(reason))
            continue
        assert isinstance(row, Preference)
        assert row.responses == (chosen.strip(), rejected.strip())
        assert prompt == record["rejected"].rpartition(marker)[0]
        flat = "".join(prompt.replace("\n\nHuman:", "").replace(marker, "").split())
        assert "".join("".join(message.content for message in row.prompt).split()) == flat
        assert row.prompt[-1].role == "user"
    assert len(records) == 2312
    assert sorted(reasons) == ["dialogues differ before the last turn"] * 5 + ["empty response"] * 4
