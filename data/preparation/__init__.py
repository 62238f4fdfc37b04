"""Text as it is trained on: cleaned, and without what is too short, repetitive, contaminated or seen before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from data.findings import (
    CONTAMINATED,
    DUPLICATE_TEXT,
    EMPTY_TEXT,
    REPETITIVE,
    SIMILAR_TEXT,
    TOO_FEW_WORDS,
    BadRow,
    Kind,
    cut,
)
from data.ngrams import NgramSet, words
from data.preparation.characters import normalised, without_control_characters
from data.preparation.duplicates import Duplicates, NearDuplicates
from data.preparation.repetition import repeated_share
from data.schema import Text
from pipeline.config import Preparation

Filter = Callable[[str], str | None]
"""Says why a text is left out; None when it stays."""


class Preparer:
    """Prepares documents one by one, in the order in which they are read; of copies, the first stays.

    Preparing prepared documents changes nothing. Results do not depend on the machine. One preparer is for one pass:
    it takes the second pass for copies of the first. Memory does not grow with the documents, unless copies are
    dropped: by 8 bytes for each document that stays, and with `near` by about 7 kB.

    Args:
        settings: What to do.
        contamination: The texts that must not be in the documents; needed when `settings.decontaminate` names any.

    Attributes:
        steps: What each step did, in order -> documents; `documents` came in and `kept` went out.
    """

    def __init__(self, settings: Preparation, contamination: NgramSet | None = None) -> None:
        self._settings = settings
        self._filters = _filters(settings, contamination)
        cleaning = {
            "unicode normalised": settings.unicode != "none",
            "control characters removed": settings.control_characters == "remove",
        }
        names = [name for name, wanted in cleaning.items() if wanted] + [kind.name for kind in self._filters]
        self.steps = dict.fromkeys(["documents", *names, "kept"], 0)

    def prepare(self, row: Text) -> Text:
        """The cleaned document.

        Raises:
            BadRow: it is left out.
        """
        self.steps["documents"] += 1
        text = self._cleaned(row.text)
        for kind, reason_of in self._filters.items():
            reason = reason_of(text)
            if reason is not None:
                self.steps[kind.name] += 1
                raise BadRow(kind, reason, where=row.origin)
        self.steps["kept"] += 1
        return replace(row, text=text)

    def _cleaned(self, text: str) -> str:
        composed = normalised(text, self._settings.unicode)
        self._count("unicode normalised", composed != text)
        if self._settings.control_characters == "keep":
            return composed
        visible = without_control_characters(composed)
        self._count("control characters removed", visible != composed)
        # What stood apart can now stand side by side, be composed, and be a useless joiner's new neighbour.
        while visible != composed:
            composed = normalised(visible, self._settings.unicode)
            visible = without_control_characters(composed)
        return visible

    def _count(self, step: str, done: bool) -> None:
        if done:
            self.steps[step] += 1


def _filters(settings: Preparation, contamination: NgramSet | None) -> dict[Kind, Filter]:
    """The wanted filters in order; those that remember documents last, so that they remember only what stays."""
    filters: dict[Kind, Filter] = {EMPTY_TEXT: _empty}
    if settings.min_words:
        filters[TOO_FEW_WORDS] = partial(_too_few_words, settings.min_words)
    if settings.repetition < 1.0:
        filters[REPETITIVE] = partial(_repetitive, settings.repetition)
    if settings.decontaminate:
        if contamination is None:
            raise ValueError("decontamination needs the texts of the data sources it names")
        filters[CONTAMINATED] = partial(_contaminated, contamination)
    if settings.duplicates != "keep":
        filters[DUPLICATE_TEXT] = Duplicates().reason
    if settings.duplicates == "near":
        filters[SIMILAR_TEXT] = NearDuplicates(settings.similarity).reason
    return filters


def _empty(text: str) -> str | None:
    return None if text.strip() else "no text"


def _too_few_words(least: int, text: str) -> str | None:
    count = len(words(text))
    return f"{count} words (min_words: {least})" if count < least else None


def _repetitive(most: float, text: str) -> str | None:
    share = repeated_share(text)
    return f"{share:.1%} of the characters are repeated (repetition: {most})" if share > most else None


def _contaminated(contamination: NgramSet, text: str) -> str | None:
    if not contamination.overlaps(text):
        return None
    return f"held-out words: {cut(contamination.shared(text))}"
