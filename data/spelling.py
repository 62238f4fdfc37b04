"""How single tokens are written: what they stand for in a text, and bytes that are part of a character as hex."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from data.content import backend_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile("<0x([0-9A-F]{2})>")


class Spelling:
    """Writes the tokens of a tokenizer, one by one, so that together they are the text.

    Raises:
        ArtifactError: The tokenizer has no serialised state.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        state = backend_state(tokenizer)
        self._added: dict[int, str] = {token["id"]: token["content"] for token in state["added_tokens"]}
        # Decoders may be nested in sequences.
        self._has_byte_level = '"type": "ByteLevel"' in json.dumps(state["decoder"])

    def __call__(self, token: int) -> str:
        """The text of a token; bytes that are no whole character are written `\\xe4`."""
        if token in self._added:
            return self._added[token]
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if self._has_byte_level and _BYTE_OF.keys() >= set(piece):
            return _text_of(bytes(_BYTE_OF[character] for character in piece))
        if byte := _BYTE.fullmatch(piece):
            return _text_of(bytes.fromhex(byte[1]))
        return piece.replace("\u2581", " ")


def _text_of(raw: bytes) -> str:
    return raw.decode("utf-8", errors="backslashreplace")


def _byte_alphabet() -> dict[str, int]:
    """Character -> the byte it stands for in byte-level vocabularies (as in GPT-2, Radford et al. 2019).

    Bytes that are visible in Latin-1 stand for themselves; the others follow from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
