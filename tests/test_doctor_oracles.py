"""The doctor's counts against slow, obvious ones, on random small data."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import partial
from graphlib import TopologicalSorter
from itertools import combinations, pairwise, permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.doctor import Diagnosis, Examination
from data.doctor.comparisons import _cycles
from data.doctor.keys import Places
from data.doctor.overlap import Overlap
from data.doctor.scripts import main_script
from data.findings import (
    CONTRADICTION,
    CYCLE,
    DUPLICATE_ROW,
    EQUAL_TOKENS,
    EQUAL_WITHIN_LENGTH,
    LEAK_EXACT,
    LEAK_NGRAMS,
    LEAK_NORMALISED,
    NOTHING_TRAINED,
    PROMPT_CUT,
    TEMPLATE_REFUSES,
    TOO_LONG,
)
from data.read import Reading
from data.schema import Conversation, Message, Preference, Prompt, Rated, Row, Text
from data.split import bucket
from data.tree import conversation_tree, preference_tree
from pipeline.errors import ArtifactError, StorageError

SEEDS = range(30)


def turns(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def diagnosed(rows: Sequence[Row], held_out: float = 0.0, **options: Any) -> Diagnosis:
    examination = Examination(held_out=held_out, **options)
    for number, row in enumerate(rows, start=1):
        examination.see(Reading(f"a.jsonl:{number}", number, "explicit", row=row))
    return examination.diagnose()


def random_preferences(seed: int, ranked: bool = True) -> list[Preference]:
    draw = random.Random(seed)
    rows = []
    for _ in range(draw.randint(1, 30)):
        responses = draw.sample("ABCDE", draw.randint(2, 4 if ranked else 2))
        rows.append(
            Preference(turns(draw.choice("pqr")), tuple(response * draw.randint(1, 2) for response in responses))
        )
    return rows


def edges(rows: Sequence[Preference]) -> set[tuple[str, str, str]]:
    """Prompt, better and worse of all pairs."""
    return {(row.prompt[0].content, better, worse) for row in rows for better, worse in combinations(row.responses, 2)}


def has_cycle(pairs: set[tuple[str, str]]) -> bool:
    """By trying every order of every choice of responses."""
    nodes = {node for pair in pairs for node in pair}
    return any(
        all((path[at], path[(at + 1) % size]) in pairs for at in range(size))
        for size in range(3, len(nodes) + 1)
        for path in permutations(sorted(nodes), size)
    )


def uncontradicted(rows: Sequence[Preference], prompt: str) -> set[tuple[str, str]]:
    found = edges(rows)
    return {(a, b) for each, a, b in found if each == prompt and (each, b, a) not in found}


@pytest.mark.parametrize("seed", SEEDS)
def test_duplicates_are_those_of_a_slow_count(seed: int) -> None:
    rows = random_preferences(seed)
    seen: list[tuple[Any, ...]] = []
    again = []
    for number, row in enumerate(rows, start=1):
        said = (row.prompt, row.responses)
        if said in seen:
            again.append(number)
        seen.append(said)
    diagnosis = diagnosed(rows)
    assert diagnosis.findings[DUPLICATE_ROW].count == len(again)
    assert {number for number, drop in diagnosis.drops.items() if drop.kind.name == DUPLICATE_ROW.name} == set(again)


@pytest.mark.parametrize("seed", SEEDS)
def test_contradictions_are_those_of_a_slow_count(seed: int) -> None:
    rows = random_preferences(seed)
    found = edges(rows)
    both = {(prompt, *sorted((a, b))) for prompt, a, b in found if (prompt, b, a) in found}
    assert diagnosed(rows).findings[CONTRADICTION].count == len(both)


@pytest.mark.parametrize("seed", SEEDS)
def test_prompts_with_cycles_are_those_of_a_slow_search(seed: int) -> None:
    draw = random.Random(seed)
    rows = [Preference(turns(draw.choice("pq")), tuple(draw.sample("ABCDE", 2))) for _ in range(draw.randint(3, 14))]
    expected = sum(has_cycle(uncontradicted(rows, prompt)) for prompt in "pq")
    assert diagnosed(rows).findings[CYCLE].count == expected


def test_the_slow_search_finds_cycles_in_some_of_the_random_data() -> None:
    cyclic = 0
    for seed in SEEDS:
        draw = random.Random(seed)
        rows = [
            Preference(turns(draw.choice("pq")), tuple(draw.sample("ABCDE", 2))) for _ in range(draw.randint(3, 14))
        ]
        cyclic += any(has_cycle(uncontradicted(rows, prompt)) for prompt in "pq")
    assert 3 <= cyclic <= len(SEEDS) - 3


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_left_after_the_drops_has_nothing_left_to_drop(seed: int) -> None:
    rows = random_preferences(seed)
    drops = diagnosed(rows).drops
    left = diagnosed([row for number, row in enumerate(rows, start=1) if number not in drops])
    assert not left.findings.counts("error", "warning").keys() & {CONTRADICTION.name, CYCLE.name, DUPLICATE_ROW.name}
    assert not left.drops


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_the_rows_does_not_change_the_counts(seed: int) -> None:
    rows: list[Row] = [*random_preferences(seed), *(Prompt(turns(text)) for text in random_prompts(seed))]
    before = diagnosed(rows, held_out=0.4)
    random.Random(seed).shuffle(rows)
    after = diagnosed(rows, held_out=0.4)
    assert after.findings.counts() == before.findings.counts()
    assert after.figures == before.figures
    assert after.scripts == before.scripts
    assert after.held_out == before.held_out


@pytest.mark.parametrize("seed", range(100))
def test_cycles_share_no_pair_and_leave_none_behind(seed: int) -> None:
    draw = random.Random(seed)
    everyone = [(a, b) for a in range(9) for b in range(9) if a != b]
    pairs = draw.sample(everyone, draw.randint(0, len(everyone)))
    cycles = _cycles(pairs)
    in_cycles = [pair for cycle in cycles for pair in cycle]
    assert len(set(in_cycles)) == len(in_cycles)
    assert set(in_cycles) <= set(pairs)
    for cycle in cycles:
        assert all(worse == better for (_, worse), (better, _) in pairwise([*cycle, cycle[0]]))
        assert len({better for better, _ in cycle}) == len(cycle)
    rest: TopologicalSorter[int] = TopologicalSorter()
    for better, worse in set(pairs) - set(in_cycles):
        rest.add(worse, better)
    rest.prepare()


def test_thousands_of_cycles_of_one_prompt_are_found_each() -> None:
    names = [(f"a{n}", f"b{n}", f"c{n}") for n in range(4000)]
    rows = [Preference(turns("q"), pair) for a, b, c in names for pair in ((a, b), (b, c), (c, a))]
    diagnosis = diagnosed(rows)
    assert len(diagnosis.drops) == 12_000
    assert diagnosis.findings[CYCLE].count == 1, "prompts are counted"
    assert diagnosis.findings[CYCLE].examples == [("a.jsonl:1, a.jsonl:2 and a.jsonl:3", "")]


def test_the_shortest_cycle_of_a_prompt_is_its_example() -> None:
    ring = [*(f"r{n}" for n in range(40)), "r0"]
    rows = [Preference(turns("q"), pair) for pair in [*pairwise(ring), ("A", "B"), ("B", "C"), ("C", "A")]]
    [(where, _)] = diagnosed(rows).findings[CYCLE].examples
    assert where == "a.jsonl:41, a.jsonl:42 and a.jsonl:43"


def test_a_long_ranking_counts_as_its_neighbours_and_still_shows_what_contradicts_it() -> None:
    ranking = tuple(f"response {n:04}" for n in range(3000))
    neighbours = Preference(turns("q"), ranking[8:6:-1])
    diagnosis = diagnosed([Preference(turns("q"), ranking), neighbours])
    assert diagnosis.findings[CONTRADICTION].examples == [("a.jsonl:1 and a.jsonl:2", "")]
    apart = Preference(turns("q"), (ranking[2000], ranking[0]))
    assert sorted(diagnosed([Preference(turns("q"), ranking), apart]).drops) == [1, 2]
    assert not diagnosed([Preference(turns("q"), ranking), Preference(turns("q"), ranking[::1000])]).drops


@pytest.mark.parametrize(("responses", "pairs"), [(8, 28), (9, 8)])
def test_a_ranking_has_all_pairs_up_to_eight_responses_and_then_those_of_neighbours(responses: int, pairs: int) -> None:
    row = Preference(turns("q"), tuple("x" * n for n in range(1, responses + 1)))
    mean = sum(i - j for i, j in combinations(range(responses), 2)) / 28 if responses == 8 else -1.0
    assert diagnosed([row]).figures["chosen_longer_mean"] == pytest.approx(mean)
    high = diagnosed([row]).figures["longer_wins_high"]
    assert high == pytest.approx(1.96**2 / (pairs + 1.96**2), rel=1e-3), "Wilson's bound of none in so many"


@pytest.mark.parametrize("seed", SEEDS)
def test_contradictory_thumbs_are_those_of_a_slow_count(seed: int) -> None:
    draw = random.Random(seed)
    rows = [Rated(turns(draw.choice("pq")), draw.choice(("A", "A ", "B", "C")), draw.random() < 0.7) for _ in range(8)]
    said = {(row.prompt[0].content, row.response.strip(), row.good) for row in rows}
    both = {(prompt, response) for prompt, response, good in said if (prompt, response, not good) in said}
    expected = {n for n, row in enumerate(rows, 1) if (row.prompt[0].content, row.response.strip()) in both}
    diagnosis = diagnosed(rows)
    assert diagnosis.findings[CONTRADICTION].count == len(both)
    dropped = {number for number, drop in diagnosis.drops.items() if drop.kind is CONTRADICTION}
    assert dropped <= expected <= set(diagnosis.drops)
    left = [row for number, row in enumerate(rows, 1) if number not in diagnosis.drops]
    assert not diagnosed(left).drops


def random_prompts(seed: int) -> list[str]:
    """Prompts of few different words, so that they share runs; some differ in case and punctuation only."""
    draw = random.Random(seed)
    prompts: list[str] = []
    for _ in range(draw.randint(5, 25)):
        if prompts and draw.random() < 0.3:
            again = draw.choice(prompts)
            prompts.append(draw.choice([again.upper(), again + "!", again.replace(" ", ", "), again]))
        else:
            phrase = [f"word{draw.randint(0, 1)}" for _ in range(draw.randint(1, 22))]
            prompts.append(" ".join(phrase))
    return prompts


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def runs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[at : at + 13]) for at in range(len(found) - 12)}


def slow_leaks(trained: Sequence[str], kept: Sequence[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for prompt in trained:
        if any(" ".join(prompt.split()) == " ".join(other.split()) for other in kept):
            counts[LEAK_EXACT.name] += 1
        elif any("".join(words(prompt)) == "".join(words(other)) for other in kept):
            counts[LEAK_NORMALISED.name] += 1
        elif any(runs(prompt) & runs(other) for other in kept):
            counts[LEAK_NGRAMS.name] += 1
    return counts


@pytest.mark.parametrize("seed", SEEDS)
def test_leaks_between_the_sides_are_those_of_a_slow_count(seed: int) -> None:
    prompts = random_prompts(seed)
    sides = {True: [], False: []}  # type: dict[bool, list[str]]
    for prompt in prompts:
        sides[bucket(turns(prompt)) < 0.4].append(prompt)
    found = diagnosed([Prompt(turns(prompt)) for prompt in prompts], held_out=0.4).findings
    counts = {kind.name: found[kind].count for kind in (LEAK_EXACT, LEAK_NORMALISED, LEAK_NGRAMS)}
    assert Counter(counts) == slow_leaks(sides[False], sides[True])


@pytest.mark.parametrize("seed", SEEDS)
def test_leaks_into_other_data_are_those_of_a_slow_count(seed: int) -> None:
    prompts, suite = random_prompts(seed), random_prompts(seed + 1)[:6]
    examination = Examination(held_out=0.0)
    others = [
        Reading(f"s.jsonl:{number}", number, "prompt", row=Prompt(turns(text))) for number, text in enumerate(suite, 1)
    ]
    examination.against(others, "suite")
    for number, prompt in enumerate(prompts, start=1):
        examination.see(Reading(f"a.jsonl:{number}", number, "prompt", row=Prompt(turns(prompt))))
    found = examination.diagnose().findings
    counts = {kind.name: found[kind].count for kind in (LEAK_EXACT, LEAK_NORMALISED, LEAK_NGRAMS)}
    assert Counter(counts) == slow_leaks(prompts, suite)


def test_runs_are_found_again_in_every_piece_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.doctor.overlap.RUNS_AT_ONCE", 7)
    draw = random.Random(0)
    texts = [" ".join(str(draw.randint(0, 10**9)) for _ in range(20)) for _ in range(60)]
    overlap = Overlap()
    for place, text in enumerate(texts):
        overlap.add(Prompt(turns(text)), place, kept=False)
    for place, text in enumerate(texts[::3], start=len(texts)):
        overlap.add(Prompt(turns("so " + text)), place, kept=True)
    expected = [(3 * at, len(texts) + at) for at in range(len(texts[::3]))]
    assert [(leak.trained, leak.kept) for leak in overlap.leaks()] == expected


def random_chat(draw: random.Random) -> Conversation:
    """Turns of few different contents, some of them in other case or under a system prompt."""
    spoken = [Message("user", draw.choice("abc")), Message("assistant", draw.choice("xy"))]
    for _ in range(draw.randint(0, 2)):
        spoken += [Message("user", draw.choice(("a", "A", " b", "d"))), Message("assistant", draw.choice("xy"))]
    system = [Message("system", draw.choice("st"))] if draw.random() < 0.3 else []
    return Conversation((*system, *spoken))


def asked(row: Conversation | Prompt) -> list[list[tuple[str, str]]]:
    """Every prompt in a row: the turns before each of the assistant's, or all of a prompt."""
    messages = row.messages if isinstance(row, Conversation) else (*row.prompt, Message("assistant", ""))
    spoken = [(each.role, each.content.strip()) for each in messages if each.role != "system"]
    return [spoken[:at] for at, (role, _) in enumerate(spoken) if role == "assistant"]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_prompt_of_a_conversation_leaks_as_in_a_slow_count(seed: int) -> None:
    draw = random.Random(seed)
    chats = [random_chat(draw) for _ in range(8)]
    suite: list[Conversation | Prompt] = [random_chat(draw), Prompt(turns(draw.choice("abcd")))]
    examination = Examination(held_out=0.0)
    for number, chat in enumerate(chats, start=1):
        examination.see(Reading(f"a.jsonl:{number}", number, "messages", row=chat))
    others = [Reading(f"s.jsonl:{number}", number, "prompt", row=row) for number, row in enumerate(suite, 1)]
    examination.against(others, "suite")
    found = examination.diagnose().findings
    kept = [prompt for row in suite for prompt in asked(row)]
    exact = {number for number, chat in enumerate(chats) if any(prompt in kept for prompt in asked(chat))}
    spoken = {"".join(text.lower() for _, text in prompt) for prompt in kept}
    alike = {
        number
        for number, chat in enumerate(chats)
        if any("".join(text.lower() for _, text in prompt) in spoken for prompt in asked(chat))
    }
    assert (found[LEAK_EXACT].count, found[LEAK_NORMALISED].count) == (len(exact), len(alike - exact))


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason=f"no {FULL} on this system")
def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.doctor.overlap.tempfile.TemporaryFile", partial(FULL.open, "w+b"))
    rows = [Prompt(turns(" ".join(f"word{n}" for n in range(20))))]
    with pytest.raises(StorageError, match="No space left on device"):
        diagnosed(rows * 2, held_out=1.0)


def test_documents_are_compared_as_a_whole_only() -> None:
    document = " ".join(f"word{n}" for n in range(20))
    examination = Examination(held_out=0.0)
    suite = [Reading("s.jsonl:1", 1, "prompt", row=Prompt(turns(document.upper())))]
    examination.against(suite, "suite")
    for number, text in enumerate([document, "so " + document], start=1):
        examination.see(Reading(f"a.jsonl:{number}", number, "text", row=Text(text)))
    assert examination.diagnose().findings.counts() == {LEAK_NORMALISED.name: 1}


class Characters:
    """A tokenizer whose tokens are characters in lower case; 1 begins a turn, 0 ends it."""

    def encode(self, messages: Sequence[Message]) -> Any:
        tokens: list[int] = []
        trained: list[bool] = []
        for message in messages:
            content = self.response(message.content)
            tokens += [1, *content]
            trained += [False] + [message.role == "assistant" and message.content != "-"] * len(content)
        return SimpleNamespace(tokens=tokens, trained=trained)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return [*self.encode(messages).tokens, 1]

    def response(self, content: str) -> list[int]:
        return [*map(ord, content.lower()), 0]


def slow_fate(row: Row, max_length: int) -> str | None:
    """What training does with a row, by its own code."""
    encoder: Any = Characters()
    if isinstance(row, Conversation):
        tree = conversation_tree(encoder, row, 0, max_length)
    else:
        assert isinstance(row, Preference)
        tree = preference_tree(encoder, row, 0, max_length)
    if isinstance(tree, str):
        return tree
    return PROMPT_CUT.name if tree.cut else None


def random_rows(seed: int) -> list[Row]:
    draw = random.Random(seed)

    def text() -> str:
        return "".join(draw.choices("abAB", k=draw.randint(1, 6)))

    rows: list[Row] = []
    for _ in range(40):
        if draw.random() < 0.3:
            answer = Message("assistant", "-" if draw.random() < 0.2 else text())
            rows.append(Conversation((*turns(text()), answer)))
        else:
            rows.append(Preference(turns(text()), tuple(text() for _ in range(draw.randint(2, 3)))))
    return rows


@pytest.mark.parametrize("max_length", [3, 6, 9, 12, 30])
@pytest.mark.parametrize("seed", range(6))
def test_what_is_left_out_for_its_length_is_what_training_leaves_out(seed: int, max_length: int) -> None:
    rows = random_rows(seed)
    expected = Counter(filter(None, (slow_fate(row, max_length) for row in rows)))
    found = diagnosed(rows, encoder=Characters(), max_length=max_length).findings
    counts = {kind.name: found[kind].count for kind in (TOO_LONG, EQUAL_TOKENS, NOTHING_TRAINED, PROMPT_CUT)}
    # A pair that differs only past max_length is also one that is too long.
    counts[TOO_LONG.name] += found[EQUAL_WITHIN_LENGTH].count
    assert Counter(counts) == expected


def test_pairs_that_differ_only_past_the_limit_are_named() -> None:
    same = Preference(turns("q"), ("aaaaaaaaab", "aaaaaaaaac"))
    other = Preference(turns("q"), ("baaaaaaaab", "aaaaaaaaac"))
    diagnosis = diagnosed([same, other], encoder=Characters(), max_length=8)
    assert diagnosis.findings[EQUAL_WITHIN_LENGTH].examples == [("a.jsonl:1", "")]
    assert diagnosis.findings[TOO_LONG].examples == [("a.jsonl:2", "")]
    assert sorted(diagnosis.drops) == [1, 2]


class Choosy(Characters):
    """Refuses what begins with `no`."""

    def encode(self, messages: Sequence[Message]) -> Any:
        if messages[0].content == "no":
            raise ArtifactError("the chat template refuses the turns", hint="another")
        return super().encode(messages)


def test_rows_that_the_chat_template_refuses_are_named_and_left_out() -> None:
    rows = [Conversation((*turns(text), Message("assistant", "a"))) for text in ("yes", "no", "so")]
    diagnosis = diagnosed([*rows, Preference(turns("no"), ("a", "b"))], encoder=Choosy(), max_length=64)
    refusals = [(f"a.jsonl:{line}", "the chat template refuses the turns") for line in (2, 4)]
    assert diagnosis.findings[TEMPLATE_REFUSES].examples == refusals
    assert sorted(diagnosis.drops) == [2, 4]
    assert diagnosis.failed
    assert diagnosis.record()["lengths"]["whole"]["100%"] == len("yes") + len("a") + 4


def test_rows_are_measured_as_the_kind_that_a_stage_reads() -> None:
    row = Preference(turns("ask"), ("a", "b" * 50))
    rated = Rated(turns("ask"), "b" * 50, good=False)
    whole = diagnosed([row], encoder=Characters(), max_length=20)
    assert whole.findings[TOO_LONG].count == 1
    chosen = diagnosed([row, rated], encoder=Characters(), max_length=20, kinds=("conversation",))
    assert not chosen.findings.counts("error", "dropped", "warning")
    assert chosen.record()["lengths"]["response"]["100%"] == 2, "a bad response is not imitated"
    asked_only = diagnosed([row, rated], encoder=Characters(), max_length=5, kinds=("prompt",))
    assert asked_only.findings[PROMPT_CUT].count == 2
    assert asked_only.lengths.keys() == {"prompt", "whole"}


@pytest.mark.parametrize("seed", range(10))
def test_quantiles_and_the_suggested_length_are_those_of_sorted_lengths(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(1, 400) for _ in range(draw.randint(1, 900))]
    rows = [Conversation((*turns("q"), Message("assistant", "a" * size))) for size in sizes]
    diagnosis = diagnosed(rows, encoder=Characters(), max_length=200)
    whole = sorted(size + 5 for size in sizes)
    for name, value in diagnosis.lengths["whole"].items():
        share = float(name.rstrip("%")) / 100
        assert sum(length <= value for length in whole) >= share * len(whole)
        assert sum(length < value for length in whole) < share * len(whole)
    suggested = int(diagnosis.figures["suggested_max_length"])
    assert suggested % 64 == 0
    assert sum(length <= suggested for length in whole) >= 0.995 * len(whole)
    assert suggested == 64 or sum(length <= suggested - 64 for length in whole) < 0.995 * len(whole)
    assert diagnosis.figures["over_long_share"] == pytest.approx(np.mean([length > 200 for length in whole]))


def test_a_length_bias_is_what_counting_gives() -> None:
    rows = [Preference(turns(f"q{n}"), ("a" * n, "b" * (10 - n))) for n in range(1, 10)]
    figures = diagnosed([*rows, Preference(turns("x"), ("aaa", "b"))]).figures
    assert figures["chosen_longer_mean"] == pytest.approx(0.2)
    assert figures["chosen_longer_median"] == 1.0
    assert figures["longer_wins"] == pytest.approx((4 + 1 + 0.5) / 10)
    assert figures["longer_wins_low"] < 0.55 < figures["longer_wins_high"]


@pytest.mark.parametrize("seed", range(50))
def test_the_main_script_is_that_of_most_letters(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choices("ab\u00e91 .\u0431\u0432\u4f60\u597d\u3042\u03b1", k=draw.randint(0, 12)))
    names = {"CJK": "Han"}
    letters = [unicodedata.name(each).split()[0] for each in text if each.isalpha()]
    counts = Counter(names.get(name, name.capitalize()) for name in letters)
    script = main_script(text)
    assert counts[script] == max(counts.values()) if counts else script == "none"


@pytest.mark.parametrize(
    "origin", ["a.jsonl:7", "a.parquet:row 12", "no number", "7", "a:07", "a:0", "a:" + "9" * 30, "", "dir\n1/a.csv:2"]
)
def test_a_place_comes_out_as_it_went_in(origin: str) -> None:
    places = Places()
    places.add("other:1", 1)
    assert places[places.add(origin, 2)] == origin
