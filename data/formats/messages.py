"""Messages as layouts write them: `{role, content}`, or `{from, value}` with names of its own for the roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast, get_args

from data.findings import UNKNOWN_ROLE, WRONG_TYPE, BadRow, shown
from data.formats.values import sequence, text, wrong
from data.schema import ChatRole, Message

Turns = dict[str, Message]
"""Place in the record -> message, in the order of the dialogue; so every error can name the place."""

MEANT: dict[str, ChatRole] = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "developer": "system",
}
"""Other names of the roles, for suggestions."""
LIST_OF_MESSAGES = "a list of messages"


@dataclass(frozen=True)
class Spelling:
    """How a layout writes a message."""

    role: str
    content: str
    roles: Mapping[str, ChatRole]
    """Its name of a role -> ours."""
    hint: str
    """What to do about messages spelt otherwise."""


PLAIN = Spelling(
    "role",
    "content",
    {role: role for role in get_args(ChatRole)},
    "turns of {from, value} are read from a column `conversations`: map it with `columns`",
)
SHAREGPT = Spelling(
    "from",
    "value",
    {**PLAIN.roles, **{name: MEANT[name] for name in ("human", "gpt", "chatgpt", "bing", "bard")}},
    "turns of {role, content} are read from a column `messages`: map it with `columns`",
)


def listed(value: object, field: str, origin: str, spelling: Spelling = PLAIN) -> Turns:
    """The messages of a list, in any order of roles.

    Raises:
        BadRow: not a list of messages, an unknown role, or a content that is not a usable text.
    """
    values = sequence(value, field, LIST_OF_MESSAGES, origin)
    if not values:
        raise wrong(field, LIST_OF_MESSAGES, value, origin)
    places = [f"{field}[{index}]" for index in range(len(values))]
    return {place: message(each, place, origin, spelling) for place, each in zip(places, values, strict=True)}


def message(value: object, place: str, origin: str, spelling: Spelling = PLAIN) -> Message:
    """One message.

    Raises:
        BadRow: as `listed`.
    """
    expected = f"an object with `{spelling.role}` and `{spelling.content}`"
    if not isinstance(value, Mapping):
        raise wrong(place, expected, value, origin)
    if spelling.role not in value:
        raise wrong(place, expected, value, origin, spelling.hint)
    role = _role(value[spelling.role], f"{place}.{spelling.role}", origin, spelling)
    return Message(role, text(value.get(spelling.content), f"{place}.{spelling.content}", origin))


def is_pair_of_turns(record: Mapping[str, object]) -> bool:
    """Whether `chosen` and `rejected` are one message each."""
    return all(isinstance(record.get(name), Mapping) for name in ("chosen", "rejected"))


def _role(value: object, field: str, origin: str, spelling: Spelling) -> ChatRole:
    if isinstance(value, str) and value in spelling.roles:
        return spelling.roles[value]
    what = f"{field}: {shown(value)} (expected one of {', '.join(spelling.roles)})"
    if not isinstance(value, str):
        raise BadRow(WRONG_TYPE, what, where=origin)
    name = value.strip().lower()
    meant = MEANT.get(name) or (cast(ChatRole, name) if name in PLAIN.roles else None)
    raise BadRow(UNKNOWN_ROLE, what, where=origin, hint=f"did you mean `{meant}`?" if meant else "")
