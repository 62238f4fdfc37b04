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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import rendering
from data.content import ContentEncoder, backend_state, midway_tokenizer, special_ids
from data.findings import shown
from data.schema import ChatRole, Message
from pipeline.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
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

LEFT_PAD, RIGHT_PAD = "\u2003", "\u2005"
"""White space that templates strip, and that they do not write themselves."""

LARGEST_FILE = 100_000
"""Bytes of a chat template's file."""

_ANSWERED: tuple[ChatRole, ...] = ("user", "assistant")
_PLACEHOLDER = re.compile("[0-9a-f]{64}")
_OTHER_TEMPLATE = "use another chat template, or data whose turns this one takes"


@dataclass(frozen=True)
class Encoded:
    """A conversation's tokens; one truth value a token for each of the others."""

    tokens: list[int]
    trained: list[bool]
    """What is trained on: assistant contents and the stop after each."""
    written: list[bool]
    """What the template wrote, as opposed to contents."""

    def add(self, tokens: Sequence[int], *, trained: bool, written: bool) -> None:
        """Append tokens of one kind."""
        self.tokens.extend(tokens)
        self.trained.extend([trained] * len(tokens))
        self.written.extend([written] * len(tokens))


@dataclass(frozen=True)
class _Structure:
    """What a template writes around the contents of a sequence of roles: one gap more than contents."""

    gaps: tuple[tuple[int, ...], ...]
    trims: tuple[tuple[bool, bool], ...]
    """Per content: whether the template strips white space on the left, on the right."""


class ChatTemplate:
    """A tokenizer's chat template.

    Attributes:
        tokenizer: The tokenizer.
        control: Id -> marker of every control token.
        stop_id: The control token that ends the assistant's turn.

    Raises:
        ArtifactError: The tokenizer has no chat template, or one that cannot be rendered (see `data.rendering`), that
            drops, repeats, reorders or depends on contents, that does not end the assistant's turn with a single
            control token, that prompts differently from what stands before a response, or whose `{% generation %}`
            marks are not around the assistant's turns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._template = _template_text(tokenizer)
        self._contents = ContentEncoder(tokenizer)
        self.control: Mapping[int, str] = self._contents.control
        self._outer = midway_tokenizer(backend_state(tokenizer))
        self._structures: dict[tuple[tuple[ChatRole, ...], bool], _Structure | ArtifactError] = {}
        structure = self._structure(_ANSWERED)
        self._response_trim = structure.trims[-1]
        self.stop_id = self._stop_id(structure.gaps[-1])
        if self._structure(_ANSWERED[:-1], prompt=True).gaps != structure.gaps[:-1]:
            raise ArtifactError(
                "the chat template's generation prompt is not what it writes before a response",
                hint="set a chat template whose `add_generation_prompt` gives exactly the assistant's header",
            )
        self._prove(_ANSWERED)
        if self._takes(_ANSWERED * 2):
            self._prove(_ANSWERED * 2)

    @property
    def digest(self) -> str:
        """sha256 of the template and the special ids."""
        ids = {**special_ids(self.tokenizer), "stop": self.stop_id}
        return hashlib.sha256(json.dumps([self._template, ids], sort_keys=True).encode()).hexdigest()

    @property
    def padding_id(self) -> int:
        """The padding token; where that ends the assistant's turn too, or there is none, another control token.

        Classifiers and reward models of `transformers` read the last token that is not padding, which must not skip
        the end of a response.

        Raises:
            ArtifactError: The only control token is the one that ends a turn.
        """
        padding = self.tokenizer.pad_token_id
        candidates = [padding, *sorted(self.control)] if isinstance(padding, int) else sorted(self.control)
        for token in candidates:
            if token != self.stop_id:
                return token
        raise ArtifactError(
            "the tokenizer has no token to pad with but the one that ends a turn",
            where=str(self.tokenizer.name_or_path),
            hint="add a padding token to the tokenizer",
        )

    def encode(self, messages: Sequence[Message], *, prompt: bool = False) -> Encoded:
        """The tokens of a whole conversation, or of a prompt, of which nothing is trained on."""
        structure = self._structure(tuple(message.role for message in messages), prompt=prompt)
        encoded = Encoded([], [], [])
        encoded.add(structure.gaps[0], trained=False, written=True)
        for message, trim, gap in zip(messages, structure.trims, structure.gaps[1:], strict=True):
            is_trained = message.role == "assistant" and not prompt
            if is_trained and gap[:1] != (self.stop_id,):
                self._stop_id(gap)
                raise ArtifactError("the chat template ends assistant turns in different ways", hint=_OTHER_TEMPLATE)
            encoded.add(self._content(message.content, trim), trained=is_trained, written=False)
            encoded.add(gap[:1], trained=is_trained, written=True)
            encoded.add(gap[1:], trained=False, written=True)
        return encoded

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a prompt, the assistant's header included."""
        return self.encode(messages, prompt=True).tokens

    def response(self, content: str) -> list[int]:
        """The tokens of a response, the stop token included: the trained tokens of its turn."""
        return [*self._content(content, self._response_trim), self.stop_id]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens left out."""
        kept = [token for token in tokens if token not in self.control]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _content(self, content: str, trim: tuple[bool, bool]) -> list[int]:
        left, right = trim
        content = content.lstrip() if left else content
        content = content.rstrip() if right else content
        return self._contents.encode(content)

    def _takes(self, roles: tuple[ChatRole, ...]) -> bool:
        """Whether the template can write these turns: some take a single question."""
        try:
            self._structure(roles)
        except ArtifactError:
            return False
        return True

    def _prove(self, roles: tuple[ChatRole, ...]) -> None:
        """Encode a conversation and check that each assistant turn is trained on, up to and with its stop token."""
        contents = _placeholders(len(roles))
        encoded = self.encode(_chat(roles, contents))
        following = [*encoded.trained[1:], False]
        ends = [
            token
            for token, trained, then in zip(encoded.tokens, encoded.trained, following, strict=True)
            if trained and not then
        ]
        if ends != [self.stop_id] * roles.count("assistant"):
            raise ArtifactError("the stop token is not trained after every assistant turn", hint=_OTHER_TEMPLATE)
        spoken = [content for role, content in zip(roles, contents, strict=True) if role == "assistant"]
        self._require_same_marks(self._render(roles, contents), spoken)

    def _require_same_marks(self, rendered: rendering.Rendered, spoken: Sequence[str]) -> None:
        """White space after a stop may be marked too: nothing is sampled there, so it is not trained on here."""
        if rendered.spans is None:
            return
        ours = [content + self.control[self.stop_id] for content in spoken]
        marked = _marked(rendered)
        if [text.rstrip() for text in marked] == ours:
            return
        found = ", ".join(map(_readable, marked)) or "nothing"
        raise ArtifactError(
            f"the chat template's generation marks hold {found}, not the {len(ours)} assistant turns",
            hint="put `{% generation %}` before the assistant's content and `{% endgeneration %}` after its stop token",
        )

    def _stop_id(self, gap: Sequence[int]) -> int:
        if gap and gap[0] in self.control:
            return gap[0]
        found = repr(self.tokenizer.decode(list(gap[:4]))) if gap else "nothing"
        raise ArtifactError(
            f"the chat template ends the assistant's turn with {found}, not with a control token",
            hint="set a chat template that writes the end-of-turn token right after the assistant's content",
        )

    def _structure(self, roles: tuple[ChatRole, ...], *, prompt: bool = False) -> _Structure:
        key = roles, prompt
        if key not in self._structures:
            try:
                self._structures[key] = self._encode_structure(roles, prompt=prompt)
            except ArtifactError as error:  # it may have taken seconds, and would again
                self._structures[key] = error
        found = self._structures[key]
        if isinstance(found, ArtifactError):
            raise found
        return found

    def _encode_structure(self, roles: tuple[ChatRole, ...], *, prompt: bool) -> _Structure:
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
        first = self.tokenizer.encode(plain[0], add_special_tokens=False) if plain[0] else []
        rest = [self._outer.encode(gap, add_special_tokens=False).ids for gap in plain[1:]]
        return _Structure((tuple(first), *map(tuple, rest)), trims)

    def _gaps(
        self, roles: Sequence[ChatRole], placeholders: Sequence[str], *, pad: bool = False, prompt: bool = False
    ) -> list[str]:
        """The rendered text, cut at the placeholders."""
        left, right = (LEFT_PAD, RIGHT_PAD) if pad else ("", "")
        contents = [left + placeholder + right for placeholder in placeholders]
        rest = self._render(roles, contents, prompt=prompt).text
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

    def _render(
        self, roles: Sequence[ChatRole], contents: Sequence[str], *, prompt: bool = False
    ) -> rendering.Rendered:
        special_tokens: Mapping[str, str] = self.tokenizer.special_tokens_map
        return rendering.render(self._template, _chat(roles, contents), special_tokens, prompt=prompt)


def set_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Give a tokenizer the chat template in a file; what is saved from then on has it.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8, is larger than 100 kB, or its template cannot be used.
    """
    template = _read_template(path)
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        ChatTemplate(tokenizer)
    except ArtifactError as error:
        tokenizer.chat_template = before
        raise ConfigError(error.what, where=path, hint=error.hint) from error


def _read_template(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
    except OSError as error:
        hint = "give the path of a file that holds a chat template"
        raise ConfigError(f"cannot be read: {error.strerror}", where=path, hint=hint) from error
    if len(content) > LARGEST_FILE:
        raise ConfigError("larger than 100 kB", where=path, hint="is it a chat template?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 at byte {error.start}", where=path, hint="convert it to UTF-8") from error


def tokenizer_record(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a manifest says about a tokenizer: digests, special ids, vocabulary size.

    Raises:
        ArtifactError: the tokenizer or its chat template cannot be used.
    """
    template = ChatTemplate(tokenizer)
    return {
        "digest": tokenizer_digest(tokenizer),
        "chat_template": template.digest,
        "special_ids": special_ids(tokenizer),
        "vocabulary_size": len(tokenizer),
        "stop_id": template.stop_id,
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that decides which tokens a text becomes.

    Raises:
        ArtifactError: The tokenizer has no serialised state.
    """
    return hashlib.sha256(json.dumps(backend_state(tokenizer), sort_keys=True).encode()).hexdigest()


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ArtifactError(
            "the tokenizer has no chat template",
            where=str(tokenizer.name_or_path),
            hint="give a file as `chat_template` of the sft stage, or use an instruction-tuned model's tokenizer",
        ) from error


def _placeholders(count: int, salt: str = "") -> list[str]:
    """Words that no template writes by itself and no filter changes."""
    return [hashlib.sha256(f"{salt}{index}".encode()).hexdigest() for index in range(count)]


def _chat(roles: Sequence[ChatRole], contents: Sequence[str]) -> list[Message]:
    return [Message(role, content) for role, content in zip(roles, contents, strict=True)]


def _marked(rendered: rendering.Rendered) -> list[str]:
    """The texts in generation blocks; blocks that touch are one."""
    merged: list[tuple[int, int]] = []
    for start, end in rendered.spans or ():
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, end))
    return [rendered.text[start:end] for start, end in merged]


def _readable(marked: str) -> str:
    """A marked text with the placeholders as words."""
    return shown(_PLACEHOLDER.sub("CONTENT", marked))
