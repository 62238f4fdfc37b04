"""`baton diff`: what changed, and what that did to each figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reports

from pipeline import cli, difference
from pipeline.difference import INDEPENDENT, NO_INTERVAL, NOT_PAIRED, OTHER_JUDGE, PAIRED, Change
from pipeline.errors import ArtifactError
from pipeline.manifest import SCHEMA_VERSION
from pipeline.store import RunDirectory
from reward.intervals import (
    mean_interval,
    paired_difference,
    proportion_difference,
    proportion_interval,
    ratio_interval,
)

PROMPTS = 40


def write_run(root: Path, seed: int, gain: float = 0.0, **judge: str) -> RunDirectory:
    """A run with an evaluation of two models on the same prompts, whose gold rewards have much in common."""
    easy = np.random.default_rng(0).uniform(0, 1, PROMPTS)
    noise = np.random.default_rng(seed).normal(0, 0.01, (2, PROMPTS))
    gold = {"sft": easy + noise[0], "ppo": easy + noise[1] + 0.2 + gain}
    metrics = {f"{name}.gold": mean_interval(values) for name, values in gold.items()}
    metrics["ppo.gold_gain"] = mean_interval(gold["ppo"] - gold["sft"])
    wins = (gold["ppo"] > gold["sft"]) * 1.0
    metrics |= {"ppo.win_rate.gold": mean_interval(wins), "ppo.reward": mean_interval(3 * gold["ppo"])}
    metrics["ppo.accuracy"] = proportion_interval(seed, PROMPTS)
    dumped = {name: metric.model_dump() for name, metric in metrics.items()} | {"ppo.rounds": {"value": float(seed)}}
    inputs = {"reward": {"source": "judge", "kind": "reward", "digest": reports.digest(judge.get("judge", "judge"))}}
    directory = reports.write_stage(root, "check", schema_version=SCHEMA_VERSION, metrics=dumped, inputs=inputs)
    models = {"sft": {"parent": None}, "ppo": {"parent": "sft"}}
    (directory / "evaluation.json").write_text(json.dumps({"models": models, "judges": {"gold": "the rule world"}}))
    samples = [
        {
            "prompt": [{"role": "user", "content": f"Question {number}"}],
            "gold": {name: values[number] for name, values in gold.items()},
            "reward": {"ppo": 3 * gold["ppo"][number]},
            "outcomes": {"gold": {"ppo": wins[number]}},
        }
        for number in range(PROMPTS)
    ]
    reports.write_lines(directory / "samples.jsonl", samples)
    return RunDirectory(root)


def found(first: RunDirectory, second: RunDirectory) -> dict[str, Change]:
    return {change.metric: change for change in difference.changes(first, second)}


def test_figures_on_the_same_prompts_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", 1), write_run(tmp_path / "b", 2, gain=0.1)
    changes = found(first, second)
    golds = [
        [json.loads(line)["gold"] for line in (run.stage("check") / "samples.jsonl").read_text().splitlines()]
        for run in (first, second)
    ]
    by_hand = {
        "ppo.gold": [new["ppo"] - old["ppo"] for old, new in zip(*golds, strict=True)],
        "ppo.gold_gain": [new["ppo"] - new["sft"] - old["ppo"] + old["sft"] for old, new in zip(*golds, strict=True)],
    }
    for metric, differences in by_hand.items():
        change = changes[metric]
        assert (change.by, change.is_clear, change.change.n) == (PAIRED["prompt"], True, PROMPTS)
        assert change.change.value == pytest.approx(change.new.value - change.old.value) == np.mean(differences)
        resampled = np.random.default_rng(5).choice(differences, (4000, PROMPTS)).mean(1)
        assert (change.change.low, change.change.high) == pytest.approx(
            tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.002
        )
    assert changes["ppo.gold"].change.high - changes["ppo.gold"].change.low < 0.05  # type: ignore[operator]


def test_other_figures_get_an_interval_from_theirs(tmp_path: Path) -> None:
    """Newcombe's example (1998, table II, method 10): 56/70 - 48/80 = 0.2 [0.0524, 0.3339]."""
    old, new = proportion_interval(48, 80), proportion_interval(56, 70)
    change = difference._independent(old, new)
    assert change.value == pytest.approx(0.2)
    assert (change.low, change.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    changes = found(write_run(tmp_path / "a", 1), write_run(tmp_path / "b", 30))
    assert changes["ppo.accuracy"].by == INDEPENDENT
    assert (changes["ppo.rounds"].by, changes["ppo.rounds"].is_clear) == (NO_INTERVAL, False)


def test_other_prompts_are_not_paired(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", 1), write_run(tmp_path / "b", 2)
    path = second.stage("check") / "samples.jsonl"
    path.write_text(path.read_text().replace("Question 7", "Question seven"))
    assert found(first, second)["ppo.gold"].by == NOT_PAIRED["prompt"]


def test_scores_of_different_reward_models_are_not_compared(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", 1), write_run(tmp_path / "b", 2, judge="other")
    changes = difference.changes(first, second)
    assert (changes[-1].metric, changes[-1].by, changes[-1].change.low) == ("ppo.reward", OTHER_JUDGE, None)


JUDGED = ("win_rate.short", "win_rate_length_controlled.short", "score.short", "score.short_gain")


def judged(root: Path, words: int, scores: list[float]) -> RunDirectory:
    """A run whose evaluation is judged by rules of that many words, too."""
    run = write_run(root, 1)
    directory = run.stage("check")
    metrics = {f"ppo.{name}": mean_interval(scores).model_dump() for name in JUDGED}
    settings = {"gold": "world", "judges": {"short": [{"rule": "length", "words": words, "weight": 1.0}]}}
    inputs = reports.manifest("check")["inputs"]
    reports.write_stage(root, "check", schema_version=SCHEMA_VERSION, metrics=metrics, settings=settings, inputs=inputs)
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    for sample, score in zip(samples, scores, strict=True):
        sample["scores"] = {"short": {"ppo": score, "sft": 0.0}}
        sample["outcomes"] = {"short": {"ppo": score}}
    reports.write_lines(directory / "samples.jsonl", samples)
    return run


def test_scores_and_wins_by_rules_are_paired_by_prompt_and_not_compared_when_the_rules_are_others(
    tmp_path: Path,
) -> None:
    scores = [[float(number % modulus == 0) for number in range(PROMPTS)] for modulus in (3, 2)]
    old, new = judged(tmp_path / "a", 3, scores[0]), judged(tmp_path / "b", 3, scores[1])
    same = found(old, new)
    for name in ("win_rate.short", "score.short"):
        assert (same[f"ppo.{name}"].by, same[f"ppo.{name}"].change) == (
            PAIRED["prompt"],
            proportion_difference(scores[1], scores[0]),
        )
    assert same["ppo.score.short_gain"].by == PAIRED["prompt"]
    assert same["ppo.win_rate_length_controlled.short"].by == INDEPENDENT
    others = found(old, judged(tmp_path / "c", 4, scores[1]))
    assert {others[f"ppo.{name}"].by for name in JUDGED} == {OTHER_JUDGE}


def with_suite(root: Path, numbers: dict[str, dict[str, float]], **others: Any) -> RunDirectory:
    """A run with an evaluation that asked the rows of one suite: id -> model -> number; `others` by row's id."""
    lines = []
    for place, (row, scores) in enumerate(numbers.items()):
        category = "ab"[place % 2]
        parts = {"at 1": {model: score / 2 for model, score in scores.items()}}
        lines.append({"id": row, "category": category, "scores": scores, "parts": parts} | others.get(row, {}))
    metrics = {}
    for model in ("sft", "ppo"):
        for name, chosen in {"": lines, ".a": lines[::2], ".b": lines[1::2]}.items():
            own = [line["scores"][model] for line in chosen]
            weights = [line.get("weight", 1.0) for line in chosen]
            weighted = [number * weight for number, weight in zip(own, weights, strict=True)]
            metrics[f"{model}.suite.mine{name}"] = ratio_interval(weighted, weights)
        metrics[f"{model}.suite.mine.at 1"] = mean_interval([line["scores"][model] / 2 for line in lines])
    gains = [line["scores"]["ppo"] - line["scores"]["sft"] for line in lines]
    weights = [line.get("weight", 1.0) for line in lines]
    weighted = [gain * weight for gain, weight in zip(gains, weights, strict=True)]
    metrics["ppo.suite.mine_gain"] = ratio_interval(weighted, weights)
    dumped = {name: metric.model_dump() for name, metric in metrics.items()}
    directory = reports.write_stage(root, "check", schema_version=SCHEMA_VERSION, metrics=dumped)
    models = {"sft": {"parent": None}, "ppo": {"parent": "sft"}}
    (directory / "evaluation.json").write_text(json.dumps({"models": models}))
    (directory / "samples.jsonl").write_text("")
    (directory / "suites").mkdir()
    reports.write_lines(directory / "suites" / "mine.jsonl", lines)
    return RunDirectory(root)


def rows(seed: int, share: float, count: int = 30) -> dict[str, dict[str, float]]:
    """Rows that each model answers rightly or not."""
    chance = np.random.default_rng(seed)
    drawn = chance.uniform(0, 1, (count, 2))
    return {f"row {n}": {"sft": float(a < 0.5), "ppo": float(b < share)} for n, (a, b) in enumerate(drawn.tolist())}


def test_suites_are_compared_row_by_row_by_their_ids_in_any_order(tmp_path: Path) -> None:
    before, after = rows(1, 0.4), rows(2, 0.8)
    turned = dict(reversed(after.items()))
    order = {row: {"category": "ab"[place % 2]} for place, row in enumerate(before)}
    changes = found(with_suite(tmp_path / "a", before), with_suite(tmp_path / "b", after))
    old, new = ([each["ppo"] for each in side.values()] for side in (before, after))
    assert {change.by for change in changes.values()} == {PAIRED["row"]}
    assert changes["ppo.suite.mine"].change == proportion_difference(new, old)
    assert changes["ppo.suite.mine.a"].change == proportion_difference(new[::2], old[::2])
    assert changes["ppo.suite.mine.at 1"].change == paired_difference([n / 2 for n in new], [n / 2 for n in old])
    gains = [[each["ppo"] - each["sft"] for each in side.values()] for side in (after, before)]
    assert changes["ppo.suite.mine_gain"].change == paired_difference(*gains)
    # 30 rows: of an even number, the last one would have the other category in the other order
    again = found(with_suite(tmp_path / "a2", before, **order), with_suite(tmp_path / "c", turned, **order))
    assert again["ppo.suite.mine"].change.value == pytest.approx(changes["ppo.suite.mine"].change.value)
    assert again["ppo.suite.mine"].by == PAIRED["row"]


def test_documents_are_compared_with_their_weights(tmp_path: Path) -> None:
    bits = [{f"row {n}": {"sft": 2.0, "ppo": 1.0 + n / 10 + shift * n} for n in range(8)} for shift in (0.0, 0.1)]
    weights = {f"row {n}": {"weight": 10.0 + n} for n in range(8)}
    change = found(with_suite(tmp_path / "a", bits[0], **weights), with_suite(tmp_path / "b", bits[1], **weights))
    by_hand = sum((10 + n) * 0.1 * n for n in range(8)) / sum(10 + n for n in range(8))
    assert change["ppo.suite.mine"].by == PAIRED["row"]
    assert change["ppo.suite.mine"].change.value == pytest.approx(by_hand)
    other = weights | {"row 3": {"weight": 99.0}}
    changes = found(with_suite(tmp_path / "c", bits[0], **weights), with_suite(tmp_path / "d", bits[1], **other))
    assert changes["ppo.suite.mine"].by == NOT_PAIRED["row"]


@pytest.mark.parametrize(("words", "same"), [(3, True), (4, False)])
def test_suites_that_score_in_another_way_are_not_compared(tmp_path: Path, words: int, same: bool) -> None:
    runs = [with_suite(tmp_path / name, rows(seed, share)) for name, seed, share in (("a", 1, 0.4), ("b", 2, 0.8))]
    for run, each in zip(runs, (3, words), strict=True):
        metrics = json.loads((run.stage("check") / "manifest.json").read_text())["metrics"]
        suite = {"method": "generation", "gold": "none", "rules": [{"rule": "length", "words": each}], "samples": each}
        settings = {"suites.mine": suite}
        reports.write_stage(run.root, "check", schema_version=SCHEMA_VERSION, metrics=metrics, data_settings=settings)
    assert {change.by for change in found(*runs).values()} == {PAIRED["row"] if same else OTHER_JUDGE}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"timeout": 5.0, "retries": 0, "hosts": ["a.example", "b.example"], "requests_at_once": 8}, True),
        ({"token_variable": "KEY"}, True),
        ({"model": "other"}, False),
        ({"parameters": {"timeout": 3}}, False),
    ],
)
def test_how_a_server_is_asked_makes_no_other_judge_of_it(tmp_path: Path, change: dict[str, Any], same: bool) -> None:
    server = {"url": "https://a.example/v1", "hosts": ["a.example"], "model": "m", "timeout": 120.0, "parameters": {}}
    runs = []
    for name, settings, value in (("a", server, 0.5), ("b", server | change, 0.6)):
        metrics = {"ppo.win_rate.gpt": {"value": value, "low": value - 0.1, "high": value + 0.1}}
        judges = {"judges": {"gpt": settings}}
        reports.write_stage(tmp_path / name, "check", schema_version=SCHEMA_VERSION, metrics=metrics, settings=judges)
        runs.append(RunDirectory(tmp_path / name))
    assert found(*runs)["ppo.win_rate.gpt"].by == (INDEPENDENT if same else OTHER_JUDGE)


def test_what_only_one_run_has_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, metrics, data in (
        ("a", {"ppo.win_rate": {"value": 0.5}, "ppo.gold": {"value": 0.5}}, {}),
        (
            "b",
            {"ppo.win_rate.gold": {"value": 0.6}, "ppo.gold": {"value": 0.5}},
            {"suites.mine": {"source": "mine", "n": 3}},
        ),
    ):
        reports.write_stage(
            tmp_path / name, "check", schema_version=SCHEMA_VERSION, metrics=metrics, data_settings=data
        )
    assert cli.execute(cli.app, ["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "check: data.suites.mine: absent -> mine" in lines
    assert not [line for line in lines if line.startswith("check: data.suites.mine.")]
    assert "check ppo.win_rate 0.5 only in RUN_A" in lines
    assert "check ppo.win_rate.gold 0.6 only in RUN_B" in lines
    assert cli.execute(cli.app, ["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    content: Any = json.loads(capsys.readouterr().out)
    assert [(each["metric"], each["old"] is None) for each in content["in_one_run"]] == [
        ("ppo.win_rate", False),
        ("ppo.win_rate.gold", True),
    ]


@pytest.mark.parametrize("name", ["accuracy", "accuracy.sums", "accuracy_gain", "frontier_gap", "gold"])
def test_what_another_rule_calls_correct_is_not_compared(tmp_path: Path, name: str) -> None:
    runs = []
    for gold, right in (("exact", 10), ("numeric", 30)):
        metrics = {f"ppo.{name}": proportion_interval(right, PROMPTS).model_dump()}
        reports.write_stage(
            tmp_path / gold, "check", schema_version=SCHEMA_VERSION, metrics=metrics, settings={"gold": gold}
        )
        runs.append(RunDirectory(tmp_path / gold))
    assert found(*runs)[f"ppo.{name}"].by == OTHER_JUDGE


def test_suites_of_other_rows_say_so_and_keep_the_independent_intervals(tmp_path: Path) -> None:
    before, after = rows(1, 0.4), rows(2, 0.8)
    after["another"] = after.pop("row 29")
    changes = found(with_suite(tmp_path / "a", before), with_suite(tmp_path / "b", after))
    change = changes["ppo.suite.mine"]
    assert change.by == NOT_PAIRED["row"]
    assert change.change == difference._independent(change.old, change.new)
    assert changes["ppo.suite.mine.a"].by == PAIRED["row"]  # the other category has the other row


def test_lines_that_are_not_those_of_the_figure_are_not_paired(tmp_path: Path) -> None:
    first, second = with_suite(tmp_path / "a", rows(1, 0.4)), with_suite(tmp_path / "b", rows(2, 0.8))
    path = second.stage("check") / "suites" / "mine.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert found(first, second)["ppo.suite.mine"].by == INDEPENDENT


def test_a_damaged_line_of_a_suite_is_named(tmp_path: Path) -> None:
    first, second = with_suite(tmp_path / "a", rows(1, 0.4)), with_suite(tmp_path / "b", rows(2, 0.8))
    with (second.stage("check") / "suites" / "mine.jsonl").open("a") as stream:
        stream.write('{"id": "x", "scores": 3}\n')
    with pytest.raises(ArtifactError, match=r"mine.jsonl:31: not what an evaluation writes"):
        difference.changes(first, second)


def test_the_largest_clear_changes_come_first(tmp_path: Path) -> None:
    changes = difference.changes(write_run(tmp_path / "a", 1), write_run(tmp_path / "b", 30, gain=0.1))
    clear = [change.is_clear for change in changes]
    assert clear == sorted(clear, reverse=True)
    assert set(clear) == {True, False}
    ratios = [
        abs(change.change.value) / (change.change.high - change.change.low)  # type: ignore[operator]
        for change in changes
        if change.is_clear
    ]
    assert ratios == sorted(ratios, reverse=True)


def test_equal_runs_have_no_changes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 1)
    assert difference.changes(run, run) == []


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", 1), write_run(tmp_path / "b", 2)
    with (second.stage("check") / "samples.jsonl").open("a") as stream:
        stream.write("[1]\n")
    with pytest.raises(ArtifactError, match=f"samples.jsonl:{PROMPTS + 1}: not what an evaluation writes"):
        difference.changes(first, second)


def test_the_command_prints_both_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name, seed, gain=seed / 10).root) for name, seed in (("a", 1), ("b", 2))]
    assert cli.execute(cli.app, ["diff", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "figure", "old", "new", "change", "95%", "interval", "by"]
    assert lines[1].split()[:2] == ["*", "check"]
    assert cli.execute(cli.app, ["diff", *runs, "--json"]) == 0
    content: Any = json.loads(capsys.readouterr().out)
    assert content["differences"] == []
    first = content["changes"][0]
    assert (lines[1].split()[2], True, PAIRED["prompt"]) == (first["metric"], first["clear"], first["by"])
    assert first["change"]["value"] == pytest.approx(first["new"]["value"] - first["old"]["value"])
