"""Chat templates and the tokens that a conversation becomes.

The structure of a conversation (control tokens, role names, line breaks) and its contents are encoded apart:
the Jinja template is rendered with a placeholder for each content, the text between the placeholders is
encoded with control tokens recognised, the contents are encoded with none, so that `<|end|>` written by a
user stays text. It also makes the tokens of a prompt and its response those of the whole conversation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from data.formats import shown
from data.schema import Message
from pipeline.errors import ArtifactError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
"""Control tokens of Baton's own template: padding, end of turn, and the beginning of a turn of each role."""

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Baton's own chat template; `{% generation %}` marks the trained text, as in `transformers` and TRL."""

TODAY = "01 January 2025"
FIXED_DATE = "{% macro strftime_now(layout) %}" + TODAY + "{% endmacro %}\n"
"""Put before a template, so that one that writes the date does not give other tokens every day. Jinja drops
the line break after a block, so the template itself still begins a line."""
LEFT_PAD, RIGHT_PAD = "\u2003", "\u2005"

_OTHER_TEMPLATE = "use another chat template, or data whose turns this one takes"


@dataclass(frozen=True)
class Encoded:
    """A conversation's tokens, and which are trained on: assistant contents and the stop after each."""

    tokens: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class _Structure:
    """What a template writes around the contents of a sequence of roles: one gap more than contents."""

    gaps: tuple[tuple[int, ...], ...]
    trims: tuple[tuple[bool, bool], ...]
    """Per content: whether the template strips white space on the left, on the right."""


class ChatTemplate:
    """A tokenizer's chat template.

    Raises:
        ArtifactError: the tokenizer has no chat template, or one that drops, repeats, reorders or depends on
            contents, that does not end the assistant's turn with a single control token, or that prompts
            differently from what stands before a response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = _template_text(tokenizer)
        state = _backend_state(tokenizer)
        self._control = _control_tokens(state)
        self._forbidden = self._control.keys() - {_unknown_id(tokenizer)}
        self._outer = _midway_tokenizer(state)
        self._inner = _for_contents(state)
        self._structures: dict[tuple[tuple[str, ...], bool], _Structure] = {}
        answered, prompted = ("user", "assistant"), ("user",)
        structure = self._structure(answered)
        self._response_trim = structure.trims[-1]
        self.stop_id = self._stop_id(structure.gaps[-1])
        if self._structure(prompted, prompt=True).gaps != structure.gaps[:-1]:
            raise ArtifactError(
                "the chat template's generation prompt is not what it writes before a response",
                hint="set a chat template whose `add_generation_prompt` gives exactly the assistant's header",
            )

    @property
    def digest(self) -> str:
        """sha256 of the template and the special ids."""
        ids = {**_special_ids(self._tokenizer), "stop": self.stop_id}
        return hashlib.sha256(json.dumps([self._template, ids], sort_keys=True).encode()).hexdigest()

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """The tokens of a whole conversation."""
        structure = self._structure(tuple(message.role for message in messages))
        tokens = list(structure.gaps[0])
        trained = [False] * len(tokens)
        for message, trim, gap in zip(messages, structure.trims, structure.gaps[1:], strict=True):
            is_response = message.role == "assistant"
            if is_response and gap[:1] != (self.stop_id,):
                self._stop_id(gap)
                raise ArtifactError("the chat template ends assistant turns in different ways", hint=_OTHER_TEMPLATE)
            content = self._content(message.content, trim)
            tokens += [*content, *gap]
            trained += [is_response] * len(content) + [is_response] * bool(gap) + [False] * (len(gap) - 1)
        return Encoded(tokens, trained)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a prompt, the assistant's header included."""
        structure = self._structure(tuple(message.role for message in messages), prompt=True)
        tokens = list(structure.gaps[0])
        for message, trim, gap in zip(messages, structure.trims, structure.gaps[1:], strict=True):
            tokens += [*self._content(message.content, trim), *gap]
        return tokens

    def response(self, content: str) -> list[int]:
        """The tokens of a response, the stop token included: the trained tokens of its turn."""
        return [*self._content(content, self._response_trim), self.stop_id]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens left out."""
        kept = [token for token in tokens if token not in self._control]
        return str(self._tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _content(self, content: str, trim: tuple[bool, bool]) -> list[int]:
        left, right = trim
        content = content.lstrip() if left else content
        content = content.rstrip() if right else content
        tokens: list[int] = self._inner.encode(content, add_special_tokens=False).ids
        return tokens if self._forbidden.isdisjoint(tokens) else self._in_pieces(content)

    def _in_pieces(self, content: str) -> list[int]:
        """Encode with every control token cut in two, for models that know it as a word."""
        markers = "|".join(map(re.escape, self._control.values()))
        cuts = [match.start() + 1 for match in re.finditer(f"(?={markers})", content)]
        pieces = [content[start:end] for start, end in pairwise([0, *cuts, len(content)])]
        tokens = [token for piece in pieces for token in self._inner.encode(piece, add_special_tokens=False).ids]
        if self._forbidden.isdisjoint(tokens):
            return tokens
        raise ArtifactError(
            "the tokenizer turns plain text into control tokens", hint="use a tokenizer with byte-level BPE"
        )

    def _stop_id(self, gap: Sequence[int]) -> int:
        if gap and gap[0] in self._control:
            return gap[0]
        found = repr(self._tokenizer.decode(list(gap[:4]))) if gap else "nothing"
        raise ArtifactError(
            f"the chat template ends the assistant's turn with {found}, not with a control token",
            hint="set a chat template that writes the end-of-turn token right after the assistant's content",
        )

    def _structure(self, roles: tuple[str, ...], *, prompt: bool = False) -> _Structure:
        key = roles, prompt
        if key not in self._structures:
            self._structures[key] = self._encode_structure(roles, prompt=prompt)
        return self._structures[key]

    def _encode_structure(self, roles: tuple[str, ...], *, prompt: bool) -> _Structure:
        plain = self._gaps(roles, _placeholders(len(roles)), prompt=prompt)
        padded = self._gaps(roles, _placeholders(len(roles), "other"), pad=True, prompt=prompt)
        trims = tuple(
            (not before.endswith(LEFT_PAD), not after.startswith(RIGHT_PAD)) for before, after in pairwise(padded)
        )
        if [gap.removeprefix(RIGHT_PAD).removesuffix(LEFT_PAD) for gap in padded] != plain:
            raise ArtifactError(
                f"what the chat template writes around {', '.join(roles)} depends on their contents",
                hint=_OTHER_TEMPLATE,
            )
        first = self._tokenizer.encode(plain[0], add_special_tokens=False) if plain[0] else []
        rest = [self._outer.encode(gap, add_special_tokens=False).ids for gap in plain[1:]]
        return _Structure((tuple(first), *map(tuple, rest)), trims)

    def _gaps(
        self, roles: Sequence[str], placeholders: Sequence[str], *, pad: bool = False, prompt: bool = False
    ) -> list[str]:
        """The rendered text, cut at the placeholders."""
        left, right = (LEFT_PAD, RIGHT_PAD) if pad else ("", "")
        contents = [left + placeholder + right for placeholder in placeholders]
        rest = self._render(roles, contents, prompt=prompt)
        gaps = []
        for placeholder in placeholders:
            gap, found, rest = rest.partition(placeholder)
            if not found or placeholder in rest:
                raise ArtifactError(
                    f"the chat template drops, repeats or reorders the contents of {', '.join(roles)}",
                    hint=_OTHER_TEMPLATE,
                )
            gaps.append(gap)
        return [*gaps, rest]

    def _render(self, roles: Sequence[str], contents: Sequence[str], *, prompt: bool) -> str:
        from jinja2 import TemplateError

        chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    chat,
                    chat_template=FIXED_DATE + self._template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    date_string=TODAY,
                    # Templates that can open a turn with thinking would prompt with it but not train on it.
                    enable_thinking=False,
                )
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise ArtifactError(
                f"the chat template refuses the turns {', '.join(roles)}: {shown(str(error))}",
                hint=_OTHER_TEMPLATE,
            ) from error


def tokenizer_record(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a manifest says about a tokenizer: digests, special ids, vocabulary size.

    Raises:
        ArtifactError: the tokenizer or its chat template cannot be used.
    """
    state = json.dumps(_backend_state(tokenizer), sort_keys=True).encode()
    template = ChatTemplate(tokenizer)
    return {
        "digest": hashlib.sha256(state).hexdigest(),
        "chat_template": template.digest,
        "special_ids": _special_ids(tokenizer),
        "vocabulary_size": len(tokenizer),
        "stop_id": template.stop_id,
    }


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ArtifactError(
            "the tokenizer has no chat template",
            where=str(tokenizer.name_or_path),
            hint="use an instruction-tuned model's tokenizer, or save one with `chat_template` set",
        ) from error


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
    }


def _unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What unknown characters become, unless the token also means something else."""
    ids = _special_ids(tokenizer)
    unknown = ids.pop("unk")
    return None if unknown in ids.values() else unknown


def _backend_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's serialised state, without padding and truncation, which every call may change."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ArtifactError(
            f"{type(tokenizer).__name__} has no serialised state",
            where=str(tokenizer.name_or_path),
            hint="use a model whose tokenizer comes as tokenizer.json",
        )
    state: dict[str, Any] = json.loads(backend.to_str())
    return {**state, "padding": None, "truncation": None}


def _placeholders(count: int, salt: str = "") -> list[str]:
    """Words that no template writes by itself and no filter changes."""
    return [hashlib.sha256(f"{salt}{index}".encode()).hexdigest() for index in range(count)]


def _is_control(token: dict[str, Any]) -> bool:
    """Added tokens are control tokens, special or not; only runs of white space are text like any other."""
    return bool(token["special"] or token["content"].strip(" \t\r\n\u2581"))


def _control_tokens(state: dict[str, Any]) -> dict[int, str]:
    return {token["id"]: token["content"] for token in state["added_tokens"] if _is_control(token)}


def _for_contents(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer that takes control tokens for the characters they are written with."""
    # Removing them from the state would renumber the others; only special ones can be switched off.
    added = [{**token, "special": _is_control(token)} for token in state["added_tokens"]]
    inner = _midway_tokenizer({**state, "added_tokens": added})
    inner.encode_special_tokens = True
    return inner


def _midway_tokenizer(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer for text in the middle of other text: no post-processing, no space put before it."""
    from tokenizers import Tokenizer

    inside = {
        **state,
        "post_processor": None,
        "normalizer": _midway(state["normalizer"]),
        "pre_tokenizer": _midway(state["pre_tokenizer"]),
    }
    return Tokenizer.from_str(json.dumps(inside))


def _midway(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    changed = dict(step)
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
    for parts in ("normalizers", "pretokenizers"):
        if parts in changed:
            changed[parts] = [each for each in map(_midway, changed[parts]) if each is not None]
    return changed
