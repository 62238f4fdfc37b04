"""The guide to evaluation says what the code does: its suites are run, and what it promises of them is there."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import REPOSITORY

from pipeline import cli, loader
from pipeline import manifest as manifests
from pipeline.manifest import Manifest
from pipeline.suites import METHODS
from reward.comparison import holm, mcnemar
from reward.intervals import paired_difference, proportion_difference, ratio_interval

pytestmark = pytest.mark.chain

GUIDE = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
FILES: dict[str, str] = dict(re.findall(r"^`suites/([\w.-]+)`\n```\w+\n(.*?)```", GUIDE, re.DOTALL | re.MULTILINE))
NAMES = [name.removesuffix(".yaml") for name in FILES if name.endswith(".yaml")]
RUN = """\
output: {root}/run
device: cpu
dtype: float32
data:
  chats: {{source: {root}/chats.jsonl, held_out: 0.2}}
  pairs: {{source: {root}/pairs.jsonl, held_out: 0.2}}
stages:
  sft: {{kind: sft, policy: {root}/model, data: chats, steps: 2, examples_per_step: 4, max_length: 256}}
  reward: {{kind: reward, policy: sft, data: pairs, steps: 2, examples_per_step: 4, max_length: 256}}
  dpo: {{kind: dpo, policy: sft, data: pairs, steps: 2, examples_per_step: 4, max_length: 256,
    optimizer: {{learning_rate: 0.01}}}}
  evaluate:
    kind: evaluate
    models: [sft, dpo]
    reward: reward
    prompts: chats
    rows: 4
    max_new_tokens: 4
    suites: [{suites}]
"""


def baton(*arguments: str | Path) -> int:
    """The exit code of the command line, run in this process."""
    return cli.execute(cli.app, list(map(str, arguments)))


def manifest(root: Path) -> Manifest:
    return manifests.load(root / "run" / "stages" / "evaluate")


def lines(root: Path, name: str) -> list[dict[str, Any]]:
    path = root / "run" / "stages" / "evaluate" / "suites" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that evaluates all suites of the guide."""
    root = tmp_path_factory.mktemp("guide")
    tiny.save_model(root / "model", "qwen2", ["Question 12? Answer 34. Why?"] * 3)
    rows = [{"prompt": f"Question {each}?", "chosen": f"Answer {each}.", "rejected": "Why?"} for each in range(40)]
    root.joinpath("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    root.joinpath("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (root / "suites").mkdir()
    for name, content in FILES.items():
        (root / "suites" / name).write_text(content)
    suites = ", ".join(f"{root}/suites/{name}.yaml" for name in NAMES)
    root.joinpath("run.yaml").write_text(RUN.format(root=root, suites=suites))
    assert baton("run", root / "run.yaml") == 0
    return root


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to change."""
    copied = Path(shutil.copytree(finished, tmp_path / "copy"))
    config = copied / "run.yaml"
    config.write_text(config.read_text().replace(str(finished), str(copied)))
    return copied


def test_the_guide_has_an_example_of_every_method() -> None:
    sections = re.findall(r"^### (\w+)$", GUIDE, re.MULTILINE)
    assert sections == list(METHODS)
    assert {re.findall(r"^method: (\w+)$", FILES[f"{name}.yaml"], re.MULTILINE)[0] for name in NAMES} == set(METHODS)


def test_the_guide_lists_all_suites_of_the_world() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \|", GUIDE.partition("## Baton's own")[2], re.MULTILINE)
    assert sorted([*listed, "gsm8k", "ifeval"]) == sorted(
        path.stem for path in (loader.recipes() / "suites").glob("*.yaml")
    )


def test_every_model_has_figures_of_every_suite_and_a_child_its_gain(finished: Path) -> None:
    found = manifest(finished).metrics
    for name in NAMES:
        if name == "manners":
            figures = {each for each in found if each.startswith("reward.suite.manners")}
            extra = {"_calibration_error", "_longer_wins", ".polite", ".correct", ""}
            assert figures == {f"reward.suite.manners{each}" for each in extra}
            assert found["reward.suite.manners_longer_wins"].value == 0.0
            continue
        for model in ("sft", "dpo"):
            assert found[f"{model}.suite.{name}"].n == len(lines(finished, name))
        assert f"dpo.suite.{name}_gain" in found
        assert f"sft.suite.{name}_gain" not in found
    assert {"dpo.suite.capitals.America", "dpo.suite.sums.at 0.5", "dpo.suite.sums.at 1"} <= found.keys()
    assert found["dpo.suite.diary_perplexity"].value > 1


def test_figures_are_those_of_the_lines_of_the_suite_s_file(finished: Path) -> None:
    found = manifest(finished).metrics
    for name in NAMES:
        rows = lines(finished, name)
        if name in ("diary", "manners"):
            continue
        assert not [row for row in rows if "weight" in row]
        for model in ("sft", "dpo"):
            numbers = [row["scores"][model] for row in rows]
            assert found[f"{model}.suite.{name}"].value == pytest.approx(sum(numbers) / len(numbers))
        gain = found[f"dpo.suite.{name}_gain"].value
        assert gain == pytest.approx(sum(row["scores"]["dpo"] - row["scores"]["sft"] for row in rows) / len(rows))
    texts = [json.loads(line)["text"] for line in FILES["diary.jsonl"].splitlines()]
    sizes = [len(text.encode()) for text in texts]
    assert [row["weight"] for row in lines(finished, "diary")] == sizes
    bits = sum(size * row["scores"]["dpo"] for size, row in zip(sizes, lines(finished, "diary"), strict=True))
    assert found["dpo.suite.diary"].value == pytest.approx(bits / sum(sizes))


def test_whole_suites_of_yes_and_no_are_tested_together_and_their_categories_by_themselves(finished: Path) -> None:
    content = json.loads((finished / "run" / "stages" / "evaluate" / "evaluation.json").read_text())
    tests = content["models"]["dpo"]["comparison"]["tests"]
    whole = [
        "win_rate.reward",
        "suite.capitals",
        "suite.names",
        "suite.rules",
    ]  # the prompts name no answer: there is no accuracy
    categories = ["suite.capitals.America", "suite.capitals.Europe"]
    parts = sorted([*categories, "suite.rules.loose"])
    assert sorted(tests) == sorted([*whole, *parts])
    for name in [*whole[1:], *categories]:
        suite, category = (*name.split(".")[1:], "")[:2]
        rows = [row for row in lines(finished, suite) if category in ("", row.get("category"))]
        gained = sum(row["scores"]["dpo"] > row["scores"]["sft"] for row in rows)
        lost = sum(row["scores"]["dpo"] < row["scores"]["sft"] for row in rows)
        assert (tests[name]["gained"], tests[name]["lost"]) == (gained, lost)
        assert tests[name]["p"] == mcnemar(gained, lost)
    for family in (whole, parts):
        assert [tests[name]["adjusted"] for name in family] == holm([tests[name]["p"] for name in family])


def test_gains_of_categories_and_temperatures_are_those_of_their_lines(finished: Path) -> None:
    found = manifest(finished).metrics
    for name in ("America", "Europe"):
        (row,) = (row["scores"] for row in lines(finished, "capitals") if row["category"] == name)
        gain = found[f"dpo.suite.capitals.{name}_gain"]
        assert gain == proportion_difference([row["dpo"]], [row["sft"]])
    for part in ("at 0.5", "at 1"):
        rows = [row["parts"][part] for row in lines(finished, "sums")]
        gain = found[f"dpo.suite.sums.{part}_gain"]
        assert gain == paired_difference([row["dpo"] for row in rows], [row["sft"] for row in rows])
        for model in ("sft", "dpo"):
            assert found[f"{model}.suite.sums.{part}"].value == sum(row[model] for row in rows) / len(rows)
    page = (finished / "run" / "report.html").read_text()
    capitals = page.partition("<h3>capitals <small>")[2].partition("<h3>")[0]
    assert capitals.count('<small class="gain') == 3
    assert capitals.count("corrected") == 3


def test_a_line_has_the_row_s_id_and_what_was_said(finished: Path) -> None:
    rows = lines(finished, "locks")
    assert [row["id"] for row in rows] == ["plain", "system"]
    assert all(row["responses"].keys() == {"sft", "dpo"} for row in rows)
    assert [row["category"] for row in lines(finished, "capitals")] == ["America", "Europe"]
    assert [len(row["samples"]["sft"]) for row in lines(finished, "sums")] == [4, 4]
    assert [row["id"] for row in lines(finished, "names")] == ["four", "nine"]
    assert [len(row["samples"]["dpo"]) for row in lines(finished, "names")] == [2, 2]


def test_the_report_has_a_table_of_each_suite_and_the_calibration_of_the_reward_model(finished: Path) -> None:
    page = (finished / "run" / "report.html").read_text()
    assert "<h2>Suites</h2>" in page
    for name in NAMES:
        assert f"<h3>{name} <small>" in page
    assert "How sure reward is and how often it is right" in page
    suites = json.loads((finished / "run" / "report.json").read_text())["stages"]["evaluate"]["suites"]
    assert suites.keys() == set(NAMES)
    assert sum(each["n"] for each in suites["manners"]["calibration"]["reward"]) == 2
    assert suites["diary"]["better"] == "lower"


def test_suites_are_data_of_the_manifest_and_a_changed_one_is_a_reason_to_run(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = manifest(copy)
    assert {f"suites.{name}" for name in NAMES} <= recorded.data_settings.keys()
    assert {card.role for card in recorded.data} >= {f"suites.{name}" for name in NAMES}
    capsys.readouterr()
    assert baton("plan", copy / "run.yaml") == 0
    assert "run   evaluate" not in capsys.readouterr().out
    rows = copy / "suites" / "names.jsonl"
    rows.write_text(rows.read_text().replace("4 + 5", "5 + 4"))
    assert baton("plan", copy / "run.yaml") == 0
    assert re.search(r"data suites\.names\.digest: \w{8} -> \w{8}", capsys.readouterr().out)
    suite = copy / "suites" / "capitals.yaml"
    suite.write_text(suite.read_text().replace("normalised: true", "normalised: false"))
    assert baton("plan", copy / "run.yaml") == 0
    assert "data suites.capitals.normalised: true -> false" in capsys.readouterr().out


def test_two_runs_are_compared_row_by_row(finished: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert baton("run", copy / "run.yaml", "stages.dpo.steps=6", "stages.dpo.optimizer.learning_rate=0.05") == 0
    capsys.readouterr()
    assert baton("diff", finished / "run", copy / "run", "--json") == 0
    changes = {each["metric"]: each for each in json.loads(capsys.readouterr().out)["changes"]}
    suites = {name: each for name, each in changes.items() if name.startswith("dpo.suite.")}
    assert {"dpo.suite.diary", "dpo.suite.diary_gain"} <= suites.keys()
    assert suites.pop("dpo.suite.diary_perplexity")["by"] == "independent intervals"  # it is no mean of rows
    assert {each["by"] for each in suites.values()} == {"paired by row"}
    before, after = ({row["id"]: row for row in lines(root, "diary")} for root in (finished, copy))
    weights = [row["weight"] for row in before.values()]
    bits = [weights[n] * (after[key]["scores"]["dpo"] - before[key]["scores"]["dpo"]) for n, key in enumerate(before)]
    assert changes["dpo.suite.diary"]["change"] == ratio_interval(bits, weights).model_dump()
    assert changes["dpo.reward"]["by"] == "paired by prompt"  # the reward model came out the same


def test_what_is_trained_on_is_refused_with_both_places(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = copy / "suites" / "stories.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Question {each}?"}) + "\n" for each in range(3)))
    assert baton("run", copy / "run.yaml", "--only", "evaluate") == 3
    said = capsys.readouterr().err
    assert "prompt on both sides" in said
    assert f"{copy}/chats.jsonl:" in said
    assert f"{rows}:" in said


def test_a_broken_suite_is_refused_before_anything_runs(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = copy / "suites" / "locks.yaml"
    suite.write_text(suite.read_text().replace("max_new_tokens", "max_new_token"))
    assert baton("plan", copy / "run.yaml") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{suite}:6: max_new_token: unknown setting; did you mean `max_new_tokens`?" in said
    suite.write_text(FILES["locks.yaml"])
    copy.joinpath("suites", "locks.jsonl").write_text('{"prompt": 3}\n')
    assert baton("plan", copy / "run.yaml") == 3
    assert "locks.jsonl:1: prompt: 3" in " ".join(capsys.readouterr().err.split())


def test_some_problems_of_gsm8k_are_asked(copy: Path) -> None:
    data = Path(os.environ.get("BATON_DATA", REPOSITORY / "../shared/data"))
    if not (data / "gsm8k" / "test.jsonl").is_file():
        pytest.skip(f"no {data}/gsm8k/test.jsonl: set BATON_DATA to the folder with gsm8k/")
    own = (loader.recipes() / "suites" / "gsm8k.yaml").read_text()
    few = own.replace("max_new_tokens: 256", "max_new_tokens: 8\nrows: 3")
    (copy / "suites" / "gsm8k.yaml").write_text(few)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATON_DATA", str(data.resolve()))
        change = f"stages.evaluate.suites=[{copy}/suites/gsm8k.yaml]"
        assert baton("run", copy / "run.yaml", change, "--only", "evaluate") == 0
    assert manifest(copy).metrics["dpo.suite.gsm8k"].n == 3
    assert all(row["scores"].keys() == row["responses"].keys() == {"sft", "dpo"} for row in lines(copy, "gsm8k"))
