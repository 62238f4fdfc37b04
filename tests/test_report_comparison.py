"""The report on comparisons: counts and tests beside figures, prompts needed, judges of pairs, the gate."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import reports
import yaml
from conftest import REPOSITORY

from pipeline import gate, loader
from pipeline.config import EvaluateSettings
from pipeline.manifest import Metric
from pipeline.report.inputs import ModelEvaluation
from pipeline.report.verdict import judge
from pipeline.servers import JudgeServer

GUIDE = (REPOSITORY / "docs" / "comparison.md").read_text(encoding="utf-8")
TALLY = {"won": 60, "tied": 25, "lost": 10, "unread": 5, "changed": 3}
COUNTS: dict[str, Any] = {"judges": {"gpt": TALLY}, "needed": {}}


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of training, which take longer to draw than all that is looked at here."""
    monkeypatch.setattr("pipeline.report.page.draw_curves", lambda stage, steps: [])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished six-stage run."""
    return reports.write_run(tmp_path / "first")


def evaluate(run: Path, **changes: Any) -> None:
    """Another evaluation of the run's last policy."""
    evaluation = reports.evaluation()
    model = evaluation["models"]["ppo"]
    model["metrics"] |= changes.pop("metrics", {})
    model |= changes
    (run / "stages" / "check" / "evaluation.json").write_text(json.dumps(evaluation))


def require(run: Path, required: Any, metrics: dict[str, Any]) -> None:
    """A gate in the configuration, and the figures that it is held against."""
    inputs = reports.manifest("check")["inputs"]
    reports.write_stage(run, "check", metrics=metrics, inputs=inputs)
    stages = {"check": {"kind": "evaluate", "require": required}}
    (run / "config.yaml").write_text(yaml.safe_dump({"output": "runs/first", "stages": stages}))


def text_of(run: Path) -> str:
    """What can be read on the page."""
    written = reports.page(run)
    reports.assert_inert(written)
    return reports.Elements(written).text


def test_every_line_of_win_rates_names_its_judge_beside_its_counts(run: Path) -> None:
    rates = {f"win_rate.{judge}": reports.metric(rate) for judge, rate in (("gpt", 0.7), ("short", 0.4))}
    rates["win_rate_length_controlled.gpt"] = reports.metric(0.6)
    judges = {"gpt": TALLY, "short": {"won": 30, "tied": 20, "lost": 50}}
    needed = {"win_rate.short": 1_234}
    evaluate(run, metrics=rates, comparison={"judges": judges, "needed": needed})
    lines = text_of(run).partition("Wins against the parent, by judge")[2].partition("Samples")[0].split("ppo")
    gpt, short = (" ".join(each.split()) for each in lines[1:3])
    assert gpt.startswith("against sftgpt 70.0%[68.0%, 72.0%]")
    assert "60.0%[58.0%, 62.0%]" in gpt
    assert "60 won, 25 tied, 10 lost, 5 without a verdict" in gpt
    assert short.startswith("against sftshort 40.0%[38.0%, 42.0%]")
    assert "30 won, 20 tied, 50 lost" in short
    assert "1,234" in short
    assert "without a verdict" not in short
    assert "win rate by" not in text_of(run).partition("Wins against the parent")[0]


def test_the_page_says_what_each_judge_is(run: Path) -> None:
    evaluation = reports.evaluation() | {"judges": {"gold": "the rule world", "gpt": "the model judge-1"}}
    (run / "stages" / "check" / "evaluation.json").write_text(json.dumps(evaluation))
    assert "gold is the rule world; gpt is the model judge-1." in text_of(run)


@pytest.mark.parametrize(("adjusted", "coloured"), [(0.01, True), (0.2, False)])
def test_a_win_rate_is_coloured_only_when_it_stays_significant(run: Path, adjusted: float, coloured: bool) -> None:
    tests = {"win_rate.gpt": {"p": 0.01, "adjusted": adjusted}}
    evaluate(run, metrics={"win_rate.gpt": reports.metric(0.7)}, comparison=COUNTS | {"tests": tests})
    page = reports.page(run)
    assert bool(re.search(r'<span class="up">\s*70\.0%', page)) == coloured
    assert f"p 0.010, corrected {adjusted:.3f}" in reports.Elements(page).text


@pytest.mark.parametrize(
    ("metric", "ratio", "colour"),
    [
        ("perplexity", 1.2, "down"),
        ("perplexity", 0.9, "up"),
        ("perplexity", 1.01, "level"),
        ("bits_per_byte", 1.2, "down"),
        ("length", 1.2, "level"),
    ],
)
def test_a_ratio_to_the_parent_stands_below_its_figure(run: Path, metric: str, ratio: float, colour: str) -> None:
    evaluate(run, metrics={metric: reports.metric(2.0), f"{metric}_ratio": reports.metric(ratio)})
    interval = f"[{ratio - 0.02:.3f}, {ratio + 0.02:.3f}]"
    written = f'<small class="gain {colour}"><b>\N{MULTIPLICATION SIGN} {ratio:.3f}</b> <span>{interval}</span></small>'
    assert written in reports.page(run)


@pytest.mark.parametrize(("adjusted", "coloured"), [(0.01, True), (0.2, False)])
def test_an_accuracy_is_coloured_only_when_it_stays_significant(run: Path, adjusted: float, coloured: bool) -> None:
    metrics = {"accuracy.sums": reports.metric(0.6), "accuracy.sums_gain": reports.metric(0.1)}
    evaluate(run, metrics=metrics, comparison={**COUNTS, "tests": {"accuracy.sums": {"p": 0.01, "adjusted": adjusted}}})
    page = reports.page(run)
    found = re.search(r'<small class="gain (\w+)"><b>\+10\.0%', page)
    assert found is not None
    assert found[1] == ("up" if coloured else "level")
    text = reports.Elements(page).text
    assert f"p 0.010, corrected {adjusted:.3f}" in text
    assert "sums_gain" not in text


def suite(name: str) -> dict[str, Any]:
    """The record of a suite of yes and no."""
    return {name: {"method": "generation", "measures": f"All {name}.", "observations": 100}}


@pytest.mark.parametrize(("adjusted", "coloured"), [(0.01, True), (0.2, False)])
def test_a_gain_on_a_suite_is_coloured_only_when_it_stays_significant(
    run: Path, adjusted: float, coloured: bool
) -> None:
    evaluation = {**reports.evaluation(), "suites": suite("sums")}
    model = evaluation["models"]["ppo"]
    model["metrics"] |= {"suite.sums": reports.metric(0.6), "suite.sums_gain": reports.metric(0.1)}
    model["comparison"] = {**COUNTS, "tests": {"suite.sums": {"p": 0.01, "adjusted": adjusted}}}
    (run / "stages" / "check" / "evaluation.json").write_text(json.dumps(evaluation))
    page = reports.page(run)
    found = re.search(r'<small class="gain (\w+)"><b>\+10\.0%', page)
    assert found is not None
    assert found[1] == ("up" if coloured else "level")
    text = reports.Elements(page).text.partition("Suites")[2]
    assert f"p 0.010, corrected {adjusted:.3f}" in text
    assert "for suites of yes and no, McNemar's p stays below 5%" in text


@pytest.mark.parametrize("name", ["another", "second"])
def test_a_second_evaluation_changes_neither_the_verdict_nor_the_table_and_adds_its_suites(
    run: Path, name: str
) -> None:
    whole = reports.evaluation()
    for model in whole["models"].values():
        model["metrics"]["suite.letters"] = reports.metric(0.25)
    (run / "stages" / "check" / "evaluation.json").write_text(json.dumps({**whole, "suites": suite("letters")}))
    before, table = reports.report(run)["verdict"], _table(text_of(run))
    models = {
        model: {"parent": parent, "metrics": {"gold": reports.metric(0.9), "suite.sums": reports.metric(0.75)}}
        for model, parent in (("sft", None), ("ppo", "sft"))
    }
    reports.add_evaluation(run, name, {"models": models, "suites": suite("sums")})
    report, text = reports.report(run), text_of(run)
    assert report["verdict"] == before
    assert report["verdict"]["state"] == "better"
    assert report["stages"]["sft"]["metrics"]["gold"]["value"] == 0.5
    assert _table(text) == table
    assert f"sft, ppo were evaluated in {name}, too" in text
    suites = text.partition("Suites")[2]
    assert sorted(re.findall(r"(letters|sums) 100 observations", suites)) == ["letters", "sums"]
    assert suites.count("25.0%[23.0%, 27.0%]") == 3
    assert suites.count("75.0%[73.0%, 77.0%]") == 2


def _table(text: str) -> list[str]:
    """The words of the main table."""
    table = text.partition("Each model against its parent")[2].partition("Wins against the parent")[0]
    return table.partition("sft, ppo were")[0].split()


def test_suites_of_one_name_in_two_evaluations_have_a_table_each(run: Path) -> None:
    for name, figure in (("first", 0.25), ("second", 0.75)):
        models = {"sft": {"parent": None, "metrics": {"suite.sums": reports.metric(figure)}}}
        reports.add_evaluation(run, name, {"models": models, "suites": suite("sums")})
    text = text_of(run)
    assert "25.0%" in text.partition("sums (first)")[2].partition("sums (second)")[0]
    assert "75.0%" in text.partition("sums (second)")[2]


def test_an_unclear_verdict_says_how_many_prompts_would_tell() -> None:
    gain = Metric(value=0.01, low=-0.02, high=0.04, n=150)
    metrics = {"gold": Metric(value=0.6), "gold_gain": gain}
    comparison = {**COUNTS, "needed": {"gold": 12_345}}
    child = ModelEvaluation.model_validate({"parent": "sft", "metrics": metrics, "comparison": comparison})
    verdict = judge({"dpo": child})
    assert verdict.state == "unclear"
    assert verdict.sentence.endswith("12,345 prompts would show it in four of five evaluations.")


@pytest.mark.parametrize(
    ("rate", "state", "words"),
    [
        (
            Metric(value=0.7, low=0.6, high=0.8),
            "better",
            "By gpt, dpo is better than its parent sft: it wins 70.0%",
        ),
        (Metric(value=0.3, low=0.2, high=0.4), "worse", "dpo is worse than its parent sft"),
        (Metric(value=0.55, low=0.45, high=0.65), "unclear", "dpo is not clearly different from its parent sft"),
    ],
)
def test_without_a_gold_or_learned_reward_the_win_rate_by_the_first_judge_is_the_verdict(
    rate: Metric, state: str, words: str
) -> None:
    sft = ModelEvaluation(parent="base", metrics={"win_rate.gpt": Metric(value=0.99, low=0.98, high=1.0)})
    rates = {"win_rate.gpt": rate, "win_rate.short": Metric(value=0.1, low=0.0, high=0.2)}
    verdict = judge({"base": ModelEvaluation(), "sft": sft, "dpo": ModelEvaluation(parent="sft", metrics=rates)})
    assert (verdict.state, verdict.stage) == (state, "dpo")
    assert words in verdict.sentence


@pytest.mark.parametrize(("adjusted", "state"), [(0.2, "unclear"), (0.03, "better")])
def test_the_verdict_by_win_rate_asks_the_corrected_test(adjusted: float, state: str) -> None:
    metrics = {"win_rate.gpt": Metric(value=0.6, low=0.52, high=0.68)}
    tests = {"win_rate.gpt": {"gained": 60, "lost": 40, "p": 0.02, "adjusted": adjusted}}
    comparison = {**COUNTS, "tests": tests}
    child = ModelEvaluation.model_validate({"parent": "sft", "metrics": metrics, "comparison": comparison})
    verdict = judge({"sft": ModelEvaluation(), "dpo": child})
    assert verdict.state == state
    assert f"p 0.020, corrected {adjusted:.3f}" in verdict.sentence


def test_every_requirement_stands_beside_what_was_found(run: Path) -> None:
    metrics = {"ppo.gold_gain": reports.metric(0.2), "ppo.perplexity_ratio": reports.metric(1.2)}
    require(run, {"ppo": {"gold": "> parent", "perplexity": "< 1.1 x parent", "kl": "< 9"}}, metrics)
    text = text_of(run)
    assert "1 of 3 requirements hold" in text
    assert "+0.200 [+0.180, +0.220] against the parent" in text
    assert "1.200 [1.180, 1.220] times the parent's" in text
    assert "not measured" in text
    assert text.index("1 of 3 requirements") < text.index("Lineage")
    found = reports.report(run)["requirements"]["check"]
    assert [(each["metric"], each["holds"]) for each in found] == [("gold", True), ("kl", False), ("perplexity", False)]


def test_a_run_without_a_gate_shows_none(run: Path) -> None:
    assert "requirement" not in text_of(run)
    assert reports.report(run)["requirements"] == {}


def test_hostile_names_in_a_gate_are_shown_and_do_nothing(run: Path) -> None:
    texts = reports.HOSTILE[:-1]
    gains = {f"{text}.{text}_gain": reports.metric(0.2) for text in texts}
    require(run, {text: {text: "> parent"} for text in texts}, gains)
    evaluate(run, comparison={**COUNTS, "tests": {text: {"p": 0.01, "adjusted": 0.1} for text in texts}})
    assert f"{len(texts)} of {len(texts)} requirements hold" in text_of(run)


@pytest.mark.parametrize("required", [3, ["gold"], {"ppo": 3}, {"ppo": {"gold": 3}}, {"ppo": {"gold": "> parnet"}}])
def test_a_gate_that_somebody_spoiled_in_the_run_is_left_out(run: Path, required: object) -> None:
    require(run, required, {})
    assert "requirement" not in text_of(run)


def test_the_settings_of_the_guide_are_valid() -> None:
    judges = [yaml.safe_load(found) for found in re.findall(r"```yaml\n(    judges:.*?)```", GUIDE, re.DOTALL)]
    gates = [yaml.safe_load(found) for found in re.findall(r"```yaml\n(    require:.*?)```", GUIDE, re.DOTALL)]
    settings = {"models": ["dpo"], "prompts": "prompts", "judges": judges[0]["judges"], **gates[0]}
    made = EvaluateSettings.model_validate(settings)
    assert [type(each) for each in made.judges.values()] == [JudgeServer, list, list]
    assert made.require.keys() == {"dpo", "reward"}
    for required in re.findall(r"\"([<>].*?)\"", GUIDE):
        gate.parse(required)


def test_the_quickstart_has_a_gate_for_what_it_trains() -> None:
    settings = loader.load(REPOSITORY / "configs" / "quickstart.yaml").stages["evaluate"]
    assert isinstance(settings, EvaluateSettings)
    assert {model for model, wanted in settings.require.items() if wanted.get("gold") == "> parent"} == {"dpo", "ppo"}
