"""Dialogues in one text: `\\n\\nHuman:` or `\\n\\nAssistant:` before each turn (Bai et al. 2022, arXiv 2204.05862).

The line breaks before the first turn are often lost; a text that begins with `Human:` and has a turn of the assistant
is a dialogue all the same.
"""

from __future__ import annotations

import re

from data.schema import ChatRole, Message

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES: dict[str, ChatRole] = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(value: object) -> bool:
    """Whether a value is a text that begins with a turn."""
    return isinstance(value, str) and TURN.match(_opened(value)) is not None


def split(dialogue: str) -> list[Message] | None:
    """The turns of a dialogue, in whatever order; None if it does not begin with a turn."""
    before, *parts = TURN.split(_opened(dialogue))
    if before.strip() or not parts:
        return None
    spoken = zip(parts[::2], parts[1::2], strict=True)
    return [Message(ROLES[speaker], content.strip()) for speaker, content in spoken]


def _opened(text: str) -> str:
    """The text with the line breaks before its first turn."""
    bare = text.lstrip()
    return f"\n\n{bare}" if bare.startswith("Human:") and "\n\nAssistant:" in bare else text
