"""Tokens as text, one character a token, and the tokenizer that reads it.

A trainer of TRL makes tokens of text by itself, in a way of its own: control tokens that a user typed become real
ones, and tokens merge where prompt and response meet. So it is given text in which every token that Baton made is one
character, and a tokenizer that turns each character back into its token. Nothing can merge, nothing can be mistaken,
and what it decodes is tokens again.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from data.template import ChatTemplate

FIRST = 0x20000
"""Character of token 0: from here on no character is white space, a combining mark, or half of another."""


def as_text(tokens: Iterable[int]) -> str:
    """One character for each token."""
    return "".join(chr(FIRST + token) for token in tokens)


def as_tokens(text: str) -> tuple[int, ...]:
    """The tokens that a text stands for."""
    return tuple(ord(character) - FIRST for character in text)


def text_tokenizer(template: ChatTemplate) -> PreTrainedTokenizerFast:
    """A tokenizer of token text with the template's ids; its end is the token that ends the assistant's turn.

    Raises:
        ArtifactError: There is no control token to pad with.
    """
    size = max(template.tokenizer.get_vocab().values()) + 1
    backend = Tokenizer(models.BPE({as_text([token]): token for token in range(size)}, []))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=as_text([template.stop_id]),
        pad_token=as_text([template.padding_id]),
        padding_side="left",
    )
