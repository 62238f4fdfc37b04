"""The five canonical rows. Everything a reader yields and a stage consumes is one of them.

Messages are `(role, content)`; `origin` is where the row came from (`file:line`), for error messages and reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ChatRole = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: ChatRole
    content: str


@dataclass(frozen=True)
class Text:
    """A document, for the tokenizer and for pretraining."""

    text: str
    origin: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns that end with the assistant's; every assistant turn is trained on."""

    messages: tuple[Message, ...]
    origin: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns before the last."""
        return self.messages[:-1]


@dataclass(frozen=True)
class Prompt:
    """Turns that await the assistant's. `facts` is what a judge needs (the answer, the task), never shown to a
    model."""

    prompt: tuple[Message, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True)
class Preference:
    """A prompt and k >= 2 responses, best first. `margin` says by how much the first beats the last, if known."""

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    margin: float = 0.0
    origin: str = ""


@dataclass(frozen=True)
class Rated:
    """A prompt and one response with a verdict, as from a thumb up or down (KTO, arXiv 2402.01306)."""

    prompt: tuple[Message, ...]
    response: str
    good: bool
    origin: str = ""


Row = Text | Conversation | Prompt | Preference | Rated
RowKind = Literal["text", "conversation", "prompt", "preference", "rated"]
