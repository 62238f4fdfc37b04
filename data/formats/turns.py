"""Turns in their order: prompts, whole dialogues, responses, and the conversations they make."""

from __future__ import annotations

from data.findings import (
    DIALOGUES_DIFFER,
    EMPTY_PROMPT,
    EMPTY_RESPONSE,
    NO_ASSISTANT_TURN,
    ROLE_ORDER,
    BadRow,
    Kind,
    cut,
    shown,
)
from data.formats import hh
from data.formats.layout import Record
from data.formats.messages import PLAIN, Spelling, Turns, listed
from data.formats.values import text, wrong
from data.schema import ChatRole, Conversation, Message

ANSWER_DUE = Message("assistant", "")


def in_order(turns: Turns, origin: str) -> Turns:
    """The turns, once they are known to be a system turn or none, and user and assistant by turns.

    Raises:
        BadRow: they are not.
    """
    roles = [each.role for each in turns.values()]
    start = 1 if roles[0] == "system" else 0
    for index, (place, role) in enumerate(zip(turns, roles, strict=True)):
        due = "user" if (index - start) % 2 == 0 else "assistant"
        if role == "system" and index > 0:
            raise _out_of_order(turns, place, "`system` only as the first turn", origin)
        if index >= start and role != due:
            raise _out_of_order(turns, place, f"`{due}`", origin)
    return turns


def ending_with(role: ChatRole, turns: Turns, origin: str) -> Turns:
    """The turns, once their last is known to be of a role.

    Raises:
        BadRow: it is not.
    """
    last = next(reversed(turns))
    if turns[last].role != role:
        raise _out_of_order(turns, last, f"`{role}` as the last turn", origin)
    return turns


def dialogue(value: object, field: str, origin: str, spelling: Spelling = PLAIN) -> Turns:
    """A whole dialogue, which ends with the assistant's answer.

    Raises:
        BadRow: as `listed`; turns out of order, or none of the assistant's.
    """
    turns = listed(value, field, origin, spelling)
    if all(each.role != "assistant" for each in turns.values()):
        raise BadRow(NO_ASSISTANT_TURN, f"{field}: no `assistant` among the turns {_roles(turns)}", where=origin)
    return ending_with("assistant", in_order(turns, origin), origin)


def prompt(record: Record, column: str, origin: str) -> Turns:
    """A prompt after the column `system`, if there is one: a text is one user turn; a list, or a dialogue in one text,
    ends with one.

    Raises:
        BadRow: as `listed`; turns out of order.
    """
    value = record[column]
    if not isinstance(value, str | list | tuple):
        raise wrong(column, "text or messages", value, origin)
    if isinstance(value, str) and not hh.is_dialogue(text(value, column, origin)):
        return with_system(record, {column: Message("user", value)}, origin)
    turns = _unanswered(spoken(value, column, origin)) if isinstance(value, str) else listed(value, column, origin)
    return with_system(record, ending_with("user", in_order(turns, origin), origin), origin)


def spoken(value: str, field: str, origin: str) -> Turns:
    """The turns of a dialogue in one text, in any order of roles.

    Raises:
        BadRow: it does not begin with a turn.
    """
    found = hh.split(value)
    if found is None:
        raise wrong(field, "a text that begins with `\\n\\nHuman:`", value, origin)
    return {f"{field}[{index}]": each for index, each in enumerate(found)}


def _unanswered(turns: Turns) -> Turns:
    """The turns without an empty last one of the assistant's, which asks for the answer."""
    *before, last = turns
    return {place: turns[place] for place in before} if before and turns[last] == ANSWER_DUE else turns


def with_system(record: Record, turns: Turns, origin: str) -> Turns:
    """The turns after the system turn of the column `system`, if it says something.

    Raises:
        BadRow: there is a system turn already.
    """
    system = record.get("system")
    if system is None or (content := text(system, "system", origin)).strip() == "":
        return turns
    first = next(iter(turns))
    if turns[first].role == "system":
        what = f"{first}: `system`, and a column `system`: {shown(system)}"
        raise BadRow(ROLE_ORDER, what, where=origin, hint="keep one of the two")
    return {"system": Message("system", content), **turns}


def response(value: object, asked: Turns, field: str, origin: str) -> str:
    """A response: a text, an assistant's turn, or a dialogue, also in one text, that repeats the prompt.

    Raises:
        BadRow: as `listed`; turns out of order, or a dialogue with another prompt.
    """
    if not isinstance(value, str | list | tuple):
        raise wrong(field, "text or messages", value, origin)
    if isinstance(value, str) and not hh.is_dialogue(text(value, field, origin)):
        return value
    turns = spoken(value, field, origin) if isinstance(value, str) else listed(value, field, origin)
    ending_with("assistant", turns, origin)
    if len(turns) > 1:
        in_order(turns, origin)
        repeats_system = turns[f"{field}[0]"].role == "system"
        before = asked if repeats_system else {k: v for k, v in asked.items() if v.role != "system"}
        same_before_last(turns, {**before, "its answer": ANSWER_DUE}, origin)
    return turns[next(reversed(turns))].content


def same_before_last(ours: Turns, theirs: Turns, origin: str) -> None:
    """See that two dialogues are the same but for their last turns.

    Raises:
        BadRow: they are not; names the first turn that differs.
    """
    if [*ours.values()][:-1] == [*theirs.values()][:-1]:
        return
    for (place, mine), (other, yours) in zip([*ours.items()][:-1], [*theirs.items()][:-1], strict=False):
        if mine != yours:
            what = f"{place}: {_turn(mine)}, but {other}: {_turn(yours)}"
            raise BadRow(DIALOGUES_DIFFER, what, where=origin)
    what = f"{len(ours)} turns up to {next(reversed(ours))}, but {len(theirs)} up to {next(reversed(theirs))}"
    raise BadRow(DIALOGUES_DIFFER, what, where=origin)


def empty(kind: Kind, place: str, content: str, origin: str) -> BadRow:
    """The error for a text of white space only."""
    return BadRow(kind, f"{place}: {shown(content)} (empty)", where=origin)


def conversation(turns: Turns, origin: str) -> Conversation:
    """A conversation to imitate.

    Raises:
        BadRow: an assistant's turn, or what the last one answers, is empty.
    """
    for place, each in turns.items():
        if each.role == "assistant" and not each.content.strip():
            raise empty(EMPTY_RESPONSE, place, each.content, origin)
    refuse_empty_prompt(dict([*turns.items()][:-1]), origin)
    return Conversation(tuple(turns.values()), origin)


def refuse_empty_prompt(asked: Turns, origin: str) -> None:
    """See that a prompt asks something.

    Raises:
        BadRow: its last turn is empty.
    """
    last = next(reversed(asked))
    if not asked[last].content.strip():
        raise empty(EMPTY_PROMPT, last, asked[last].content, origin)


def _out_of_order(turns: Turns, place: str, due: str, origin: str) -> BadRow:
    what = f"{place}: `{turns[place].role}` among the turns {_roles(turns)} (expected {due})"
    return BadRow(ROLE_ORDER, what, where=origin)


def _roles(turns: Turns) -> str:
    return cut(", ".join(each.role for each in turns.values()))


def _turn(turn: Message) -> str:
    return f"{turn.role} {shown(turn.content)}"
