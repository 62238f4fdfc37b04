"""What is odd inside texts: control and invisible characters, control tokens, template syntax, words for nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from data.findings import (
    CONTROL_CHARACTERS,
    CONTROL_TOKENS,
    EQUAL_BUT_FOR_CASE,
    INVISIBLE_CHARACTERS,
    NO_PROMPT,
    NULL_WORDS,
    REPLACEMENT_CHARACTERS,
    TEMPLATE_SYNTAX,
    Kind,
    cut,
    shown,
)
from data.schema import Conversation, Preference, Prompt, Row, Text

Field = tuple[str, str]
"""The name of a text in its row, and the text."""

_ASCII_CONTROLS = "".join(chr(code) for code in [*range(0x20), 0x7F] if chr(code) not in "\t\n\r")
_C1_CONTROLS = "\x80-\x9f"
_HIDDEN = "\u180e\u200b\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
_JOINERS_AND_MARKS = "\u061c\u200c-\u200f"
_TAGS = "\U000e0000-\U000e007f"
_FLAG = "\U0001f3f4"
_REPLACEMENT = "\ufffd"
_FULLWIDTH_BAR = "\uff5c"

_CONTROLS = re.compile(f"[{_ASCII_CONTROLS}{_C1_CONTROLS}]")
# Joiners and direction marks belong to many scripts and to emoji, tags to flags; between ASCII letters they only hide.
_INVISIBLE = re.compile(
    f"[{_HIDDEN}]|(?<=[!-~])[{_JOINERS_AND_MARKS}]+(?=[!-~])|(?<![{_FLAG}{_TAGS}])[{_TAGS}]"
)  # fmt: skip
_REPLACED = re.compile(f"{_REPLACEMENT}+")
_MARKERS = (
    r"<\|[^\s|<>]{1,40}\|>",
    rf"<{_FULLWIDTH_BAR}[^\s<>]{{1,40}}{_FULLWIDTH_BAR}>",
    r"</?s>|<(?:bos|eos|pad|unk|mask)>",
    r"<(?:start|end)_of_(?:turn|image|text)>",
    r"\[/?INST\]|<</?SYS>>",
    r"\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]",
    r"\[(?:CLS|SEP|PAD|MASK|UNK|BOS|EOS)\]",
)
"""How control tokens of well-known models are written."""
_TEMPLATE = re.compile(r"\{\{[^{}]{0,200}\}\}|\{%[^{}]{0,200}%\}")
_NULL_WORDS = {"none", "null", "nan"}
_LONGEST_NULL_WORD = 4

_ASCII_SUSPECTS = _ASCII_CONTROLS.encode() + b"<[{"
"""Without one of these, ASCII text holds nothing that is looked for."""
_SUSPECTS = re.compile(
    f"[{_ASCII_CONTROLS}{_C1_CONTROLS}{_HIDDEN}{_JOINERS_AND_MARKS}{_TAGS}{_REPLACEMENT}<\\[{{]"
)  # fmt: skip


def fields(row: Row) -> list[Field]:
    """Every text of a row with its name."""
    if isinstance(row, Text):
        return [("text", row.text)]
    if isinstance(row, Conversation):
        is_pair = len(row.messages) == 2
        names = ("prompt", "response") if is_pair else [f"messages[{index}]" for index in range(len(row.messages))]
        return [(name, message.content) for name, message in zip(names, row.messages, strict=True)]
    asked = [message.content for message in row.prompt]
    prompt = [("prompt", asked[0])] if len(asked) == 1 else [(f"prompt[{i}]", text) for i, text in enumerate(asked)]
    if isinstance(row, Prompt):
        return prompt
    if not isinstance(row, Preference):
        return [*prompt, ("response", row.response)]
    is_pair = len(row.responses) == 2
    names = ("chosen", "rejected") if is_pair else [f"responses[{index}]" for index in range(len(row.responses))]
    return [*prompt, *zip(names, row.responses, strict=True)]


class ContentCheck:
    """Looks into the texts of rows.

    Args:
        control_tokens: Control tokens of the tokenizer in use, looked for beside those of well-known models.
    """

    def __init__(self, control_tokens: Collection[str] = ()) -> None:
        given = sorted(filter(None, control_tokens), key=len, reverse=True)
        self._patterns = (
            (CONTROL_CHARACTERS, _CONTROLS),
            (INVISIBLE_CHARACTERS, _INVISIBLE),
            (REPLACEMENT_CHARACTERS, _REPLACED),
            (CONTROL_TOKENS, re.compile("|".join([*map(re.escape, given), *_MARKERS]))),
            (TEMPLATE_SYNTAX, _TEMPLATE),
        )
        self._unsuspected = [token for token in given if not _SUSPECTS.search(token)]

    def __call__(self, named: list[Field], whole: str) -> Iterator[tuple[Kind, str]]:
        """Each kind of oddity in a row once, with the first field it is in and what it looks like there.

        Args:
            named: The row's texts.
            whole: The same, joined by line breaks.
        """
        if self._is_suspect(whole):
            for kind, pattern in self._patterns:
                yield from _first(kind, pattern, named)
        yield from _null_word(named)

    def _is_suspect(self, text: str) -> bool:
        if any(token in text for token in self._unsuspected):
            return True
        if not text.isascii():
            return _SUSPECTS.search(text) is not None
        data = text.encode("ascii")
        return len(data.translate(None, _ASCII_SUSPECTS)) < len(data)


def _first(kind: Kind, pattern: re.Pattern[str], named: list[Field]) -> Iterator[tuple[Kind, str]]:
    for name, text in named:
        match = pattern.search(text)
        if match:
            around = text[max(match.start() - 20, 0) : match.end() + 20]
            yield kind, f"{name}: {cut(around)} (character {match.start() + 1:,})"
            return


def _null_word(named: list[Field]) -> Iterator[tuple[Kind, str]]:
    for name, text in named:
        word = text.strip() if len(text) < 80 else ""
        if 0 < len(word) <= _LONGEST_NULL_WORD and word.lower() in _NULL_WORDS:
            yield NULL_WORDS, f"{name}: {cut(repr(text))}"
            return


def odd_preference(row: Preference) -> Iterator[tuple[Kind, str]]:
    """What is odd about a preference as a whole."""
    asked = [message.content for message in row.prompt if message.role != "system"]
    if not any(content.strip() for content in asked):
        yield NO_PROMPT, f"prompt: {shown(asked[-1])} (empty)" if asked else "no turn before the responses"
    folded: dict[str, Field] = {}
    for name, response in fields(row)[-len(row.responses) :]:
        first, other = folded.setdefault(response.strip().casefold(), (name, response))
        if first != name:
            yield EQUAL_BUT_FOR_CASE, f"{first} and {name}: {cut(f'{other} / {response}')}"
            return
