"""`baton diff`: what changed, and what that did to each figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reports

from pipeline import cli, difference
from pipeline.difference import INDEPENDENT, NO_INTERVAL, OTHER_JUDGE, PAIRED, Change
from pipeline.errors import ArtifactError
from pipeline.manifest import SCHEMA_VERSION
from pipeline.store import RunDirectory
from reward.intervals import mean_interval, proportion_interval

PROMPTS = 40


def write_run(root: Path, seed: int, gain: float = 0.0, **judge: str) -> RunDirectory:
    """A run with an evaluation of two models on the same prompts, whose gold rewards have much in common."""
    easy = np.random.default_rng(0).uniform(0, 1, PROMPTS)
    noise = np.random.default_rng(seed).normal(0, 0.01, (2, PROMPTS))
    gold = {"sft": easy + noise[0], "ppo": easy + noise[1] + 0.2 + gain}
    metrics = {f"{name}.gold": mean_interval(values) for name, values in gold.items()}
    metrics["ppo.gold_gain"] = mean_interval(gold["ppo"] - gold["sft"])
    wins = (gold["ppo"] > gold["sft"]) * 1.0
    metrics |= {"ppo.win_rate": mean_interval(wins), "ppo.reward": mean_interval(3 * gold["ppo"])}
    metrics["ppo.accuracy"] = proportion_interval(seed, PROMPTS)
    dumped = {name: metric.model_dump() for name, metric in metrics.items()} | {"ppo.rounds": {"value": float(seed)}}
    inputs = {"reward": {"source": "judge", "kind": "reward", "digest": reports.digest(judge.get("judge", "judge"))}}
    directory = reports.write_stage(root, "check", schema_version=SCHEMA_VERSION, metrics=dumped, inputs=inputs)
    models = {"sft": {"parent": None}, "ppo": {"parent": "sft"}}
    (directory / "evaluation.json").write_text(json.dumps({"models": models, "judge": "gold"}))
    samples = [
        {
            "prompt": [{"role": "user", "content": f"Question {number}"}],
            "gold": {name: values[number] for name, values in gold.items()},
            "reward": {"ppo": 3 * gold["ppo"][number]},
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
        assert (change.by, change.is_clear, change.change.n) == (PAIRED, True, PROMPTS)
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
    assert found(first, second)["ppo.gold"].by == INDEPENDENT


def test_scores_of_different_reward_models_are_not_compared(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", 1), write_run(tmp_path / "b", 2, judge="other")
    changes = difference.changes(first, second)
    assert (changes[-1].metric, changes[-1].by, changes[-1].change.low) == ("ppo.reward", OTHER_JUDGE, None)


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
    assert (lines[1].split()[2], True, PAIRED) == (first["metric"], first["clear"], first["by"])
    assert first["change"]["value"] == pytest.approx(first["new"]["value"] - first["old"]["value"])
