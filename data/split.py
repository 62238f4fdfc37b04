"""Which prompts are kept from training.

A prompt's place is a hash of its opening, so the same prompt falls on the same side in every source, in any order and
next to any other rows; and so do all prompts that a conversation of several turns consists of, which begin alike. A row
is held out when its place lies below the share; a larger share therefore holds out everything that a smaller one does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from data.normal_form import normal_form
from data.schema import Message, Row, Text

_encode = json.JSONEncoder(ensure_ascii=False).encode
_ASCII_SPACES = "".join(" " if chr(code).isspace() else chr(code) for code in range(128))


def bucket(messages: Sequence[Message]) -> float:
    """The prompt's place in [0, 1): sha256 of its first turn, Unicode-composed (NFC) and with runs of white space
    as one.

    System turns do not count: a question is the same question under another system prompt.
    """
    opening = next((message for message in messages if message.role != "system"), None)
    turns = [[opening.role, canonical(opening.content)]] if opening else []
    digest = hashlib.sha256(_encode(turns).encode()).digest()
    # 53 bits are what a float holds exactly; more could round up to 1.0.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2.0**53


def is_held_out(row: Row, share: float) -> bool:
    """Whether a row is kept from training when this share of the prompts is."""
    messages = (Message("user", row.text),) if isinstance(row, Text) else row.prompt
    return bucket(messages) < share


def canonical(content: str) -> str:
    """A text Unicode-composed (NFC) and with runs of white space as one."""
    if not content.isascii():
        return " ".join(normal_form(content, "NFC").split())
    # The same for ASCII, without an object for every word: every row read comes through here.
    spaced = content.translate(_ASCII_SPACES)
    while "  " in spaced:
        spaced = spaced.replace("  ", " ")
    return spaced.strip(" ")
