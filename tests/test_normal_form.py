"""Normal forms are Unicode's own, and no text takes longer than its length."""

from __future__ import annotations

import random
import unicodedata

import pytest

from data.ngrams import words
from data.normal_form import SHORT, normal_form
from data.preparation.characters import normalised
from data.split import canonical
from reward.rules import JUDGES

MARKS = [chr(code) for code in range(0x20000) if unicodedata.combining(chr(code))]
STRANGE = ["\u0f73", "\u0f75", "\u0f81", "\u0344", "\uff9e", "\uff9f"]
LETTERS = [
    *"aeK ",
    "\u00e9",
    "\u01f0",
    "\u30ab",
    "\uff76",
    "\uac00",
    "\u0915",
    "\u1e9b",
    "\ufb01",
    "\U0001f600",
    "\u3001",
]
LONG = 300_000


def text(chance: random.Random, marks: list[str]) -> str:
    """Letters with runs of marks, some of them long, in any order."""
    pieces = []
    while sum(map(len, pieces)) <= SHORT:
        pieces.append(chance.choice(LETTERS))
        pieces.append("".join(chance.choices(marks, k=chance.choice((0, 1, 3, 49, 50, 51, 400)))))
    return "".join(pieces)


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_it_is_what_unicode_says(form: str) -> None:
    chance = random.Random(0)
    for _ in range(300):
        made = text(chance, [*chance.sample(MARKS, 20), *STRANGE])
        assert normal_form(made, form) == unicodedata.normalize(form, made)


@pytest.mark.parametrize(
    "piece", ["\u0301\u0316", "\u0f73", "\u0f73\u0f75\u0f81", "\uff9e\u0301", "\u0301\u0316\u3001", "\u0344\u0316"]
)
def test_a_row_of_marks_alone_keeps_nobody_waiting(piece: str) -> None:
    """By insertion, each of these would take minutes."""
    hostile = "a" + piece * (LONG // len(piece))
    assert normalised(hostile, "NFKC") == normal_form(hostile, "NFKC")
    assert canonical(hostile) == normal_form(hostile, "NFC")
    assert len(words(hostile)) <= LONG
    assert JUDGES["exact"]({"answer": hostile}, hostile).correct == 1.0
