"""Runs of words that two texts share, whatever their case, punctuation and spacing.

A word is a run of letters, digits and combining marks after Unicode composition (NFC) and case folding; an ideograph
or a kana stands alone, as Chinese and Japanese put no spaces between words. A run of n words is one 64-bit number: a
polynomial in a fixed base over 64-bit hashes of the words, modulo 2**64. Equal runs have equal numbers on every
machine and in every process; that two different ones do among a thousand million is as likely as one in forty.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from data.normal_form import normal_form

Hashes = NDArray[np.uint64]
"""64-bit hashes, one per word or run of words."""
RUN = 13
"""Words in a row that make two texts overlap, as in GPT-3's decontamination (Brown et al. 2020, arXiv 2005.14165,
appendix C)."""
SHORTEST_RUN = 8
"""A text of fewer words is too common to count as an overlap."""

_BASE = 0x9E3779B97F4A7C15
_ASCII_WORDS = "".join(chr(code).lower() if chr(code).isalnum() else " " for code in range(128))
_LAST_LETTER = 0x3FFFF
_EMOJI_MARKS = [*range(0xFE00, 0xFE10), 0x20E3]
_WORDS_KEPT = 2**17
_IDEOGRAPH = re.compile("[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def words(text: str) -> list[str]:
    """The words of a text, composed and case-folded."""
    if text.isascii():
        return text.translate(_ASCII_WORDS).split()
    # Folding can undo composition, as it does for U+01F0.
    folded = normal_form(normal_form(text, "NFC").casefold(), "NFC")
    return _blanked(_IDEOGRAPH.sub(r" \g<0> ", folded)).split()


def normalised(text: str) -> str:
    """The words of a text with one space between them; normalising twice changes nothing."""
    return " ".join(words(text))


def word_hashes(found: Sequence[str]) -> Hashes:
    """One hash per word, in order; the words as `words` gives them."""
    return np.array(list(map(_hash_of_word.__getitem__, found)), np.uint64)


def runs(hashes: Hashes, n: int) -> Hashes:
    """One hash per run of n words, in order, from the hashes of the words; none when there are fewer words.

    The hash of words w_0 ... w_(n-1) is the sum of w_i * BASE**(n-1-i), modulo 2**64.
    """
    if len(hashes) < n:
        return np.empty(0, np.uint64)
    return np.correlate(hashes, _powers(n), "valid")


class NgramSet:
    """The runs of 13 words of the texts that were added; 16 to 24 bytes each.

    A text of 8 to 12 words counts as one run of its own length. Shorter ones are ignored: they are common phrases.
    """

    def __init__(self) -> None:
        self._added: dict[int, list[Hashes]] = {}
        self._known: dict[int, _Known] = {}

    def add(self, text: str) -> None:
        """Add the runs of a text."""
        hashes = word_hashes(words(text))
        if len(hashes) >= SHORTEST_RUN:
            length = min(RUN, len(hashes))
            self._added.setdefault(length, []).append(runs(hashes, length))

    def overlaps(self, text: str) -> bool:
        """Whether a text has a run of words that one of the added texts has."""
        return self._find(text) is not None

    def shared(self, text: str) -> str:
        """The first of the shortest runs of words that an added text has too, normalised; empty when there is none."""
        found = self._find(text)
        return "" if found is None else " ".join(words(text)[found])

    def _find(self, text: str) -> slice | None:
        self._settle()
        hashes = word_hashes(words(text))
        for length, known in sorted(self._known.items()):
            start = known.first(runs(hashes, length))
            if start is not None:
                return slice(start, start + length)
        return None

    def _settle(self) -> None:
        for length, added in self._added.items():
            before = [self._known[length].hashes] if length in self._known else []
            self._known[length] = _Known(np.concatenate([*before, *added]))
        self._added.clear()


class _Known:
    """A set of hashes that is searched for many at a time."""

    def __init__(self, hashes: Hashes) -> None:
        self.hashes: Hashes = np.unique(hashes)
        bits = (8 * len(self.hashes)).bit_length()
        self._shift = np.uint64(64 - bits)
        # By the leading bits of a hash: whether there may be such a one. Spares nine of ten searches.
        self._may_be_known = np.zeros(2**bits, np.bool_)
        self._may_be_known[self.hashes >> self._shift] = True

    def first(self, hashes: Hashes) -> int | None:
        """Index of the first hash that is in the set."""
        places = np.flatnonzero(self._may_be_known[hashes >> self._shift])
        candidates = hashes[places]
        nearest = np.minimum(np.searchsorted(self.hashes, candidates), len(self.hashes) - 1)
        found = places[self.hashes[nearest] == candidates]
        return int(found[0]) if len(found) else None


class _HashOfWord(dict[str, int]):
    """Word -> hash; starts over when it is full, so that memory is bounded.

    Not `hash`, which differs between processes.
    """

    def __missing__(self, word: str) -> int:
        if len(self) >= _WORDS_KEPT:
            self.clear()
        self[word] = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        return self[word]


_hash_of_word = _HashOfWord()


@lru_cache
def _powers(n: int) -> Hashes:
    return np.array([pow(_BASE, exponent, 2**64) for exponent in reversed(range(n))], np.uint64)


def _blanked(text: str) -> str:
    """The text with a space for every character that is not in a word."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    in_word = _in_words()[np.minimum(codes, _LAST_LETTER)]
    return np.where(in_word, codes, ord(" ")).astype("<u4").tobytes().decode("utf-32-le")


@lru_cache(maxsize=1)
def _in_words() -> NDArray[np.bool_]:
    """By code point: whether it is a letter, a number or a combining mark, without which the vowel signs of Hindi
    would end a word."""
    table = np.array([unicodedata.category(chr(code))[0] in "LMN" for code in range(_LAST_LETTER + 1)])
    table[_EMOJI_MARKS] = False
    return table
