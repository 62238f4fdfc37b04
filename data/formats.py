"""How a record of a data file becomes a canonical row.

A format is recognised by its columns and, where columns do not decide, by its content; more than one
candidate is an error that names them. Formats follow the names of TRL's dataset formats where it has one.

A record that breaks its format raises `DataError`. A well-formed record that nothing can be learnt from
raises `Unusable`, which the reader counts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast, get_args

from data.schema import ChatRole, Conversation, Message, Preference, Prompt, Row, RowKind, Text
from pipeline.errors import DataError

Record = Mapping[str, Any]

ROLES: tuple[str, ...] = get_args(ChatRole)
OTHER_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES: dict[str, ChatRole] = {"Human": "user", "Assistant": "assistant"}
RESPONSE_COLUMNS = frozenset({"completion", "chosen", "rejected", "responses", "messages"})
SHAPES = (
    '{"text"}, {"messages"}, {"prompt", "completion"}, {"question", "answer"}, {"prompt"}, '
    '{"prompt", "chosen", "rejected"}, {"chosen", "rejected"} or {"prompt", "responses"}'
)


class Unusable(Exception):
    """A well-formed record that no stage can learn from; its text is the reason that is counted."""


@dataclass(frozen=True)
class Format:
    """One layout of a record."""

    name: str
    kind: RowKind
    columns: frozenset[str]
    """Columns that must be there."""
    fits: Callable[[Record], bool]
    """Whether a record with these columns looks like this format and no other."""
    parse: Callable[[Record, str], Row]
    """Record and origin -> row; raises `DataError` or `Unusable`."""


def detect(record: Record, wanted: str, origin: str) -> Format:
    """The one format that a record is in.

    Args:
        record: The first record of a file.
        wanted: `auto`, a kind of row, or a format's name; limits the candidates.
        origin: Where the record is, for the error.

    Raises:
        DataError: no format fits, or several do.
    """
    refuse_unpaired(record, origin)
    allowed = [each for each in FORMATS if wanted in ("auto", each.name, each.kind)]
    complete = [each for each in allowed if each.columns <= record.keys()]
    fitting = [each for each in complete if each.fits(record)]
    if len(fitting) == 1:
        return fitting[0]
    columns = _columns(record)
    if fitting:
        names = ", ".join(f"`{each.name}` ({each.kind})" for each in fitting)
        raise DataError(
            f"columns {columns} fit several formats: {names}",
            where=origin,
            hint=f"name one in the data source, for example `format: {fitting[0].kind}`",
        )
    if complete:
        _refuse_content(record, complete, origin)
    what = "no format" if wanted == "auto" else f"no format of `{wanted}`"
    raise DataError(f"{what} has the columns {columns}", where=origin, hint=f"rename the columns to one of {SHAPES}")


def refuse_unpaired(record: Record, origin: str) -> None:
    """Refuse records of single responses with a verdict: as conversations, the bad ones would be imitated."""
    if {"prompt", "completion", "label"} <= record.keys() and isinstance(record["label"], bool):
        raise DataError(
            "columns `prompt`, `completion`, `label` are unpaired preferences, which no stage takes",
            where=origin,
            hint="pair the responses of a prompt as `chosen` and `rejected`, or drop the column `label`",
        )


def shown(value: object) -> str:
    """A value from a file as it may be printed: escaped, at most 80 characters."""
    return "null" if value is None else cut(repr(value))


def _columns(record: Record) -> str:
    return cut(", ".join(sorted(map(repr, record))))


def cut(text: str) -> str:
    """At most 80 characters of a text."""
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_content(record: Record, candidates: Sequence[Format], origin: str) -> NoReturn:
    columns = sorted(frozenset[str]().union(*(each.columns for each in candidates)))
    values = ", ".join(f"{column}: {shown(record[column])}" for column in columns)
    names = " or ".join(f"`{each.name}`" for each in candidates)
    raise DataError(
        f"{values} does not look like {names} among the columns {_columns(record)}",
        where=origin,
        hint="dialogues are lists of {role, content} or text of `\\n\\nHuman:` and `\\n\\nAssistant:` turns, "
        "and plain responses need a column `prompt`",
    )


def _refuse(origin: str, field: str, expected: str, value: object, hint: str = "") -> NoReturn:
    raise DataError(f"{field}: {shown(value)} (expected {expected})", where=origin, hint=hint or "correct this row")


def _column(record: Record, name: str, origin: str) -> Any:
    if name not in record:
        raise DataError(f"no column `{name}`", where=origin, hint="every row needs the columns of the first one")
    return record[name]


def _text(value: object, field: str, origin: str) -> str:
    if not isinstance(value, str):
        _refuse(origin, field, "text", value)
    if "\0" in value:
        _refuse(origin, field, "text without NUL characters", value)
    if not value.isascii() and any("\ud800" <= each <= "\udfff" for each in value):
        _refuse(origin, field, "text without lone surrogates", value)
    return value


def _message(value: object, field: str, origin: str) -> Message:
    if not isinstance(value, Mapping):
        _refuse(origin, field, "an object with `role` and `content`", value)
    role = value.get("role")
    if role not in ROLES:
        meant = OTHER_NAMES.get(role, "") if isinstance(role, str) else ""
        hint = f"did you mean `{meant}`?" if meant else ""
        _refuse(origin, f"{field}.role", f"one of {', '.join(ROLES)}", role, hint)
    return Message(cast(ChatRole, role), _text(value.get("content"), f"{field}.content", origin))


def _messages(value: object, field: str, origin: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        _refuse(origin, field, "a list of messages", value)
    messages = tuple(_message(each, f"{field}[{index}]", origin) for index, each in enumerate(value))
    for index, message in enumerate(messages):
        if message.role == "system" and index > 0:
            _refuse_roles(messages, field, index, "`system` only as the first turn", origin)
    return messages


def _refuse_roles(messages: Sequence[Message], field: str, index: int, rule: str, origin: str) -> NoReturn:
    roles = cut(", ".join(message.role for message in messages))
    raise DataError(
        f"{field}[{index}]: `{messages[index].role}` among the turns {roles} (expected {rule})",
        where=origin,
        hint="correct the order of the turns",
    )


def _ends_with(role: ChatRole, messages: tuple[Message, ...], field: str, origin: str) -> tuple[Message, ...]:
    if messages[-1].role != role:
        _refuse_roles(messages, field, len(messages) - 1, f"`{role}` as the last turn", origin)
    return messages


def _prompt(value: object, field: str, origin: str) -> tuple[Message, ...]:
    """A prompt: a text is one user turn."""
    if isinstance(value, str):
        if _is_hh(value):
            hint = "give whole dialogues as `chosen` and `rejected`, without a column for the prompt"
            _refuse(origin, field, "a question, not a dialogue in one text", value, hint)
        messages: tuple[Message, ...] = (Message("user", _text(value, field, origin)),)
    else:
        messages = _ends_with("user", _messages(value, field, origin), field, origin)
    if not messages[-1].content.strip():
        raise Unusable("empty prompt")
    return messages


def _dialogue(value: object, field: str, origin: str) -> tuple[Message, ...]:
    """A whole dialogue: a prompt and the assistant's answer to it."""
    messages = _ends_with("assistant", _messages(value, field, origin), field, origin)
    if len(messages) == 1:
        _refuse_roles(messages, field, 0, "a `user` turn before it", origin)
    _ends_with("user", messages[:-1], field, origin)
    return messages


def _response(value: object, prompt: tuple[Message, ...], field: str, origin: str) -> str:
    """A response: a text, an assistant's turn, or a dialogue that repeats the prompt."""
    if isinstance(value, str):
        return _text(value, field, origin)
    messages = _ends_with("assistant", _messages(value, field, origin), field, origin)
    if len(messages) > 1 and messages[:-1] != prompt:
        index = next((i for i, pair in enumerate(zip(messages, prompt, strict=False)) if pair[0] != pair[1]), 0)
        _refuse_roles(messages, field, index, "one `assistant` turn, or the turns of `prompt` and one more", origin)
    return messages[-1].content


def _spoken(messages: tuple[Message, ...], origin: str) -> Conversation:
    if any(message.role == "assistant" and not message.content.strip() for message in messages):
        raise Unusable("empty response")
    if not messages[-2].content.strip():
        raise Unusable("empty prompt")
    return Conversation(messages, origin)


def _compared(record: Record, prompt: tuple[Message, ...], responses: Sequence[str], origin: str) -> Preference:
    stripped = [response.strip() for response in responses]
    if not all(stripped):
        raise Unusable("empty response")
    if len(set(stripped)) < len(stripped):
        raise Unusable("equal responses")
    return Preference(prompt, tuple(responses), _margin(record, origin), origin)


def _margin(record: Record, origin: str) -> float:
    value = record.get("margin", 0.0)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # A comparison also refuses NaN, and integers that no float can hold.
    if not is_number or not abs(value) <= sys.float_info.max:
        _refuse(origin, "margin", "a finite number", value)
    return float(value)


def _parse_text(record: Record, origin: str) -> Text:
    text = _text(_column(record, "text", origin), "text", origin)
    if not text.strip():
        raise Unusable("empty text")
    return Text(text, origin)


def _parse_messages(record: Record, origin: str) -> Conversation:
    return _spoken(_dialogue(_column(record, "messages", origin), "messages", origin), origin)


def _parse_completion(record: Record, origin: str) -> Conversation:
    return _answered(record, "prompt", "completion", origin)


def _parse_question(record: Record, origin: str) -> Conversation:
    return _answered(record, "question", "answer", origin)


def _answered(record: Record, asked: str, answered: str, origin: str) -> Conversation:
    question, answer = _column(record, asked, origin), _column(record, answered, origin)
    prompt = _prompt(question, asked, origin)
    response = _response(answer, prompt, answered, origin)
    return _spoken((*prompt, Message("assistant", response)), origin)


def _parse_prompt(record: Record, origin: str) -> Prompt:
    prompt = _prompt(_column(record, "prompt", origin), "prompt", origin)
    facts = {
        name: value
        for name, value in record.items()
        if name != "prompt" and isinstance(value, str | int | float | bool)
    }
    return Prompt(prompt, facts, origin)


def _parse_explicit(record: Record, origin: str) -> Preference:
    prompt_value, chosen, rejected = (_column(record, name, origin) for name in ("prompt", "chosen", "rejected"))
    prompt = _prompt(prompt_value, "prompt", origin)
    best = _response(chosen, prompt, "chosen", origin)
    worst = _response(rejected, prompt, "rejected", origin)
    if isinstance(chosen, str) != isinstance(rejected, str):
        _refuse(origin, "rejected", "text, as `chosen` is" if isinstance(chosen, str) else "messages", rejected)
    return _compared(record, prompt, (best, worst), origin)


def _parse_implicit(record: Record, origin: str) -> Preference:
    chosen = _dialogue(_column(record, "chosen", origin), "chosen", origin)
    rejected = _dialogue(_column(record, "rejected", origin), "rejected", origin)
    return _split_dialogues(record, chosen, rejected, origin)


def _split_dialogues(
    record: Record, chosen: tuple[Message, ...], rejected: tuple[Message, ...], origin: str
) -> Preference:
    """Two dialogues, split at the last turn: what both responses begin with belongs to the responses."""
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("dialogues differ before the last turn")
    if not chosen[-2].content.strip():
        raise Unusable("empty prompt")
    return _compared(record, chosen[:-1], (chosen[-1].content, rejected[-1].content), origin)


def _parse_hh(record: Record, origin: str) -> Preference:
    chosen = hh_turns(_column(record, "chosen", origin), "chosen", origin)
    rejected = hh_turns(_column(record, "rejected", origin), "rejected", origin)
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("dialogues differ before the last turn")
    if len(chosen) < 2 or chosen[-2].role != "user":
        raise Unusable("no human turn before the last assistant turn")
    return _split_dialogues(record, chosen, rejected, origin)


def hh_turns(value: object, field: str, origin: str) -> tuple[Message, ...]:
    """The turns of a dialogue of `\\n\\nHuman:` and `\\n\\nAssistant:` (Bai et al. 2022, arXiv 2204.05862).

    Raises:
        DataError: text before the first turn, or the last turn is not the assistant's.
    """
    text = _text(value, field, origin)
    before, *parts = HH_TURN.split(text)
    if before.strip() or not parts:
        _refuse(origin, field, "a text that begins with `\\n\\nHuman:`", text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    messages = tuple(Message(HH_ROLES[speaker], content.strip()) for speaker, content in turns)
    return _ends_with("assistant", messages, field, origin)


def _parse_ranked(record: Record, origin: str) -> Preference:
    prompt_value, ranked = _column(record, "prompt", origin), _column(record, "responses", origin)
    if not isinstance(ranked, Sequence) or isinstance(ranked, str) or len(ranked) < 2:
        _refuse(origin, "responses", "a list of at least two responses, best first", ranked)
    prompt = _prompt(prompt_value, "prompt", origin)
    responses = [_response(each, prompt, f"responses[{index}]", origin) for index, each in enumerate(ranked)]
    return _compared(record, prompt, responses, origin)


def _is_hh(value: object) -> bool:
    return isinstance(value, str) and HH_TURN.match(value) is not None


def _always(record: Record) -> bool:
    return True


FORMATS: tuple[Format, ...] = (
    Format("text", "text", frozenset({"text"}), _always, _parse_text),
    Format("messages", "conversation", frozenset({"messages"}), _always, _parse_messages),
    Format("prompt_completion", "conversation", frozenset({"prompt", "completion"}), _always, _parse_completion),
    Format(
        "question_answer",
        "conversation",
        frozenset({"question", "answer"}),
        lambda record: "prompt" not in record,
        _parse_question,
    ),
    Format(
        "prompt",
        "prompt",
        frozenset({"prompt"}),
        lambda record: not RESPONSE_COLUMNS & record.keys(),
        _parse_prompt,
    ),
    Format("explicit", "preference", frozenset({"prompt", "chosen", "rejected"}), _always, _parse_explicit),
    Format(
        "implicit",
        "preference",
        frozenset({"chosen", "rejected"}),
        lambda record: "prompt" not in record and isinstance(record["chosen"], list),
        _parse_implicit,
    ),
    Format(
        "hh",
        "preference",
        frozenset({"chosen", "rejected"}),
        lambda record: "prompt" not in record and _is_hh(record["chosen"]),
        _parse_hh,
    ),
    Format("ranked", "preference", frozenset({"prompt", "responses"}), _always, _parse_ranked),
)
"""Every format, in the order in which the documentation lists them."""
