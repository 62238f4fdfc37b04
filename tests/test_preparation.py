"""Text preparation: every step counted, against obvious oracles, and done only once."""

from __future__ import annotations

import contextlib
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.findings import DUPLICATE_TEXT, EMPTY_TEXT, SIMILAR_TEXT, BadRow
from data.ngrams import NgramSet, words
from data.preparation import Preparer, duplicates
from data.preparation.characters import without_control_characters
from data.preparation.duplicates import Duplicates, NearDuplicates, bands, shingle_hashes
from data.preparation.repetition import repeated_lines, repeated_runs, repeated_share
from data.schema import Text
from pipeline.config import Preparation

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("BATON_DATA", REPOSITORY / "../shared/data"))
SHAKESPEARE = DATA / "tinyshakespeare" / "input.txt"
NOTHING: dict[str, Any] = {"unicode": "none", "control_characters": "keep", "duplicates": "keep"}
EVERYTHING = Preparation(
    unicode="NFKC", min_words=5, repetition=0.5, duplicates="near", similarity=0.7, decontaminate=["held"]
)
VOCABULARY = [f"word{number}" for number in range(5000)]
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u202e\u2066\r\n\x0b\x85\x00\t "
AWKWARD = f"ae\u0301\u0323\u00e9=\u0338\uff21\ufb01\u01f0\u0645\u0915\u094d\u2764\ufe0f\u1100\u1161\u00a0{INVISIBLE}"
SKETCH = [642258999, 655393276, 3442822]


def document(rng: random.Random, length: int = 200) -> str:
    return " ".join(rng.choices(VOCABULARY, k=length))


def prepared(settings: Preparation, texts: Iterable[str], held: Iterable[str] = ()) -> tuple[list[str], Preparer]:
    """The texts that stay, and their preparer."""
    contamination = NgramSet()
    for text in held:
        contamination.add(text)
    preparer = Preparer(settings, contamination)
    kept = []
    for text in texts:
        with contextlib.suppress(BadRow):
            kept.append(preparer.prepare(Text(text)).text)
    return kept, preparer


def awkward(seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choices(AWKWARD, k=200))


def jaccard(one: str, other: str) -> float:
    """Exact similarity of the sets of five-word runs."""
    sets = []
    for text in (one, other):
        found = words(text)
        sets.append({tuple(found[start : start + 5]) for start in range(len(found) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("unicode", ["none", "NFC", "NFKC"])
def test_preparing_prepared_text_changes_nothing(unicode: str) -> None:
    settings = Preparation(unicode=unicode, repetition=0.9)  # type: ignore[arg-type]
    texts = [awkward(seed) for seed in range(400)]
    once, _ = prepared(settings, texts)
    twice, again = prepared(settings, once)
    assert len(once) > 300
    assert once != texts
    assert twice == once
    assert {step for step, count in again.steps.items() if count} == {"documents", "kept"}


def test_every_step_is_counted() -> None:
    rng = random.Random(0)
    ordinary = document(rng)
    secret = "who wrote the play about the prince of denmark and his father's ghost"
    texts = [
        ordinary,
        document(rng) + " \ufb01n",
        document(rng) + "\x00 end",
        "\u200b \ufeff",
        "four words are few",
        "the same line again and again\n" * 20,
        f"{document(rng)} {secret} {document(rng)}",
        ordinary.upper().replace(" ", "\n"),
        ordinary.replace("word7", "changed", 2),
    ]
    kept, preparer = prepared(EVERYTHING, texts, [secret])
    assert kept == [ordinary, texts[1].replace("\ufb01", "fi"), texts[2].replace("\x00", "")]
    counts = {
        "documents": 9,
        "unicode normalised": 1,
        "control characters removed": 2,
        "empty text": 1,
        "fewer words than min_words": 1,
        "repetitive text": 1,
        "held-out words in the text": 1,
        "duplicate text": 1,
        "near-duplicate text": 1,
        "kept": 3,
    }
    assert list(preparer.steps.items()) == list(counts.items())


def test_what_is_not_asked_for_is_neither_done_nor_counted() -> None:
    texts = ["one\r\n", "one\r\n", "a\x00 \ufb01 e\u0301 " * 30]
    kept, preparer = prepared(Preparation(**NOTHING), [*texts, " "])
    assert kept == texts
    assert preparer.steps == {"documents": 4, "empty text": 1, "kept": 3}


def test_a_text_of_nothing_but_invisible_characters_is_empty() -> None:
    with pytest.raises(BadRow, match=r"^b\.txt:3: no text") as caught:
        Preparer(Preparation()).prepare(Text("\ufeff\u200b\n", "b.txt:3"))
    assert caught.value.kind is EMPTY_TEXT
    assert caught.value.kind.severity == "dropped"


def test_the_reason_says_how_far_a_text_is_from_the_setting() -> None:
    def reason(settings: Preparation, text: str) -> str:
        with pytest.raises(BadRow) as caught:
            Preparer(settings).prepare(Text(text))
        return caught.value.what

    assert reason(Preparation(min_words=4), "only three words") == "3 words (min_words: 4)"
    assert reason(Preparation(repetition=0.25), "a line\na line\n") == (
        "50.0% of the characters are repeated (repetition: 0.25)"
    )


def test_contamination_is_shown_as_the_words_that_are_shared() -> None:
    held = NgramSet()
    held.add("Which river flows through both Vienna and Budapest?")
    preparer = Preparer(Preparation(decontaminate=["quiz"]), held)
    with pytest.raises(BadRow, match="held-out words: which river flows through both vienna and budapest"):
        preparer.prepare(Text("Quiz! WHICH river flows -- through both Vienna and Budapest? The Danube."))


def test_decontamination_without_its_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="decontamination needs"):
        Preparer(Preparation(decontaminate=["quiz"]))


def test_a_contaminated_text_is_not_what_later_ones_are_copies_of() -> None:
    rng = random.Random(1)
    secret, body = document(rng, 13), document(rng)
    settings = Preparation(duplicates="near", decontaminate=["held"])
    kept, preparer = prepared(settings, [f"{body} {secret}", body], [secret])
    assert kept == [body]
    assert preparer.steps["near-duplicate text"] == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\x0bd\x0ce\x85f", "a\nb\nc\nd\ne\nf"),
        ("\r\r\n\n", "\n\n\n"),
        ("a\tb\nc", "a\tb\nc"),
        ("\ufeffa\x00b\x1b[1mc\x7f\x9fd", "ab[1mcd"),
        ("safe\u202egnp.exe\u202c \u2066x\u2069", "safegnp.exe x"),
        ("zero\u200bwidth\u2060word", "zerowidthword"),
        ("Lat\u200din w\u200cord\u200d\u200c", "Latin word"),
        ("\u0633\u0644\u0627\u0645\u200e!", "\u0633\u0644\u0627\u0645\u200e!"),
    ],
)
def test_control_and_invisible_characters_are_removed(text: str, expected: str) -> None:
    assert without_control_characters(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0915\u094d\u200d\u0937 \u0915\u094d\u200c\u0937",
        "\u0d28\u0d4d\u200d, at the end of a word",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f\u200d\U0001f525 \U0001f3f3\ufe0f\u200d\U0001f308",
    ],
)
def test_joiners_stay_where_writing_needs_them(text: str) -> None:
    assert without_control_characters(text) == text


def slow_repeated_runs(text: str) -> float:
    found = words(text)
    seen: set[tuple[str, ...]] = set()
    repeated: set[int] = set()
    for start in range(len(found) - 9):
        run = tuple(found[start : start + 10])
        if run in seen:
            repeated.update(range(start, start + 10))
        seen.add(run)
    return sum(len(found[index]) for index in repeated) / sum(map(len, found)) if found else 0.0


def slow_repeated_lines(text: str) -> float:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    repeated = [line for index, line in enumerate(lines) if line in lines[:index]]
    return sum(map(len, repeated)) / sum(map(len, lines)) if lines else 0.0


@pytest.mark.parametrize("seed", range(30))
def test_repetition_is_that_of_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [" ".join(rng.choices(VOCABULARY[:30], k=rng.randrange(1, 25))) for _ in range(6)]
    text = "".join(rng.choice(pieces) + rng.choice(["\n", " ", "\n\n", " \n"]) for _ in range(rng.randrange(30)))
    assert repeated_lines(text) == pytest.approx(slow_repeated_lines(text))
    assert repeated_runs(text) == pytest.approx(slow_repeated_runs(text))
    assert repeated_share(text) == max(repeated_lines(text), repeated_runs(text))


def test_repetition_of_known_texts() -> None:
    assert repeated_lines("abc\n\n abc \ndefghi\n") == pytest.approx(3 / 12)
    assert repeated_runs("yes " * 20) == pytest.approx(19 / 20)
    assert repeated_runs("yes " * 10) == 0.0
    assert repeated_share("") == repeated_share("...\n") == 0.0
    line = "these are ten words that stand in one single line"
    assert repeated_lines(f"{line} {line}") == 0.0
    assert repeated_runs(f"{line}, {line.upper()}!") == pytest.approx(0.5)


def test_repetition_of_the_share_stays_and_more_goes() -> None:
    kept, _ = prepared(Preparation(repetition=0.5), ["ab\nab", "ab\nab\nab"])
    assert kept == ["ab\nab"]


@pytest.mark.parametrize("newest", [1, 4, 2**16])
def test_duplicates_are_those_of_a_set(newest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_NEWEST", newest)
    rng = random.Random(newest)
    seen, found = set(), Duplicates()
    for _ in range(500):
        text = rng.choice(["a", "A ", "\u00c9"]) * rng.randrange(1, 40)
        canonical = " ".join(text.casefold().split())
        assert (found.reason(text) is not None) == (canonical in seen)
        seen.add(canonical)


def test_copies_differ_in_case_and_white_space_only() -> None:
    kept, preparer = prepared(Preparation(), ["Stra\u00dfe  1", " STRASSE\n1", "Strasse, 1", "\ud800", "\ud800"])
    assert kept == ["Stra\u00dfe  1", "Strasse, 1", "\ud800"]
    assert preparer.steps[DUPLICATE_TEXT.name] == 2


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_found_in_any_order_and_different_documents_stay(seed: int) -> None:
    rng = random.Random(seed)
    originals = [document(rng) for _ in range(60)]
    edited = []
    for text in originals:
        changed = text.split()
        changed[rng.randrange(len(changed))] = "edited"
        edited.append(" ".join(changed))
    assert all(jaccard(*pair) > 0.9 for pair in zip(originals, edited, strict=True))
    texts = [*originals, *edited]
    rng.shuffle(texts)
    kept, preparer = prepared(Preparation(duplicates="near", similarity=0.7), texts)
    assert len(kept) == preparer.steps[SIMILAR_TEXT.name] == 60
    assert sum(text in edited for text in kept) not in (0, 60)
    assert all(jaccard(one, other) < 0.1 for one, other in pairwise(kept))


def test_the_estimated_similarity_is_close_to_the_exact_one() -> None:
    rng = random.Random(5)
    body = document(rng, 1000).split()
    for shared in (200, 500, 800, 950):
        one, other = " ".join(body), " ".join(body[:shared] + document(rng, 1000 - shared).split())
        near = NearDuplicates(0.0001)
        assert near.reason(one) is None
        estimate = float((near.reason(other) or "0%").split("%")[0]) / 100
        exact = jaccard(one, other)
        assert abs(estimate - exact) < 4 * math.sqrt(exact * (1 - exact) / duplicates.PERMUTATIONS) + 0.005


def test_long_documents_have_the_sketch_that_their_whole_set_has(monkeypatch: pytest.MonkeyPatch) -> None:
    text = document(random.Random(6), 500)
    whole, pieces = NearDuplicates(0.8), NearDuplicates(0.8)
    whole.reason(text)
    monkeypatch.setattr(duplicates, "_SHINGLES_AT_ONCE", 7)
    pieces.reason(text)
    assert np.array_equal(whole._sketches[0], pieces._sketches[0])


def test_sketches_are_equal_on_every_machine() -> None:
    near = NearDuplicates(0.8)
    near.reason("To be, or not to be: that is the question.")
    assert near._sketches[0][:3].tolist() == SKETCH


def test_short_documents_are_alike_only_when_their_words_are() -> None:
    near = NearDuplicates(0.8)
    assert near.reason("so be it") is None
    assert near.reason("so be that") is None
    assert near.reason("So, be it!") is not None
    assert near.reason("...") is None
    assert near.reason("...") is None
    assert len(shingle_hashes("a b c d e f")) == 2


@pytest.mark.parametrize("similarity", [0.01, 0.3, 0.5, 0.8, 0.9, 0.99])
def test_bands_find_nine_in_ten_of_the_pairs_at_the_similarity(similarity: float) -> None:
    number, rows = bands(similarity)
    assert number * rows <= duplicates.PERMUTATIONS
    assert number >= 2

    def found(number: int, rows: int) -> float:
        return 1 - (1 - similarity**rows) ** number

    assert found(number, rows) >= 0.9 or rows == 1
    longer = rows + 1
    assert rows == duplicates.PERMUTATIONS // 2 or found(duplicates.PERMUTATIONS // longer, longer) < 0.9


def test_near_duplicates_need_their_library_only_when_asked_for() -> None:
    script = """
import sys
from data.preparation import Preparer
from pipeline.config import Preparation
Preparer(Preparation())
heavy = {"datasketch", "scipy", "torch", "transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
Preparer(Preparation(duplicates="near"))
assert "datasketch" in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=REPOSITORY, check=True, timeout=60)


@pytest.mark.slow
def test_shakespeare_is_prepared_as_counted() -> None:
    if not SHAKESPEARE.is_file():
        pytest.skip(f"no {SHAKESPEARE}: set BATON_DATA to the folder with tinyshakespeare/")
    speeches = SHAKESPEARE.read_text(encoding="utf-8").split("\n\n")
    # Every 200th speech is held out: 27 of the 37 have the eight words that can be found.
    settings = Preparation(min_words=5, repetition=0.3, duplicates="near", similarity=0.7, decontaminate=["held"])
    held = [speech for number, speech in enumerate(speeches) if number % 200 == 0]
    kept, preparer = prepared(settings, speeches, held)
    assert preparer.steps == {
        "documents": 7222,
        "unicode normalised": 0,
        "control characters removed": 0,
        "empty text": 0,
        "fewer words than min_words": 565,
        "repetitive text": 0,
        "held-out words in the text": 27,
        "duplicate text": 3,
        "near-duplicate text": 1,
        "kept": 6626,
    }
    assert prepared(settings, kept, held)[0] == kept
