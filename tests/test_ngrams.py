"""Words and runs of words: the same for every way of writing a text, and shared exactly when tuples of words are."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest

from data import ngrams
from data.ngrams import RUN, NgramSet, normalised, runs, word_hashes, words

FEW_WORDS = ("the", "cat", "sat", "on", "a", "mat")
HASH_OF_THIRTEEN = 12820988904589832720
HINDI = "\u0939\u093f\u0928\u094d\u0926\u0940"
MIXED = f"Caf\u00e9 \u00c7A_VA? {HINDI} \u4e2d\u6587ab\u5b57 \u2764\ufe0f \ud800x 10\u00bd \u01f0"


def ngram_hashes(text: str, n: int = RUN) -> ngrams.Hashes:
    """One hash for each run of n words of a text."""
    return runs(word_hashes(words(text)), n)


def characters(number: int, seed: int) -> str:
    """Random characters, most of them from scripts and not from the vast unassigned ranges."""
    rng = random.Random(seed)
    ranges = [(0, 0x250), (0x300, 0x600), (0x900, 0xA00), (0x1E00, 0x2100), (0x4E00, 0x4E40), (0, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(number))


def slow_words(text: str) -> list[str]:
    """The definition, character by character."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    found = [""]
    for character in folded:
        name = unicodedata.name(character, "")
        if unicodedata.category(character)[0] not in "LMN" or "VARIATION SELECTOR" in name or "KEYCAP" in name:
            found.append("")
        elif name.startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HIRAGANA LETTER", "KATAKANA LETTER")):
            found += [character, ""]
        else:
            found[-1] += character
    return list(filter(None, found))


def slow_runs(text: str, n: int) -> list[tuple[str, ...]]:
    found = words(text)
    return [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]


def sentence(rng: random.Random, longest: int) -> str:
    return " ".join(rng.choices(FEW_WORDS, k=rng.randrange(longest + 1)))


def test_words_are_runs_of_letters_digits_and_marks() -> None:
    assert words("It's 3:15 -- don't_stop") == ["it", "s", "3", "15", "don", "t", "stop"]
    assert words(MIXED) == slow_words(MIXED)
    assert len(words(MIXED)) == 11


@pytest.mark.parametrize("seed", range(20))
def test_words_are_those_of_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    ascii_text = "".join(chr(rng.randrange(128)) for _ in range(500))
    assert words(ascii_text) == slow_words(ascii_text)
    letters = "".join(
        rng.choices("aB9 .\u00e9\u0301\u0939\u093f\u4e2d\u3042\u30a2\u2764\ufe0f\u20e3\ud800\U0001f600", k=500)
    )
    assert words(letters) == slow_words(letters)


@pytest.mark.parametrize("seed", range(20))
def test_normalising_twice_changes_nothing(seed: int) -> None:
    once = normalised(characters(2000, seed))
    assert once
    assert normalised(once) == once


@pytest.mark.parametrize(
    "text", ["Stra\u00dfe  und CAF\u00c9, \u01f0a", "\u1e9b\u0323 \u03b1\u0345\u0301 \uac00", MIXED]
)
def test_ways_of_writing_a_text_are_one(text: str) -> None:
    for form in ("NFC", "NFD"):
        assert normalised(unicodedata.normalize(form, text)) == normalised(text)
    assert normalised(f"  {text.replace(' ', ' -- ')}!") == normalised(text)


def test_case_does_not_count() -> None:
    assert normalised("STRASSE \u00c9T\u00c9") == normalised("stra\u00dfe \u00e9t\u00e9")


def test_a_run_is_the_polynomial_of_its_words() -> None:
    hashes = word_hashes(FEW_WORDS)
    whole = [int(each) for each in hashes]
    expected = [
        sum(value * ngrams._BASE ** (3 - index) for index, value in enumerate(whole[start : start + 4])) % 2**64
        for start in range(3)
    ]
    assert runs(hashes, 4).tolist() == expected
    assert runs(hashes, 1).tolist() == whole


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_runs_have_equal_hashes_exactly_when_their_words_are_equal(n: int) -> None:
    rng = random.Random(n)
    text = " ".join(rng.choices(FEW_WORDS, k=3000)) + " " + "cat sat " * 20
    hashes, tuples = ngram_hashes(text, n), slow_runs(text, n)
    assert hashes.dtype == np.uint64
    assert len(hashes) == len(tuples)
    pairs = set(zip(hashes.tolist(), tuples, strict=True))
    assert len(pairs) == len(set(tuples)) == len(set(hashes.tolist()))


def test_hashes_are_the_same_in_every_process_and_version() -> None:
    assert ngram_hashes("To be, or not to be: that is the question. Whether 'tis nobler")[0] == HASH_OF_THIRTEEN


def test_a_text_shorter_than_the_run_has_none() -> None:
    assert len(ngram_hashes("", 13)) == len(ngram_hashes("a b c", 4)) == 0
    assert len(ngram_hashes("a b c", 3)) == 1


def test_a_full_cache_of_words_starts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    before = word_hashes(FEW_WORDS * 2)
    monkeypatch.setattr(ngrams, "_WORDS_KEPT", 3)
    monkeypatch.setattr(ngrams, "_hash_of_word", ngrams._HashOfWord())
    assert np.array_equal(word_hashes(FEW_WORDS * 2), before)
    assert len(ngrams._hash_of_word) <= 3


@pytest.mark.parametrize("seed", range(10))
def test_texts_overlap_exactly_when_they_share_a_tuple_of_words(seed: int) -> None:
    rng = random.Random(seed)
    known = NgramSet()
    held: set[tuple[str, ...]] = set()
    verdicts = set()
    for _ in range(40):
        text = sentence(rng, 40)
        shared = [run for n in range(8, 14) for run in slow_runs(text, n) if run in held]
        assert known.overlaps(text) == bool(shared)
        assert known.shared(text) == (" ".join(shared[0]) if shared else "")
        verdicts.add(bool(shared))
        added = " ".join(rng.choices(FEW_WORDS[:2], k=rng.randrange(20)))
        known.add(added)
        length = len(words(added))
        held.update(slow_runs(added, min(13, length)) if length >= 8 else [])
        assert known.overlaps(f"dog. {added}, dog") == (length >= 8)
        copied = f"dog {' '.join(words(added)[1:])} dog"
        held_in_copy = any(run in held for n in range(8, 14) for run in slow_runs(copied, n))
        assert known.overlaps(copied) == held_in_copy
    assert False in verdicts


def test_twelve_of_thirteen_words_are_no_overlap() -> None:
    question = list("abcdefghijklmn")
    known = NgramSet()
    known.add(" ".join(question))
    assert known.overlaps(f"x {' '.join(question[1:])} x")
    assert not known.overlaps(f"x {' '.join(question[2:])} x")


def test_a_text_of_eight_to_twelve_words_overlaps_as_a_whole() -> None:
    known = NgramSet()
    known.add("What is the capital city of the Netherlands?")
    assert known.shared("Q: what is the capital city of the Netherlands, please") == (
        "what is the capital city of the netherlands"
    )
    assert not known.overlaps("the capital city of the Netherlands is")
    known.add("How are you this fine day?")
    assert not known.overlaps("how are you this fine day")


def test_nothing_overlaps_with_nothing() -> None:
    assert not NgramSet().overlaps("a b c d e f g h i j k l m n")
    assert NgramSet().shared("") == ""
