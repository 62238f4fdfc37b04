"""Held-out prompts: the same everywhere, nested, and as many as asked for."""

from __future__ import annotations

import hashlib
import json
import math
import random
import unicodedata
from itertools import pairwise

import pytest

from data.schema import Conversation, Message, Preference, Prompt, Text
from data.split import bucket, is_held_out

PLACES = {
    "Hello": 0.11571216086472802,
    "": 0.9586201729126038,
    " Where \t\n does  she live? ": 0.865136212187595,
    '"quoted" \\ and \x00': 0.6630163990033975,
    "Caf\u00e9 or\u00a0tea?": 0.36231841842523416,
    "\u4f60\u597d \U0001f600": 0.2376850613539201,
    "word " * 400: 0.04849116979980983,
}
ASCII = 'ab  \t\n\r\x0b\x0c\x1c\x1f\x00"\\'
BEYOND_ASCII = "ae\u0301\u00a0\u2003\u3000 \n\u200b\u1100\u1161\U0001f600"
PROMPTS = [(Message("user", f"Where does person {number} live?"),) for number in range(4000)]


def test_a_larger_share_holds_out_everything_a_smaller_one_does() -> None:
    rows = [Prompt(prompt) for prompt in PROMPTS]
    shares = (0.0, 0.02, 0.05, 0.1, 0.5, 1.0)
    sets = [{index for index, row in enumerate(rows) if is_held_out(row, share)} for share in shares]
    assert all(smaller < larger for smaller, larger in pairwise(sets))
    assert not sets[0]
    assert len(sets[-1]) == len(rows)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_about_the_share_is_held_out(share: float) -> None:
    count = sum(bucket(prompt) < share for prompt in PROMPTS)
    deviation = math.sqrt(len(PROMPTS) * share * (1 - share))
    assert abs(count - len(PROMPTS) * share) < 4 * deviation


def test_a_prompt_is_on_the_same_side_in_every_kind_of_row() -> None:
    for prompt in PROMPTS[:200]:
        rows = (
            Prompt(prompt, {"answer": "x"}, "a:1"),
            Conversation((*prompt, Message("assistant", "here")), "b:7"),
            Preference(prompt, ("good", "bad"), 1.0, "c:9"),
            Text(prompt[0].content),
        )
        assert len({is_held_out(row, 0.5) for row in rows}) == 1


def test_writing_the_same_prompt_differently_does_not_move_it() -> None:
    composed = (Message("user", "Caf\u00e9 or  tea?"),)
    decomposed = (Message("user", " Cafe\u0301 or\ntea? "),)
    under_a_system = (Message("system", "Be brief."), *composed)
    assert bucket(composed) == bucket(decomposed) == bucket(under_a_system)


def test_the_first_turn_and_its_role_decide() -> None:
    one, two = Message("user", "a"), Message("user", "b")
    places = [bucket(each) for each in ((one,), (two,), (Message("user", "a b"),), (Message("assistant", "a"), two))]
    assert len(set(places)) == len(places)
    assert bucket((one, Message("assistant", "x"), two)) == bucket((one,))


def test_no_part_of_a_conversation_is_a_prompt_of_the_other_side() -> None:
    for prompt in PROMPTS[:200]:
        turns = (*prompt, Message("assistant", "here"), Message("user", "Why?"), Message("assistant", "So."))
        sides = {is_held_out(Conversation(turns[:length]), 0.5) for length in (2, 4)}
        assert sides == {is_held_out(Prompt(prompt), 0.5)}


@pytest.mark.parametrize("alphabet", [ASCII, BEYOND_ASCII])
def test_the_place_is_that_of_the_definition(alphabet: str) -> None:
    rng = random.Random(len(alphabet))
    for _ in range(500):
        content = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        turns = [["user", " ".join(unicodedata.normalize("NFC", content).split())]]
        digest = hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode()).hexdigest()
        place = (int(digest[:16], 16) >> 11) / 2**53
        assert bucket((Message("user", content),)) == place


def test_the_place_never_changes_between_versions() -> None:
    places = {content: bucket((Message("user", content),)) for content in PLACES}
    assert places == PLACES
