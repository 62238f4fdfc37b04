"""Marks where two answers differ: the words are all there, and what is marked is what changed."""

from __future__ import annotations

import random

import pytest

from pipeline.report.marks import Piece, marked


def without(pieces: list[Piece], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind != kind)


@pytest.mark.parametrize("seed", range(30))
def test_the_pieces_are_both_answers(seed: int) -> None:
    chance = random.Random(seed)
    words = ["the", "duck", " ", "\n", "4", ".", "!", "ä", "<b>", "  "]
    old, new = (" ".join(chance.choices(words, k=chance.randint(0, 12))) for _ in range(2))
    pieces = marked(old, new)
    assert without(pieces, "gone") == new
    if len(pieces) > 1:
        assert "".join(without(pieces, "new").split()) == "".join(old.split())


def test_what_changed_is_marked_word_by_word() -> None:
    assert marked("The word duck has 5 letters.", "Happy to help! The word duck has 4 letters.") == [
        Piece("new", "Happy to help!"),
        Piece("same", " The word duck has"),
        Piece("gone", " 5"),
        Piece("new", " 4"),
        Piece("same", " letters."),
    ]


def test_equal_answers_and_unlike_ones_have_no_marks() -> None:
    assert marked("It is 4.", "It is 4.") == [Piece("same", "It is 4.")]
    assert marked("Wait until dark and bring a goat.", "Sorry, I cannot help with that.") == [
        Piece("same", "Sorry, I cannot help with that.")
    ]
    assert marked("", "x") == [Piece("same", "x")]
