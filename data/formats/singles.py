"""Layouts of one text, one prompt, one conversation or one rated response."""

from __future__ import annotations

from data.findings import EMPTY_TEXT
from data.formats.layout import Format, Record
from data.formats.messages import SHAREGPT, Turns, is_pair_of_turns
from data.formats.turns import conversation, dialogue, empty, prompt, refuse_empty_prompt, response, with_system
from data.formats.values import sequence, text, verdict, wrong
from data.schema import Conversation, Message, Prompt, Rated, Text

ID = frozenset({"id"})
ID_AND_SYSTEM = frozenset({"id", "system"})
RESPONSE_COLUMNS = frozenset(
    {
        "completion",
        "completions",
        "response",
        "responses",
        "output",
        "chosen",
        "rejected",
        "messages",
        "conversations",
    }
)
"""Columns that say what was answered; `answer` is what a judge compares with."""
SCORES_OF_PAIR = frozenset({"score_chosen", "score_rejected"})
"""Columns of UltraFeedback's pairs, whose column `messages` repeats the chosen dialogue."""


def _text(record: Record, origin: str) -> Text:
    content = text(record["text"], "text", origin)
    if not content.strip():
        raise empty(EMPTY_TEXT, "text", content, origin)
    return Text(content, origin)


def _messages(record: Record, origin: str) -> Conversation:
    return conversation(with_system(record, dialogue(record["messages"], "messages", origin), origin), origin)


def _sharegpt(record: Record, origin: str) -> Conversation:
    turns = dialogue(record["conversations"], "conversations", origin, SHAREGPT)
    return conversation(with_system(record, turns, origin), origin)


def _prompt_completion(record: Record, origin: str) -> Conversation:
    return _answered(record, "prompt", "completion", origin)


def _question_answer(record: Record, origin: str) -> Conversation:
    return _answered(record, "question", "answer", origin)


def _answered(record: Record, question: str, answer: str, origin: str) -> Conversation:
    asked = prompt(record, question, origin)
    said = response(record[answer], asked, answer, origin)
    return conversation({**asked, answer: Message("assistant", said)}, origin)


def _alpaca(record: Record, origin: str) -> Conversation:
    output = Message("assistant", text(record["output"], "output", origin))
    return conversation({**instructed(record, origin), "output": output}, origin)


def instructed(record: Record, origin: str) -> Turns:
    """An Alpaca prompt: the turns of `history`, then `instruction` and, on the next line, `input`.

    Raises:
        BadRow: a part is not text, or `history` is not a list of pairs.
    """
    instruction = text(record["instruction"], "instruction", origin)
    given = record.get("input")
    parts = (instruction, "" if given is None else text(given, "input", origin))
    asked = Message("user", "\n".join(part for part in parts if part.strip()))
    return with_system(record, {**_history(record.get("history"), origin), "instruction": asked}, origin)


def _history(value: object, origin: str) -> Turns:
    expected = "a list of [question, answer]"
    turns: Turns = {}
    for index, pair in enumerate([] if value is None or value == "" else sequence(value, "history", expected, origin)):
        place = f"history[{index}]"
        if len(sequence(pair, place, "[question, answer]", origin)) != 2:
            raise wrong(place, "[question, answer]", pair, origin)
        turns[f"{place}[0]"] = Message("user", text(pair[0], f"{place}[0]", origin))
        turns[f"{place}[1]"] = Message("assistant", text(pair[1], f"{place}[1]", origin))
    return turns


def _prompt(record: Record, origin: str) -> Prompt:
    asked = prompt(record, "prompt", origin)
    refuse_empty_prompt(asked, origin)
    read = {"prompt", "system"}
    facts = {name: value for name, value in record.items() if name not in read and _is_fact(value)}
    return Prompt(tuple(asked.values()), facts, origin)


def _is_fact(value: object) -> bool:
    """Texts, numbers and truth values, and lists and mappings of them; within those, also null."""
    if isinstance(value, list | tuple):
        return all(item is None or _is_fact(item) for item in value)
    if isinstance(value, dict):
        return all(item is None or _is_fact(item) for item in value.values())
    return isinstance(value, str | int | float)


def _rated(record: Record, origin: str) -> Rated:
    asked = prompt(record, "prompt", origin)
    said = response(record["completion"], asked, "completion", origin)
    good = verdict(record["label"])
    if good is None:
        hint = "correct it; to imitate every response, whatever its label, say `format: prompt_completion`"
        raise wrong("label", "true or false, 1 or 0", record["label"], origin, hint)
    spoken = conversation({**asked, "completion": Message("assistant", said)}, origin)
    return Rated(spoken.prompt, said, good, origin)


SINGLES: tuple[Format, ...] = (
    Format("text", "text", frozenset({"text"}), _text, optional=ID),
    Format(
        "messages",
        "conversation",
        frozenset({"messages"}),
        _messages,
        fits=lambda record: not record.keys() >= SCORES_OF_PAIR | {"chosen", "rejected"},
        optional=ID_AND_SYSTEM,
    ),
    Format(
        "sharegpt",
        "conversation",
        frozenset({"conversations"}),
        _sharegpt,
        fits=lambda record: not is_pair_of_turns(record),
        optional=ID_AND_SYSTEM,
    ),
    Format(
        "alpaca",
        "conversation",
        frozenset({"instruction", "output"}),
        _alpaca,
        optional=ID_AND_SYSTEM | {"input", "history"},
    ),
    Format(
        "prompt_completion",
        "conversation",
        frozenset({"prompt", "completion"}),
        _prompt_completion,
        # As conversations, the bad responses would be imitated, however the label is written.
        fits=lambda record: "label" not in record,
        optional=ID_AND_SYSTEM,
    ),
    Format(
        "question_answer",
        "conversation",
        frozenset({"question", "answer"}),
        _question_answer,
        fits=lambda record: "prompt" not in record,
        optional=ID_AND_SYSTEM,
    ),
    Format(
        "prompt",
        "prompt",
        frozenset({"prompt"}),
        _prompt,
        fits=lambda record: not (RESPONSE_COLUMNS | {"choices"}) & record.keys(),
        optional=ID_AND_SYSTEM,
        facts=True,
    ),
    Format("rated", "rated", frozenset({"prompt", "completion", "label"}), _rated, optional=ID_AND_SYSTEM),
)
"""Formats of rows with one response or none."""
