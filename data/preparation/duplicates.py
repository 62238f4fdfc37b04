"""Documents that were seen before: equal but for case and white space, or similar.

Near duplicates are not remembered, so a row of versions, each a little different from the one before, is compared with
the first of them and not worn down to it.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from data.ngrams import Hashes, runs, word_hashes, words

SHINGLE = 5
"""Words in a row that are one element of a document's set; the words of a shorter document are one element."""
PERMUTATIONS = 128
"""Hash values of a sketch; an estimated similarity s has the standard error sqrt(s * (1 - s) / 128), at most 0.044."""
_FOUND = 0.9
_SHINGLES_AT_ONCE = 4096
_NEWEST = 2**16


class Duplicates:
    """Documents seen so far, 8 bytes each: a 64-bit hash of the case-folded text, runs of white space as one space."""

    def __init__(self) -> None:
        # Most hashes are in a sorted array; Python's objects, ten times the size, hold only the newest.
        self._sorted = np.empty(0, np.uint64)
        self._newest: set[int] = set()

    def reason(self, text: str) -> str | None:
        """Why the document is a duplicate; None when it is new, and is remembered."""
        canonical = " ".join(text.casefold().split())
        digest = blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return None if self._add(int.from_bytes(digest, "little")) else "equal to an earlier document"

    def _add(self, value: int) -> bool:
        """Whether the value is new."""
        if value in self._newest or self._is_sorted_in(value):
            return False
        self._newest.add(value)
        if len(self._newest) == _NEWEST:
            newest = np.fromiter(self._newest, np.uint64, _NEWEST)
            # The stable algorithm merges what is sorted already.
            self._sorted = np.sort(np.concatenate([self._sorted, np.sort(newest)]), kind="stable")
            self._newest.clear()
        return True

    def _is_sorted_in(self, value: int) -> bool:
        index = int(np.searchsorted(self._sorted, np.uint64(value)))
        return index < len(self._sorted) and int(self._sorted[index]) == value


class NearDuplicates:
    """Documents seen so far, about 7 kB each: a MinHash of the set of five-word runs (Broder 1997) and its places in
    an index by bands (locality-sensitive hashing).

    A document is a near duplicate when the estimated Jaccard similarity with an earlier one is at least `similarity`.
    Of the pairs that are exactly so similar the index finds nine in ten, of more similar ones more. Documents without
    words are never similar.
    """

    def __init__(self, similarity: float) -> None:
        from datasketch import MinHash, MinHashLSH

        self._similarity = similarity
        # The seed fixes the permutations, and the hashes of runs do not depend on the process.
        self._empty = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int, scheme="affine32")
        self._index = MinHashLSH(num_perm=PERMUTATIONS, params=bands(similarity))
        self._sketches: list[NDArray[np.uint32]] = []

    def reason(self, text: str) -> str | None:
        """Why the document is a near duplicate; None when it is not, and is remembered."""
        shingles = shingle_hashes(text)
        if not len(shingles):
            return None
        sketch = self._empty.copy()
        for start in range(0, len(shingles), _SHINGLES_AT_ONCE):
            sketch.update_batch(shingles[start : start + _SHINGLES_AT_ONCE].tolist())
        most = max((self._similarity_to(sketch.hashvalues, each) for each in self._index.query(sketch)), default=0.0)
        if most >= self._similarity:
            return f"{most:.0%} like an earlier document (similarity: {self._similarity})"
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch.hashvalues)
        return None

    def _similarity_to(self, values: NDArray[np.uint32], number: int) -> float:
        return float(np.mean(values == self._sketches[number]))


def shingle_hashes(text: str) -> Hashes:
    """The set of a document's runs of five words as 32-bit hashes, sorted."""
    found = words(text)
    hashes = runs(word_hashes(found), min(SHINGLE, len(found))) if found else np.empty(0, np.uint64)
    return np.unique(hashes >> np.uint64(32))


def bands(similarity: float) -> tuple[int, int]:
    """Number of bands and hash values in each: the longest bands with which two documents of this similarity share at
    least one band with a probability of 0.9 (Leskovec et al., Mining of Massive Datasets, section 3.4.2)."""
    for rows in range(PERMUTATIONS // 2, 1, -1):
        number = PERMUTATIONS // rows
        if 1 - (1 - similarity**rows) ** number >= _FOUND:
            return number, rows
    return PERMUTATIONS, 1
