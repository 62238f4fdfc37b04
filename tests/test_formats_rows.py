"""Rows that break their format or teach nothing: each is told by its kind, place, field and value."""

from __future__ import annotations

from typing import Any

import pytest

from data import findings
from data.findings import BadRow, Kind
from data.formats import FORMATS, detect

USER = {"role": "user", "content": "Where is Ann?"}
GOOD = {"role": "assistant", "content": "In Rome."}
BAD = {"role": "assistant", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ELSE = {"role": "user", "content": "Who else?"}
HUMAN = {"from": "human", "value": "Where is Ann?"}
GPT = {"from": "gpt", "value": "In Rome."}
HH = "\n\nHuman: Where is Ann?\n\nAssistant:"
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
SCORES = {**PAIR, "score_chosen": 2, "score_rejected": 1}
LIST = {"prompt": "a", "responses": ["b", "c"]}
CHOICES = {"prompt": "a", "choices": ["b", "c"], "answer": 0}

REFUSED: list[tuple[str, dict[str, Any], Kind, str]] = [
    ("text", {"text": 5}, findings.WRONG_TYPE, "text: 5 (expected text)"),
    ("text", {"text": None}, findings.WRONG_TYPE, "text: null (expected text)"),
    ("text", {"text": {"en": "a"}}, findings.WRONG_TYPE, "text: {'en': 'a'} (expected text)"),
    ("text", {"text": "a\0b"}, findings.NUL, "text: 'a\\x00b' (NUL at character 2)"),
    ("text", {"text": "añ\ud800b"}, findings.SURROGATE, "lone surrogate U+D800 at character 3"),
    ("prompt", {"prompt": HH + " In Rome."}, findings.ROLE_ORDER, "prompt[1]: `assistant` among the turns"),
    ("prompt", {"prompt": "\n\nAssistant:"}, findings.ROLE_ORDER, "prompt[0]: `assistant` among the turns"),
    ("prompt", {"prompt": "\n\nHuman: Hi." + HH}, findings.ROLE_ORDER, "prompt[1]: `user` among the turns"),
    ("prompt", {"prompt": HH + "\0"}, findings.NUL, "NUL at character"),
    ("prompt", {"prompt": None}, findings.WRONG_TYPE, "prompt: null (expected text"),
    ("prompt", {"prompt": [SYSTEM]}, findings.ROLE_ORDER, "prompt[0]: `system`"),
    ("prompt", {"prompt": [USER, ELSE]}, findings.ROLE_ORDER, "prompt[1]: `user` among the turns user, user"),
    ("prompt", {"prompt": "a", "system": 3}, findings.WRONG_TYPE, "system: 3 (expected text)"),
    ("messages", {"messages": []}, findings.WRONG_TYPE, "messages: [] (expected a list of messages)"),
    ("messages", {"messages": "hello"}, findings.WRONG_TYPE, "messages: 'hello'"),
    ("messages", {"messages": [USER]}, findings.NO_ASSISTANT_TURN, "messages: no `assistant` among the turns user"),
    ("messages", {"messages": [SYSTEM]}, findings.NO_ASSISTANT_TURN, "no `assistant` among the turns system"),
    ("messages", {"messages": [GOOD]}, findings.ROLE_ORDER, "messages[0]: `assistant` among the turns assistant"),
    ("messages", {"messages": [GOOD, USER]}, findings.ROLE_ORDER, "messages[0]: `assistant`"),
    ("messages", {"messages": [SYSTEM, GOOD]}, findings.ROLE_ORDER, "messages[1]: `assistant`"),
    ("messages", {"messages": [USER, GOOD, GOOD]}, findings.ROLE_ORDER, "messages[2]: `assistant`"),
    ("messages", {"messages": [USER, ELSE, GOOD]}, findings.ROLE_ORDER, "messages[1]: `user`"),
    ("messages", {"messages": [USER, SYSTEM, GOOD]}, findings.ROLE_ORDER, "expected `system` only as the first turn"),
    ("messages", {"messages": [USER, GOOD, ELSE]}, findings.ROLE_ORDER, "messages[2]: `user`"),
    ("messages", {"messages": [SYSTEM, USER, GOOD], "system": "Hi."}, findings.ROLE_ORDER, "a column `system`: 'Hi.'"),
    ("messages", {"messages": [USER, "hello"]}, findings.WRONG_TYPE, "messages[1]: 'hello'"),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": None}]},
        findings.WRONG_TYPE,
        "messages[1].content: null (expected text)",
    ),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": {"text": "a"}}]},
        findings.WRONG_TYPE,
        "messages[1].content: {'text': 'a'} (expected text)",
    ),
    ("messages", {"messages": [USER, {"content": "x"}]}, findings.WRONG_TYPE, "messages[1]: {'content': 'x'}"),
    ("messages", {"messages": [USER, {"role": 3, "content": "x"}]}, findings.WRONG_TYPE, "messages[1].role: 3"),
    ("messages", {"messages": [{"role": "bot", "content": "x"}]}, findings.UNKNOWN_ROLE, "messages[0].role: 'bot'"),
    ("sharegpt", {"conversations": [GPT, HUMAN, GPT]}, findings.ROLE_ORDER, "conversations[0]: `assistant`"),
    ("sharegpt", {"conversations": [HUMAN, {"from": "gpt"}]}, findings.WRONG_TYPE, "conversations[1].value: null"),
    ("sharegpt", {"conversations": [USER, GOOD]}, findings.WRONG_TYPE, "conversations[0]: {'role'"),
    (
        "sharegpt",
        {"conversations": [HUMAN, {"from": "tool", "value": "x"}]},
        findings.UNKNOWN_ROLE,
        "conversations[1].from: 'tool'",
    ),
    ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, findings.WRONG_TYPE, "input: 3 (expected text)"),
    ("alpaca", {"instruction": "a", "output": ["b"]}, findings.WRONG_TYPE, "output: ['b'] (expected text)"),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["c", "d"], ["e"]]},
        findings.WRONG_TYPE,
        "history[1]: ['e'] (expected [question, answer])",
    ),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["c", None]]},
        findings.WRONG_TYPE,
        "history[0][1]: null (expected text)",
    ),
    ("rated", {"prompt": "a", "completion": "b", "label": 2}, findings.WRONG_TYPE, "label: 2 (expected true or false"),
    ("rated", {"prompt": "a", "completion": "b", "label": None}, findings.WRONG_TYPE, "label: null"),
    ("explicit", {"prompt": HH, "chosen": HH, "rejected": [BAD]}, findings.WRONG_TYPE, "rejected: [{"),
    ("explicit", {**PAIR, "chosen": HH + " b\n\nHuman: c"}, findings.ROLE_ORDER, "chosen[2]: `user`"),
    ("explicit", {**PAIR, "chosen": None}, findings.WRONG_TYPE, "chosen: null (expected text"),
    ("explicit", {**PAIR, "chosen": 5}, findings.WRONG_TYPE, "chosen: 5 (expected text"),
    ("explicit", {**PAIR, "chosen": {"text": "b"}}, findings.WRONG_TYPE, "chosen: {'text': 'b'} (expected text"),
    ("explicit", {**PAIR, "rejected": [BAD]}, findings.WRONG_TYPE, "rejected: [{"),
    ("explicit", {**PAIR, "chosen": "", "rejected": None}, findings.WRONG_TYPE, "rejected: null"),
    ("explicit", {**PAIR, "margin": float("nan")}, findings.NOT_FINITE, "margin: nan (expected a finite number)"),
    ("explicit", {**PAIR, "margin": "-Infinity"}, findings.NOT_FINITE, "margin: '-Infinity'"),
    ("explicit", {**PAIR, "margin": "1e999"}, findings.NOT_FINITE, "margin: '1e999'"),
    ("explicit", {**PAIR, "margin": 10**400}, findings.HUGE_NUMBER, "margin: 1000"),
    ("explicit", {**PAIR, "margin": 10**30}, findings.HUGE_NUMBER, "margin: 1000"),
    ("explicit", {**PAIR, "margin": 1e300}, findings.HUGE_NUMBER, "margin: 1e+300 (expected a number within 2**53)"),
    ("explicit", {**PAIR, "margin": True}, findings.WRONG_TYPE, "margin: True (expected a number)"),
    ("explicit", {**PAIR, "margin": "1_000"}, findings.WRONG_TYPE, "margin: '1_000' (expected a number)"),
    ("explicit", {**PAIR, "margin": "much"}, findings.WRONG_TYPE, "margin: 'much' (expected a number)"),
    (
        "explicit",
        {"prompt": [USER], "chosen": [SYSTEM, GOOD], "rejected": [BAD]},
        findings.ROLE_ORDER,
        "chosen[1]: `assistant` among the turns system, assistant",
    ),
    (
        "explicit",
        {"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]},
        findings.ROLE_ORDER,
        "prompt[1]: `assistant`",
    ),
    (
        "explicit",
        {"prompt": [USER], "chosen": [USER, GOOD, ELSE], "rejected": [BAD]},
        findings.ROLE_ORDER,
        "chosen[2]: `user` among the turns user, assistant, user (expected `assistant` as the last turn)",
    ),
    ("implicit", {"chosen": [USER, GOOD, ELSE], "rejected": [USER, BAD]}, findings.ROLE_ORDER, "chosen[2]: `user`"),
    ("implicit", {"chosen": [USER, GOOD], "rejected": None}, findings.WRONG_TYPE, "rejected: null"),
    ("hh", {"chosen": "Hi" + HH + " x", "rejected": HH + " y"}, findings.WRONG_TYPE, "chosen: 'Hi"),
    ("hh", {"chosen": HH + " x\n\nHuman: more", "rejected": HH + " y"}, findings.ROLE_ORDER, "chosen[2]: `user`"),
    ("hh", {"chosen": "no markers", "rejected": HH + " y"}, findings.WRONG_TYPE, "chosen: 'no markers'"),
    ("ultrafeedback", {**SCORES, "score_chosen": None}, findings.WRONG_TYPE, "score_chosen: null (expected a number)"),
    ("ultrafeedback", {**SCORES, "score_rejected": "low"}, findings.WRONG_TYPE, "score_rejected: 'low'"),
    ("ultrafeedback", {**SCORES, "score_chosen": float("inf")}, findings.NOT_FINITE, "score_chosen: inf"),
    (
        "sharegpt_preference",
        {"conversations": [HUMAN, GPT], "chosen": GPT, "rejected": GPT},
        findings.ROLE_ORDER,
        "conversations[1]: `assistant`",
    ),
    (
        "sharegpt_preference",
        {"conversations": [HUMAN], "chosen": HUMAN, "rejected": GPT},
        findings.ROLE_ORDER,
        "chosen: `user`",
    ),
    ("ranked", {**LIST, "responses": ["b"]}, findings.WRONG_TYPE, "responses: ['b'] (expected a list of at least two"),
    ("ranked", {**LIST, "responses": "bc"}, findings.WRONG_TYPE, "responses: 'bc'"),
    ("ranked", {**LIST, "responses": ["b", 3]}, findings.WRONG_TYPE, "responses[1]: 3"),
    ("scored", {**LIST, "scores": [1]}, findings.WRONG_TYPE, "scores: [1] (expected 2 numbers, one for each response)"),
    ("scored", {**LIST, "scores": [1, None]}, findings.WRONG_TYPE, "scores[1]: null (expected a number)"),
    ("scored", {**LIST, "scores": [1, float("nan")]}, findings.NOT_FINITE, "scores[1]: nan"),
    ("scored", {**LIST, "scores": [1, 10**20]}, findings.HUGE_NUMBER, "scores[1]: 1000"),
    (
        "scored",
        {**LIST, "responses": [{"text": "b", "score": 1}, "c"]},
        findings.WRONG_TYPE,
        "responses[1]: 'c' (expected an object with `score`",
    ),
    (
        "scored",
        {**LIST, "responses": [{"text": "b", "score": 1}, {"text": "c"}]},
        findings.WRONG_TYPE,
        "responses[1].score: null (expected a number)",
    ),
    (
        "scored",
        {**LIST, "responses": [{"text": "b", "score": 1}, {"text": 4, "score": 2}]},
        findings.WRONG_TYPE,
        "responses[1].text: 4 (expected text)",
    ),
    ("choices", {**CHOICES, "choices": ["b"]}, findings.WRONG_TYPE, "choices: ['b'] (expected a list of at least two"),
    ("choices", {**CHOICES, "choices": ["b", 3]}, findings.WRONG_TYPE, "choices[1]: 3 (expected text)"),
    ("choices", {**CHOICES, "answer": 2}, findings.WRONG_TYPE, "answer: 2 (expected one of the choices, or its place"),
    ("choices", {**CHOICES, "answer": -1}, findings.WRONG_TYPE, "answer: -1"),
    ("choices", {**CHOICES, "answer": True}, findings.WRONG_TYPE, "answer: True"),
    ("choices", {**CHOICES, "answer": "d"}, findings.WRONG_TYPE, "answer: 'd'"),
]

DROPPED: list[tuple[dict[str, Any], Kind, str]] = [
    ({"text": " \n"}, findings.EMPTY_TEXT, "text: ' \\n' (empty)"),
    ({"prompt": "  "}, findings.EMPTY_PROMPT, "prompt: '  ' (empty)"),
    ({"prompt": "a", "completion": " "}, findings.EMPTY_RESPONSE, "completion: ' ' (empty)"),
    ({"prompt": "", "completion": "b"}, findings.EMPTY_PROMPT, "prompt: '' (empty)"),
    ({"prompt": "", "completion": "b", "label": False}, findings.EMPTY_PROMPT, "prompt: ''"),
    ({"question": "a", "answer": ""}, findings.EMPTY_RESPONSE, "answer: '' (empty)"),
    ({"messages": [{"role": "user", "content": ""}, GOOD]}, findings.EMPTY_PROMPT, "messages[0]: ''"),
    (
        {"messages": [USER, {"role": "assistant", "content": "\t"}, ELSE, GOOD]},
        findings.EMPTY_RESPONSE,
        "messages[1]: '\\t'",
    ),
    ({"instruction": " ", "input": "", "output": "b"}, findings.EMPTY_PROMPT, "instruction: ''"),
    ({"instruction": "a", "output": "b", "history": [["c", ""]]}, findings.EMPTY_RESPONSE, "history[0][1]: ''"),
    ({**PAIR, "chosen": ""}, findings.EMPTY_RESPONSE, "chosen: '' (empty)"),
    ({**PAIR, "rejected": "\n"}, findings.EMPTY_RESPONSE, "rejected: '\\n' (empty)"),
    ({**PAIR, "rejected": " b\n"}, findings.EQUAL_RESPONSES, "chosen and rejected: 'b'"),
    ({**PAIR, "margin": -1}, findings.SCORES_CONTRADICT, "margin: -1"),
    ({**LIST, "responses": ["b", "c", "b"]}, findings.EQUAL_RESPONSES, "responses[0] and responses[2]: 'b'"),
    ({**LIST, "scores": [3, 3.0]}, findings.TIE, "scores: 3 for all 2 responses"),
    ({**SCORES, "score_rejected": 2.0}, findings.TIE, "score_chosen and score_rejected: 2"),
    ({**SCORES, "score_rejected": 3}, findings.SCORES_CONTRADICT, "score_chosen: 2, score_rejected: 3"),
    (
        {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "?"}, BAD]},
        findings.DIALOGUES_DIFFER,
        "chosen[0]: user 'Where is Ann?', but rejected[0]: user '?'",
    ),
    (
        {"chosen": [USER, GOOD, ELSE, GOOD], "rejected": [USER, GOOD]},
        findings.DIALOGUES_DIFFER,
        "4 turns up to chosen[3], but 2 up to rejected[1]",
    ),
    (
        {"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        findings.DIALOGUES_DIFFER,
        "chosen[0]: user 'Where is Ann?', but prompt: user 'Hi?'",
    ),
    (
        {"prompt": "Where is Ann?", "chosen": [SYSTEM, USER, GOOD], "rejected": [BAD]},
        findings.DIALOGUES_DIFFER,
        "chosen[0]: system 'Be brief.', but prompt: user 'Where is Ann?'",
    ),
    (
        {"prompt": HH, "chosen": "\n\nHuman: Else?\n\nAssistant: a", "rejected": HH + " b"},
        findings.DIALOGUES_DIFFER,
        "chosen[0]: user 'Else?', but prompt[0]: user 'Where is Ann?'",
    ),
    (
        {"chosen": HH + " a", "rejected": "\n\nHuman: Else?\n\nAssistant: b"},
        findings.DIALOGUES_DIFFER,
        "chosen[0]: user 'Where is Ann?', but rejected[0]: user 'Else?'",
    ),
    (
        {"chosen": HH + " a\n\nAssistant: b", "rejected": HH + " a\n\nAssistant: c"},
        findings.NO_HUMAN_TURN,
        "chosen: '\\n\\nHuman: Where",
    ),
]


def refusal(name: str, record: dict[str, Any]) -> BadRow:
    layout = next(each for each in FORMATS if each.name == name)
    with pytest.raises(BadRow) as caught:
        layout.parse(record, "pairs.jsonl:7")
    return caught.value


@pytest.mark.parametrize(("name", "record", "kind", "words"), REFUSED)
def test_a_malformed_row_is_refused_with_place_and_field(
    name: str, record: dict[str, Any], kind: Kind, words: str
) -> None:
    problem = refusal(name, record)
    assert (problem.where, problem.kind.name, problem.kind.severity) == ("pairs.jsonl:7", kind.name, "error")
    assert words in problem.what
    assert problem.hint


@pytest.mark.parametrize(("record", "kind", "words"), DROPPED)
def test_a_row_without_a_lesson_is_dropped_with_the_reason(record: dict[str, Any], kind: Kind, words: str) -> None:
    with pytest.raises(BadRow) as caught:
        detect(record, "auto", "f:1").parse(record, "f:1")
    assert (caught.value.where, caught.value.kind.name, caught.value.kind.severity) == ("f:1", kind.name, "dropped")
    assert words in caught.value.what


@pytest.mark.parametrize(
    ("given", "meant"),
    [("human", "user"), ("gpt", "assistant"), ("bot", "assistant"), ("User", "user"), ("developer", "system")],
)
def test_another_name_of_a_role_is_refused_with_ours(given: str, meant: str) -> None:
    problem = refusal("messages", {"messages": [{"role": given, "content": "hi"}, GOOD]})
    assert "system, user, assistant" in problem.what
    assert f"`{meant}`" in problem.hint


def test_messages_in_the_column_of_another_spelling_are_told_where_they_belong() -> None:
    assert "`messages`" in refusal("sharegpt", {"conversations": [USER, GOOD]}).hint
    assert "`conversations`" in refusal("messages", {"messages": [HUMAN, GPT]}).hint


def test_hostile_values_are_printed_escaped_and_short() -> None:
    for value in ("\x1b[31mred\0", "a\u202eb\0", "\0" + "x" * 5000, "\ud800\x9b" * 100):
        for record in ({"text": value}, {"messages": [{"role": value, "content": "a"}]}, {"prompt": [{value: 1}]}):
            problem = refusal(next(iter(record)), record)
            assert problem.what.isprintable()
            assert len(problem.what) < 250


def test_a_long_list_of_roles_is_cut() -> None:
    problem = refusal("messages", {"messages": [USER, GOOD] * 500 + [USER]})
    assert "messages[1000]: `user`" in problem.what
    assert len(problem.what) < 250
