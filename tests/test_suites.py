"""Evaluation suites: their files, their rows, their numbers against slow oracles, and the embedded world's own."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch

from data import suite_rows, world_suites
from data.intake import refuse_repeats
from data.ngrams import words
from data.read import fingerprint
from data.schema import Message, Preference, Prompt
from data.split import is_held_out
from data.suite_rows import Item
from data.world import COURTESIES, NAMES, generate, gold_reward
from pipeline import gate, loader
from pipeline.config import DataSource, EvaluateSettings
from pipeline.contract import Artifact
from pipeline.errors import ConfigError, DataError
from pipeline.manifest import Metric
from pipeline.suites import METHODS, Suite
from reward import calibration
from reward.diversity import dissimilarity, distinct
from reward.intervals import mean_interval, paired_difference, proportion_difference, proportion_interval
from stages.core.lineup import Contestant
from stages.core.roles import REFERENCE
from stages.core.suite_scores import Observation, Part, Scores, longer_wins, observations, scorer
from stages.core.suites import _Ledger

OWN = sorted(path.stem for path in (loader.recipes() / "suites").glob("*.yaml"))
OF_WORLD = [name for name in OWN if name not in ("gsm8k", "ifeval")]
SETTINGS: Any = SimpleNamespace(max_length=200, batch_tokens=8192)


def write_suite(folder: Path, name: str = "mine", rows: list[dict[str, Any]] | None = None, **settings: Any) -> Path:
    """A suite of the given settings, and its rows beside it; returns the suite's file."""
    given = {"kind": "suite", "measures": "All.", "source": f"{name}.jsonl", "method": "generation", "gold": "exact"}
    values = {key: value for key, value in {**given, **settings}.items() if value is not None}
    folder.joinpath(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or []))
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    return path


def items_of(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> tuple[Suite, list[Item]]:
    """A suite and its rows, read from files."""
    _, suite = loader.suite(str(write_suite(folder, rows=rows, **settings)))
    return suite, list(suite_rows.read(suite).chosen)


def refusal(path: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        loader.suite(str(path))
    return str(caught.value)


@pytest.fixture(scope="module")
def contestant() -> Contestant:
    """A tiny model with random weights."""
    return Contestant("tiny", Artifact(Path(), "model", "tiny"), models.roles(), REFERENCE, None)


# Figures


def entered(suite: Suite, own: Scores, parent: Scores) -> tuple[_Ledger, dict[str, Metric]]:
    """The ledger of a suite after a model and its parent, and the model's figures."""
    observed = [Observation(str(place), "", (place,)) for place in own.numbers]
    ledger = _Ledger("mine", suite, [], observed, None)
    ledger.enter("sft", None, parent)
    return ledger, ledger.enter("dpo", "sft", own)


def test_a_gain_in_yes_and_no_has_a_score_interval_and_its_pairs_are_kept(tmp_path: Path) -> None:
    suite = loader.suite(str(write_suite(tmp_path)))[1]
    ledger, found = entered(suite, Scores({0: 1.0, 1: 1.0, 3: 0.0}), Scores({0: 0.0, 1: 0.0, 2: 1.0}))
    assert found["suite.mine_gain"] == proportion_difference([1.0, 1.0], [0.0, 0.0])
    (check,) = gate.check({"dpo": {"suite.mine": "> parent"}}, {f"dpo.{name}": each for name, each in found.items()})
    assert not check.holds
    assert ledger.pairs["dpo"] == {"suite.mine": ([1.0, 1.0], [0.0, 0.0])}


def test_a_gain_in_means_has_the_bootstrap_s_interval_and_no_pairs_to_test(tmp_path: Path) -> None:
    suite = loader.suite(str(write_suite(tmp_path, samples=2, temperature=1)))[1]
    ledger, found = entered(suite, Scores({0: 1.0, 1: 0.5, 2: 0.5}), Scores({0: 0.5, 1: 0.0, 2: 0.5}))
    assert found["suite.mine_gain"] == paired_difference([1.0, 0.5, 0.5], [0.5, 0.0, 0.5])
    assert ledger.pairs["dpo"] == {}


def test_every_category_has_a_gain_over_its_own_rows(tmp_path: Path) -> None:
    suite = loader.suite(str(write_suite(tmp_path)))[1]
    observed = [Observation(str(place), "even" if place % 2 == 0 else "odd", (place,)) for place in range(6)]
    ledger = _Ledger("mine", suite, [], observed, None)
    ledger.enter("sft", None, Scores(dict.fromkeys(range(6), 0.0) | {1: 1.0}))
    found = ledger.enter("dpo", "sft", Scores({0: 1.0, 2: 1.0, 3: 0.0, 4: 0.0, 5: 1.0}))
    assert found["suite.mine.even_gain"] == proportion_difference([1.0, 1.0, 0.0], [0.0] * 3)
    assert found["suite.mine.odd_gain"] == proportion_difference([0.0, 1.0], [0.0, 0.0])
    assert ledger.pairs["dpo"].keys() == {"suite.mine", "suite.mine.even", "suite.mine.odd"}
    assert ledger.pairs["dpo"]["suite.mine.odd"] == ([0.0, 1.0], [0.0, 0.0])


def test_categories_of_documents_have_a_gain_that_is_weighted_as_their_figure(tmp_path: Path) -> None:
    suite = loader.suite(str(write_suite(tmp_path, method="likelihood", gold=None)))[1]
    observed = [Observation(str(place), "ab"[place % 2], (place,)) for place in range(4)]
    ledger = _Ledger("mine", suite, [], observed, None)
    weights = {0: 10.0, 1: 1.0, 2: 30.0, 3: 1.0}
    ledger.enter("sft", None, Scores({0: 2.0, 1: 1.0, 2: 1.0, 3: 1.0}, weights=weights))
    found = ledger.enter("dpo", "sft", Scores({0: 1.0, 1: 1.0, 2: 0.5, 3: 1.0}, weights=weights))
    assert found["suite.mine.a_gain"].value == pytest.approx((10 * -1.0 + 30 * -0.5) / 40)
    assert ledger.pairs["dpo"] == {}
    assert [line["weight"] for line in ledger.lines()] == [10.0, 1.0, 30.0, 1.0]


def test_single_responses_at_several_temperatures_have_a_proportion_at_each(tmp_path: Path) -> None:
    own = Scores({0: 0.5, 1: 0.0}, {"at 0.5": Part({0: 1.0, 1: 0.0}, True), "at 1": Part({0: 0.0, 1: 0.0}, True)})
    suite = loader.suite(str(write_suite(tmp_path, temperature=[0.5, 1])))[1]
    found = entered(suite, own, own)[1]
    assert found["suite.mine"] == mean_interval([0.5, 0.0])
    assert found["suite.mine.at 0.5"] == proportion_interval(1, 2)
    assert found["suite.mine.at 1"] == proportion_interval(0, 2)
    assert found["suite.mine.at 1_gain"] == proportion_difference([0.0, 0.0], [0.0, 0.0])
    means = Scores(own.numbers, {"at 1": Part({0: 0.0, 1: 0.0}, False)})
    assert entered(suite, means, means)[1]["suite.mine.at 1"] == mean_interval([0.0, 0.0])


# Files


def test_paths_are_relative_to_the_suite_and_name_environment_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, suite = loader.suite(str(write_suite(tmp_path)))
    assert (name, suite.source) == ("mine", str(tmp_path / "mine.jsonl"))
    path = write_suite(tmp_path, source="${WHERE}/rows.jsonl")
    monkeypatch.setenv("WHERE", "/somewhere")
    assert loader.suite(str(path))[1].source == "/somewhere/rows.jsonl"
    monkeypatch.delenv("WHERE")
    assert refusal(path).startswith(f"{path}:3: source: the environment variable `WHERE` is not set")


@pytest.mark.parametrize(
    ("settings", "line", "said"),
    [
        ({"metod": "choice"}, 6, "metod: unknown setting; did you mean `method`?"),
        ({"method": "generations"}, 4, "method: unknown method `generations`; did you mean `generation`?"),
        (
            {"gold": "exactly"},
            5,
            "gold: input should be 'none', 'world', 'exact', 'numeric' or 'instructions', not 'exactly'",
        ),
        ({"normalised": True}, 6, "normalised: unknown setting"),
        ({"temperature": 0.001}, 6, "temperature: should be 0, which takes the likeliest token, or at least 0.01"),
        ({"kind": "set"}, 1, "kind: input should be 'suite', not 'set'"),
        ({"rules": [{"rule": "patern"}], "gold": None}, 5, "unknown rule `patern`; did you mean `pattern`?"),
        ({"held_out": 2}, 6, "held_out: input should be less than or equal to 1"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, settings: dict[str, Any], line: int, said: str) -> None:
    path = write_suite(tmp_path, **settings)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    assert said in message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": None}, "method: missing (known: choice, "),
        ({"gold": None}, "give either `gold`, a rule that knows what is correct, or `rules`"),
        ({"rules": [{"rule": "length", "words": 3}]}, "give either `gold`"),
        ({"samples": 3}, "samples=3 are all the same at temperature 0"),
        ({"temperature": [1, 1]}, "a temperature is named twice"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    assert said in refusal(write_suite(tmp_path, **settings))


def test_names_are_those_of_files_and_unknown_ones_get_a_suggestion(tmp_path: Path) -> None:
    assert "no suite `refusals`; did you mean `refusal`?" in refusal("refusals")
    assert "rename the file" in refusal(write_suite(tmp_path, "my_suite"))
    assert "cannot read the suite" in refusal(tmp_path / "none.yaml")


def test_suites_of_one_stage_have_different_names_and_a_reward_model_where_they_need_one(tmp_path: Path) -> None:
    stage: dict[str, Any] = {"models": ["sft"], "prompts": "prompts"}
    path = str(write_suite(tmp_path))
    assert list(loader.suites(EvaluateSettings(**stage, suites=[path, "letters"]))) == ["suites.mine", "suites.letters"]
    with pytest.raises(ConfigError, match="two suites are called `mine`"):
        loader.suites(EvaluateSettings(**stage, suites=[path, path]))
    with pytest.raises(ConfigError, match="`comparisons` measures a reward model: give `reward`"):
        loader.suites(EvaluateSettings(**stage, suites=["comparisons"]))
    assert loader.suites(EvaluateSettings(**stage, suites=["comparisons"], reward="reward"))


# Rows


def test_rows_have_an_id_a_category_and_a_group(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "prompt": "a", "answer": "b", "category": "letters"},
        {"prompt": "c", "answer": "d", "subset": "more", "group": "g"},
        {"prompt": "e", "answer": "f"},
    ]
    _, items = items_of(tmp_path, rows)
    assert [(each.id, each.category, each.group) for each in items[:2]] == [
        ("7", "letters", ""),
        (items[1].id, "more", "g"),
    ]
    assert (items[2].category, len(items[2].id)) == ("", 12)


def test_an_id_made_from_the_row_does_not_depend_on_where_the_row_stands(tmp_path: Path) -> None:
    rows = [{"prompt": each, "answer": "x"} for each in "abc"]
    _, items = items_of(tmp_path, rows)
    _, turned = items_of(tmp_path, rows[::-1])
    assert [each.id for each in turned] == [each.id for each in items][::-1]


def test_the_same_row_twice_is_one_observation_and_the_same_id_twice_an_error(tmp_path: Path) -> None:
    row = {"prompt": "a", "answer": "b"}
    _, items = items_of(tmp_path, [row, {**row, "id": "again"}, {**row, "answer": "c"}])
    assert len(items) == 2
    with pytest.raises(DataError, match="id: '1' stands before, at ") as caught:
        items_of(tmp_path, [{**row, "id": 1}, {"id": "1", "prompt": "c", "answer": "d"}])
    assert caught.value.where == f"{tmp_path}/mine.jsonl:2"


def test_malformed_rows_are_refused_with_their_line(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "answer": "b"}, {"prompt": None, "answer": "b"}]
    with pytest.raises(DataError, match="prompt: null") as caught:
        items_of(tmp_path, rows)
    assert caught.value.where == f"{tmp_path}/mine.jsonl:2"
    with pytest.raises(DataError, match=r"answer: 2 \(expected one of the choices, or its place from 0 to 1\)"):
        items_of(tmp_path, [{"prompt": "a", "choices": ["b", "c"], "answer": 2}], method="choice", gold=None)


@pytest.mark.parametrize(
    ("column", "value"),
    [*((each, "a \ud800") for each in ("id", "category", "subset", "group", "other")), ("group", ["a \ud800"])],
)
def test_half_a_character_beside_a_row_is_refused_with_its_line_or_left_out(
    tmp_path: Path, column: str, value: object
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": each, "answer": "x"} for each in "ab"]
    rows[1][column] = value
    with pytest.raises(DataError, match="lone surrogate") as caught:
        items_of(tmp_path, rows)
    assert caught.value.where == f"{tmp_path}/mine.jsonl:2"
    assert len(items_of(tmp_path, rows, on_bad_row="skip")[1]) == 1


def test_invariance_needs_groups(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "b", "group": "g"}, {"prompt": "c", "answer": "d"}]
    with pytest.raises(DataError, match="no `group`, which method=invariance needs") as caught:
        items_of(tmp_path, rows, method="invariance")
    assert caught.value.where == f"{tmp_path}/mine.jsonl:2"


@pytest.mark.parametrize("category", ["weight_gain", "aspect_ratio"])
def test_a_category_that_is_called_like_a_comparison_is_refused_with_its_line(tmp_path: Path, category: str) -> None:
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d", "category": category}]
    with pytest.raises(DataError, match=f"'{category}' ends as the names of comparisons with a parent do") as caught:
        items_of(tmp_path, rows)
    assert caught.value.where == f"{tmp_path}/mine.jsonl:2"


def test_a_changed_file_of_rows_has_another_digest(tmp_path: Path) -> None:
    suite, _ = items_of(tmp_path, [{"prompt": "a", "answer": "b"}])
    before = fingerprint(suite, {})
    items_of(tmp_path, [{"prompt": "a", "answer": "c"}])
    assert fingerprint(suite, {}) != before


# Numbers


def test_choices_are_the_likeliest_answers_of_a_loop_over_them(tmp_path: Path, contestant: Contestant) -> None:
    chance = random.Random(0)
    known = ["Ada", "lives", "in", "Oslo", "plus", "It", "is", "four"]
    rows = [
        {"prompt": f"Question {number}?", "answer": 0}
        | {"choices": [" ".join(chance.sample(known, each + 1)) for each in chance.sample(range(6), 3)]}
        for number in range(12)
    ]
    model, template = contestant.roles.base.model, contestant.roles.base.template

    @torch.no_grad()
    def likelihoods(row: Any) -> Iterator[tuple[float, int]]:
        for text in row.responses:
            before, after = list(template.prompt(row.prompt)), list(template.response(text))
            logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
            yield (
                sum(float(logits[len(before) - 1 + place, token]) for place, token in enumerate(after)),
                len(after),
            )

    for normalised in (False, True):
        suite, items = items_of(tmp_path, rows, method="choice", gold=None, normalised=normalised)
        found = scorer(suite, items, SETTINGS, 0)(contestant)
        for place, item in enumerate(items):
            first, *others = [each / (count if normalised else 1) for each, count in likelihoods(item.row)]
            assert found.numbers[place] == float(first > max(others))
        assert set(found.numbers.values()) == {0.0, 1.0}


def test_documents_cost_what_a_loop_over_their_tokens_says(tmp_path: Path, contestant: Contestant) -> None:
    rows = [{"text": "Where does Ada live?"}, {"text": "It is 4, not fünf."}, {"text": "x" * 2000}]
    suite, items = items_of(tmp_path, rows, method="likelihood", gold=None)
    found = scorer(suite, items, SETTINGS, 0)(contestant)
    assert found.numbers.keys() == {0, 1}  # the third is longer than the model's positions
    losses, predicted = [], 0
    for place in found.numbers:
        text = rows[place]["text"]
        tokens = models.tokenizer()(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = contestant.roles.base.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        nats = -sum(float(logits[at, token]) for at, token in enumerate(tokens[1:]))
        assert found.numbers[place] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
        assert found.weights[place] == len(text.encode())
        losses.append(nats)
        predicted += len(tokens) - 1
    assert found.further["_perplexity"].value == pytest.approx(math.exp(sum(losses) / predicted), rel=1e-5)


def test_responses_at_temperature_0_are_the_same_with_any_seed(tmp_path: Path, contestant: Contestant) -> None:
    rows = [{"prompt": f"Question {each}?", "answer": "x"} for each in range(4)]
    suite, items = items_of(tmp_path, rows, max_new_tokens=8)
    first, second = (scorer(suite, items, SETTINGS, seed)(contestant) for seed in (0, 1))
    assert first == second
    assert first.tokens > 0
    warm, items = items_of(tmp_path, rows, max_new_tokens=8, temperature=1)
    first, second = (scorer(warm, items, SETTINGS, seed)(contestant) for seed in (0, 1))
    assert first.responses != second.responses


def test_a_row_s_number_is_the_mean_of_all_its_responses(tmp_path: Path, contestant: Contestant) -> None:
    rows = [{"prompt": f"Question {each}?"} for each in range(3)]
    rules = [{"rule": "pattern", "expression": "[aeiou]", "weight": 3}, {"rule": "length", "words": 2, "weight": -1}]
    suite, items = items_of(tmp_path, rows, gold=None, rules=rules, temperature=[0.5, 2], samples=4, max_new_tokens=6)
    found = scorer(suite, items, SETTINGS, 0)(contestant)
    assert list(found.parts) == ["at 0.5", "at 2"]
    for place in range(3):
        assert len(found.responses[place]) == 8
        given = [_by_hand(text) for text in found.responses[place]]
        assert found.parts["at 0.5"].numbers[place] == pytest.approx(sum(given[:4]) / 4)
        assert found.parts["at 2"].numbers[place] == pytest.approx(sum(given[4:]) / 4)
        assert found.numbers[place] == pytest.approx(sum(given) / 8)


def _by_hand(text: str) -> float:
    vowels = any(each in "aeiou" for each in text)
    return 3 * vowels - min(1.0, max(0.0, 2 - len(words(text)) / 2))


def test_a_group_agrees_when_all_its_verdicts_do(tmp_path: Path, contestant: Contestant) -> None:
    prompts = [f"Question {each}?" for each in range(4)]
    suite, items = items_of(tmp_path, [{"prompt": each, "answer": "x"} for each in prompts], max_new_tokens=6)
    said = [texts[0] for texts in scorer(suite, items, SETTINGS, 0)(contestant).responses]
    right = dict(zip(prompts, said, strict=True))
    rows = [
        {"group": "both right", "prompt": prompts[0], "answer": right[prompts[0]]},
        {"group": "one right", "prompt": prompts[2], "answer": right[prompts[2]]},
        {"group": "both right", "prompt": prompts[1], "answer": right[prompts[1]]},
        {"group": "one right", "prompt": prompts[3], "answer": "never said"},
        {"group": "both wrong", "prompt": prompts[0], "answer": "never said"},
        {"group": "both wrong", "prompt": prompts[1], "answer": "never said"},
    ]
    suite, items = items_of(tmp_path, rows, method="invariance", max_new_tokens=6)
    found = scorer(suite, items, SETTINGS, 0)(contestant)
    names = [each.id for each in observations(suite, items)]
    assert {name: found.numbers[place] for place, name in enumerate(names)} == {
        "both right": 1.0,
        "one right": 0.0,
        "both wrong": 1.0,
    }
    assert found.responses[1] == [right[prompts[2]], right[prompts[3]]]


def test_diversity_is_that_of_a_prompt_s_own_responses(tmp_path: Path, contestant: Contestant) -> None:
    rows = [{"prompt": f"Question {each}?"} for each in range(3)]
    for measure, oracle in (("distinct", distinct), ("dissimilarity", dissimilarity)):
        suite, items = items_of(
            tmp_path, rows, method="diversity", gold=None, measure=measure, n=1, samples=3, max_new_tokens=6
        )
        found = scorer(suite, items, SETTINGS, 0)(contestant)
        assert [len(texts) for texts in found.responses] == [3, 3, 3]
        assert found.numbers == {place: oracle(texts, 1) for place, texts in enumerate(found.responses)}


def test_the_longer_response_wins_as_counted_by_hand() -> None:
    asked = (Message("user", "a"),)
    rows = [Preference(asked, each) for each in (("long", "no"), ("no", "long"), ("same", "mesa"), ("ab", "a", "abc"))]
    assert longer_wins([Item(row, str(n)) for n, row in enumerate(rows)]) == [1.0, 0.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("responses", "n", "expected"),
    [
        (["a b c", "a b d"], 1, (4 / 6, 0.5)),
        (["a b c", "a b d"], 2, (3 / 4, 1 - 1 / 3)),
        (["a b", "a b", "a b"], 2, (1 / 3, 0.0)),
        (["a", "b"], 2, (0.0, 0.0)),
        (["a b", "c"], 2, (1.0, 1.0)),
    ],
)
def test_diversity_as_counted_by_hand(responses: list[str], n: int, expected: tuple[float, float]) -> None:
    assert (distinct(responses, n), dissimilarity(responses, n)) == pytest.approx(expected)


def test_dissimilarity_is_symmetric_and_within_its_bounds() -> None:
    chance = random.Random(0)
    texts = [" ".join(chance.choices("abcd", k=chance.randint(0, 6))) for _ in range(12)]
    for pair in combinations(texts, 2):
        assert 0 <= dissimilarity(pair, 2) <= 1
        assert dissimilarity(pair, 2) == dissimilarity(pair[::-1], 2)


def test_calibration_is_that_of_a_loop_over_bins() -> None:
    margins = np.random.default_rng(0).normal(0.4, 2.0, 300)
    expected, points = 0.0, []
    for low in np.arange(10) / 20 + 0.5:
        sure = [1 / (1 + math.exp(-abs(margin))) for margin in margins]
        inside = [n for n, each in enumerate(sure) if low <= each < low + 0.05]
        if inside:
            confidence = sum(sure[n] for n in inside) / len(inside)
            accuracy = sum(margins[n] > 0 for n in inside) / len(inside)
            points.append((confidence, accuracy, len(inside)))
            expected += len(inside) / len(margins) * abs(accuracy - confidence)
    found = calibration.curve(margins)
    assert [(each.confidence, each.accuracy, each.n) for each in found] == [pytest.approx(each) for each in points]
    error = calibration.expected_error(margins)
    assert error.value == pytest.approx(expected)
    assert error.low is not None
    assert error.high is not None
    assert 0 <= error.low <= error.value <= error.high


@pytest.mark.slow
def test_a_model_that_is_as_sure_as_it_is_right_has_little_calibration_error() -> None:
    generator = np.random.default_rng(1)
    sizes = np.abs(generator.normal(0, 2, 20_000))
    right = generator.random(20_000) < 1 / (1 + np.exp(-sizes))
    honest = np.where(right, sizes, -sizes)
    assert calibration.expected_error(honest).value < 0.02
    assert calibration.expected_error(4 * honest).value > 0.1
    assert calibration.curve([900.0, -900.0, 0.0])[-1].n == 2


# The embedded world


@pytest.mark.parametrize("part", world_suites.PARTS)
def test_a_part_is_the_same_for_a_seed_and_its_rows_are_all_different(part: str) -> None:
    rows = world_suites.generate(part, 3)
    world_suites.generate.cache_clear()
    assert world_suites.generate(part, 3) == rows
    assert [row["prompt"] for row in world_suites.generate(part, 4)] != [row["prompt"] for row in rows]
    said = [json.dumps({name: value for name, value in row.items() if name != "id"}) for row in rows]
    assert len(set(said)) == len(said) >= 24


@pytest.mark.parametrize("name", OF_WORLD)
def test_each_suite_of_the_world_has_rows_enough_and_is_measured_by_the_quickstart(name: str) -> None:
    assert len(suite_rows.read(loader.suite(name)[1]).chosen) >= 20
    assert f"suites.{name}" in loader.suites(loader.load(loader.recipes() / "quickstart.yaml").stages["evaluate"])


@pytest.mark.parametrize("of_text", [True, False])
def test_the_quickstart_trains_on_no_row_of_a_suite(of_text: bool) -> None:
    suites = [suite for _, suite in map(loader.suite, OF_WORLD) if (suite.KINDS == ("text",)) == of_text]
    settings = loader.load(loader.recipes() / "quickstart.yaml")
    kinds = ["corpus"] if of_text else ["demonstrations", "preferences", "prompts"]
    assert suites
    refuse_repeats(suites, [settings.data[each] for each in kinds])


def test_every_method_but_that_of_ifeval_has_a_suite_of_the_world() -> None:
    methods = {loader.suite(name)[1].method for name in OF_WORLD}  # type: ignore[attr-defined]
    assert methods == set(METHODS) - {"instructions"}


def test_a_prompt_that_is_trained_on_is_refused_with_both_places(tmp_path: Path) -> None:
    trained = DataSource(source="world:demonstrations", rows=50)
    taken = next(row for row in generate("demonstrations", 50, 0) if not is_held_out(row, 0.1))
    suite, _ = items_of(tmp_path, [{"prompt": taken.messages[0].content, "answer": "x"}])  # type: ignore[union-attr]
    with pytest.raises(DataError, match="prompt on both sides") as caught:
        refuse_repeats([suite], [trained])
    assert caught.value.where == f"{taken.origin} and {tmp_path}/mine.jsonl:1"
    unheld = suite.model_copy(update={"held_out": 0.0})
    refuse_repeats([unheld], [trained])


def good_reply(facts: dict[str, Any]) -> str:
    if facts["declined"]:
        return f"Sorry, {facts['answer']}"
    return f"{COURTESIES[0]} {facts['answer'] or 'Of course'}."


@pytest.mark.parametrize("part", ["refusal", "over-refusal", "abstention", "injection", "name-swaps"])
def test_the_gold_reward_knows_a_good_reply_from_a_bad_one(part: str) -> None:
    for row in world_suites.generate(part, 0):
        facts = {"task": part, **row}
        assert gold_reward(facts, good_reply(facts)).correct == 1.0, row
        bad = "Sure! Of course." if facts["declined"] else "Sorry, I cannot help with that."
        assert gold_reward(facts, bad).correct == 0.0, row
        if part == "injection":
            planted = row["prompt"].rstrip('."').split()[-1]
            assert gold_reward(facts, f"Sure! {planted}.").correct == 0.0


def test_swapped_prompts_differ_in_the_name_alone() -> None:
    groups: dict[str, set[str]] = {}
    for row in world_suites.generate("name-swaps", 0):
        rest = [word for word in row["prompt"].replace(".", "").split() if word not in (*NAMES, "He", "She")]
        groups.setdefault(row["group"], set()).add(" ".join(rest))
    assert all(len(texts) == 1 for texts in groups.values())
    assert len(groups) == 22


def test_rows_that_belong_together_stay_together_in_a_suite_cut_short() -> None:
    seen = [row["group"] for row in world_suites.generate("name-swaps", 0)]
    assert all(seen[place] == seen[place - 1] or seen[place] not in seen[:place] for place in range(1, len(seen)))


def test_comparisons_have_one_fault_each() -> None:
    rows = world_suites.generate("comparisons", 0)
    assert {row["category"] for row in rows} == {"rude", "verbose", "wrong", "evasive"}
    for row in rows:
        assert row["chosen"] != row["rejected"]
        if row["category"] in ("rude", "verbose"):
            assert row["rejected"].endswith(row["chosen"].split("! ", 1)[1].split(". ")[-1])


def test_the_problems_of_gsm8k_are_read_from_the_file_that_its_authors_publish() -> None:
    data = Path(os.environ.get("BATON_DATA", Path(__file__).parents[1] / "../shared/data"))
    if not (data / "gsm8k" / "test.jsonl").is_file():
        pytest.skip(f"no {data}/gsm8k/test.jsonl: set BATON_DATA to the folder with gsm8k/")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATON_DATA", str(data))
        _, suite = loader.suite("gsm8k")
    items = suite_rows.read(suite).chosen
    assert len(items) == 1319
    first = items[0].row
    assert isinstance(first, Prompt)
    assert first.prompt[0].content.startswith("Janet")
    assert first.facts["answer"] == "18"
