"""Contents as tokens: whatever is written in a text, none of it becomes a control token."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pipeline.errors import ArtifactError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

REMEMBERED = 16
"""Texts whose tokens are kept: a stage examines a row and then encodes it."""


class ContentEncoder:
    """Encodes text in which nothing is a control token: a turn's content, a document.

    Args:
        tokenizer: The tokenizer.
        opening: Whether nothing stands before the text, as before a document; many tokenizers then put a space there.

    Attributes:
        control: Id -> marker of every control token.

    Raises:
        ArtifactError: The tokenizer has no serialised state.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, opening: bool = False) -> None:
        state = backend_state(tokenizer)
        self.control: Mapping[int, str] = {
            token["id"]: token["content"] for token in state["added_tokens"] if _is_control(token)
        }
        self._forbidden = self.control.keys() - {_unknown_id(tokenizer)}
        self._inside = _without_control(state, midway_tokenizer)
        self._backend = _without_control(state, _bare_tokenizer) if opening else self._inside
        self._remembered = lru_cache(REMEMBERED)(self._encoded)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, in a new list.

        Raises:
            ArtifactError: The tokenizer has a control token of one character that is also a letter of its model.
        """
        return self._remembered(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The tokens of each text, as `encode` gives them, on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            yield self._checked(text, encoding.ids)

    def _encoded(self, text: str) -> array[int]:
        # Four bytes a token: of long texts, lists would hold nine times as much.
        return array("I", self._checked(text, _ids(self._backend, text)))

    def _checked(self, text: str, ids: list[int]) -> list[int]:
        """Models may know a marker as a word of their own; then the text is encoded in pieces."""
        if self._forbidden.isdisjoint(ids):
            return ids
        # Normalisers may make a marker of what does not look like one: then every character is a piece.
        for pieces in (self._cut(text), list(text)):
            first, *others = pieces
            ids = [*_ids(self._backend, first), *(token for piece in others for token in _ids(self._inside, piece))]
            if self._forbidden.isdisjoint(ids):
                return ids
        raise ArtifactError(
            "the tokenizer turns plain text into control tokens", hint="use a tokenizer with byte-level BPE"
        )

    def _cut(self, text: str) -> list[str]:
        """The text with every marker cut in two."""
        markers = "|".join(map(re.escape, self.control.values()))
        cuts = [match.start() + 1 for match in re.finditer(f"(?={markers})", text)]
        return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def backend_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's serialised state, without padding and truncation, which every call may change.

    Raises:
        ArtifactError: It has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ArtifactError(
            f"{type(tokenizer).__name__} has no serialised state",
            where=str(tokenizer.name_or_path),
            hint="use a model whose tokenizer comes as tokenizer.json",
        )
    state: dict[str, Any] = json.loads(backend.to_str())
    return {**state, "padding": None, "truncation": None}


def midway_tokenizer(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer for text in the middle of other text: no post-processing, no space put before it."""
    steps = {name: _midway(state[name]) for name in ("normalizer", "pre_tokenizer")}
    return _bare_tokenizer({**state, **steps})


def _bare_tokenizer(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer without what it puts around a text."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps({**state, "post_processor": None}))


def _ids(backend: Tokenizer, text: str) -> list[int]:
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The ids of the tokens that have a name."""
    return {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
    }


def _unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What unknown characters become, unless the token also means something else."""
    ids = special_ids(tokenizer)
    unknown = ids.pop("unk")
    return None if unknown in ids.values() else unknown


def _is_control(token: dict[str, Any]) -> bool:
    """Added tokens are control tokens, special or not; only runs of white space are text like any other."""
    return bool(token["special"] or token["content"].strip(" \t\r\n\u2581"))


def _without_control(state: dict[str, Any], build: Callable[[dict[str, Any]], Tokenizer]) -> Tokenizer:
    """The tokenizer that takes control tokens for the characters they are written with."""
    # Removing them from the state would renumber the others; only special ones can be switched off.
    added = [{**token, "special": _is_control(token)} for token in state["added_tokens"]]
    inner = build({**state, "added_tokens": added})
    inner.encode_special_tokens = True
    return inner


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
