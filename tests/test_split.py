"""Held-out prompts: the same everywhere, nested, and as many as asked for."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from data.schema import Conversation, Message, Preference, Prompt, Text
from data.split import bucket, is_held_out

PLACE_OF_HELLO = 0.11571216086472802
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


def test_turns_and_their_roles_count() -> None:
    one, two = Message("user", "a"), Message("user", "b")
    places = [bucket(each) for each in ((one,), (two,), (one, two), (two, one), (Message("user", "a b"),))]
    places.append(bucket((Message("assistant", "a"), two)))
    assert len(set(places)) == len(places)


def test_the_place_never_changes_between_versions() -> None:
    assert bucket((Message("user", "Hello"),)) == pytest.approx(PLACE_OF_HELLO, abs=1e-15)
