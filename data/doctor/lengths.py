"""Lengths in tokens, and the rows that no longer say anything, or nothing new, once they are tokens, or that the chat
template refuses to write.

What fits is decided as for training (`data/tree.py`): a prompt loses its beginning, a row whose longest response
alone fills `max_length` is left out.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data.findings import (
    EQUAL_TOKENS,
    EQUAL_WITHIN_LENGTH,
    NOTHING_TRAINED,
    PROMPT_CUT,
    TEMPLATE_REFUSES,
    TOO_LONG,
    BadRow,
    Kind,
)
from data.read import SIMPLER, convert, kind_of
from data.schema import Conversation, Message, Preference, Prompt, Row, Text
from pipeline.errors import ArtifactError

QUANTILES = (0.5, 0.9, 0.99, 0.995, 1.0)
KEPT_WHOLE = 0.995
"""Share of the rows that the suggested `max_length` leaves uncut."""
MULTIPLE = 64


class Marked(Protocol):
    """A conversation's tokens, and which are trained on."""

    @property
    def tokens(self) -> list[int]: ...
    @property
    def trained(self) -> list[bool]: ...


class Encoder(Protocol):
    """What turns rows into the tokens that a model sees; `data/template.py:ChatTemplate` is one. Each of its functions
    raises `ArtifactError` for turns that its template refuses."""

    def encode(self, messages: Sequence[Message]) -> Marked:
        """The tokens of a whole conversation."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a prompt, the assistant's header included."""

    def response(self, content: str) -> list[int]:
        """The tokens of a response, the stop token included."""


class Lengths:
    """Measures rows in tokens, 4 bytes for each prompt, response and row.

    Args:
        encoder: Makes the tokens.
        max_length: Longest example in tokens, if there is a limit.
        kinds: Kinds of rows as which they are measured, in order of preference; as they are when there is none.
    """

    def __init__(self, encoder: Encoder, max_length: int | None, kinds: Sequence[str] = ()) -> None:
        self._encoder = encoder
        self._max_length = max_length
        self._kinds = kinds
        self._measured = {"prompt": array("L"), "response": array("L"), "whole": array("L")}

    def measure(self, row: Row) -> tuple[Kind, str] | None:
        """Measure a row; returns what is wrong with it as tokens, and particulars."""
        try:
            problem = self._problem(self._as_read(row))
        except ArtifactError as error:
            return TEMPLATE_REFUSES, error.what
        except BadRow:  # the stage leaves it out, whatever its length
            return None
        return (problem, "") if problem else None

    def _as_read(self, row: Row) -> Row:
        possible = SIMPLER[kind_of(row)]
        for kind in self._kinds:
            if kind in possible:
                return convert(row, kind)
        return row

    def _problem(self, row: Row) -> Kind | None:
        if isinstance(row, Text):
            # Documents are packed into blocks, so that none is too long.
            self._note(None, [len(self._encoder.response(row.text))])
            return None
        if isinstance(row, Conversation):
            return self._conversation(row)
        prompt = self._encoder.prompt(row.prompt)
        if isinstance(row, Prompt):
            self._note(len(prompt), [])
            return PROMPT_CUT if self._max_length is not None and len(prompt) > self._max_length else None
        responses = row.responses if isinstance(row, Preference) else (row.response,)
        return self._compared(prompt, [self._encoder.response(response) for response in responses])

    def quantiles(self) -> dict[str, dict[str, int]]:
        """Part of a row -> quantile, as `50%` -> tokens."""
        found = {}
        for part, lengths in self._measured.items():
            if lengths:
                values = np.quantile(np.array(lengths), QUANTILES, method="inverted_cdf")
                names = (f"{100 * quantile:g}%" for quantile in QUANTILES)
                found[part] = dict(zip(names, values.tolist(), strict=True))
        return found

    def figures(self) -> dict[str, float]:
        """The share of rows that are longer than `max_length`, and a suggestion for it: the smallest multiple of 64
        that leaves 99.5% of the rows whole."""
        whole = np.array(self._measured["whole"])
        if not len(whole):
            return {}
        needed = int(np.quantile(whole, KEPT_WHOLE, method="inverted_cdf"))
        figures = {"suggested_max_length": float(max(1, -(-needed // MULTIPLE)) * MULTIPLE)}
        if self._max_length is not None:
            figures["over_long_share"] = float((whole > self._max_length).mean())
        return figures

    def _conversation(self, row: Conversation) -> Kind | None:
        encoded = self._encoder.encode(row.messages)
        if not any(encoded.trained):
            return NOTHING_TRAINED
        start = encoded.trained.index(True)
        stop = len(encoded.trained) - encoded.trained[::-1].index(True)
        self._note(start, [stop - start])
        return self._fit(start, stop - start)

    def _compared(self, prompt: list[int], responses: list[list[int]]) -> Kind | None:
        self._note(len(prompt), [len(response) for response in responses])
        if _some_equal(responses):
            return EQUAL_TOKENS
        problem = self._fit(len(prompt), max(map(len, responses)))
        if problem is TOO_LONG and _some_equal([(prompt + response)[: self._max_length] for response in responses]):
            return EQUAL_WITHIN_LENGTH
        return problem

    def _fit(self, prompt: int, longest: int) -> Kind | None:
        if self._max_length is None:
            return None
        if longest >= self._max_length:
            return TOO_LONG
        return PROMPT_CUT if prompt + longest > self._max_length else None

    def _note(self, prompt: int | None, responses: list[int]) -> None:
        if prompt is not None:
            self._measured["prompt"].append(prompt)
        self._measured["response"].extend(responses if prompt is not None else [])
        self._measured["whole"].append((prompt or 0) + max(responses, default=0))


def _some_equal(sequences: list[list[int]]) -> bool:
    return len(set(map(tuple, sequences))) < len(sequences)
