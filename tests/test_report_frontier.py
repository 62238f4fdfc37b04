"""The report's picture of reward against divergence: what is drawn, what is not, and that names cannot act in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import reports

from pipeline.errors import ArtifactError
from pipeline.report.frontier import Chart, draw_frontiers
from pipeline.report.inputs import read
from reward.best_of_n import divergence

HEADING = "Reward against divergence"


def evaluation(**changes: Any) -> dict[str, Any]:
    """Two policies with their divergence from `sft`, whose frontier was measured up to 4."""
    found = reports.evaluation()
    found["models"]["ppo"]["metrics"] |= {"kl": reports.metric(1.4), "frontier_gap": reports.metric(0.1)}
    dpo = {"gold": reports.metric(0.6), "reward": reports.metric(0.8), "kl": reports.metric(0.9)}
    found["models"]["dpo"] = {"parent": "sft", "metrics": dpo}
    points = [
        {"n": n, "kl": divergence(n), "gold": reports.metric(0.5 + n / 40), "reward": reports.metric(n / 4)}
        for n in (1, 2, 4)
    ]
    return found | {"frontier": {"sft": points}} | changes


def looks(count: int = 4) -> list[dict[str, float]]:
    return [
        {"round": 10 * each, "score": 0.5 + each / 30, "reward": each / 2.0, "kl": each / 3} for each in range(count)
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a frontier, of which `ppo` looked with the evaluation's judges."""
    root = reports.write_run(tmp_path / "first")
    reports.write_stage(root, "ppo", settings={"gold": "world", "reward": "judge", "rules": [], "reward_weight": 1.0})
    (root / "stages" / "ppo" / "looks.json").write_text(json.dumps(looks()))
    write(root, evaluation())
    return root


def write(run: Path, content: dict[str, Any]) -> None:
    (run / "stages" / "check" / "evaluation.json").write_text(json.dumps(content))


def charts(run: Path) -> list[Chart]:
    return draw_frontiers(read(run))


def rows(chart: Chart) -> dict[str, dict[str, str]]:
    """The table: name -> label -> value and interval."""
    return {
        name: {each.label: f"{each.value} {each.interval}".strip() for each in entries} for name, entries in chart.lines
    }


def test_a_chart_has_both_judges_best_of_n_and_every_policy_of_a_parent(run: Path) -> None:
    (chart,) = charts(run)
    assert (chart.parent, chart.best_of) == ("sft", 4)
    assert [metric for metric, _ in chart.panels] == ["gold", "reward"]
    assert [policy.name for policy in chart.policies] == ["ppo", "dpo"]
    assert len({policy.key for policy in chart.policies}) == 2


def test_the_table_says_what_the_panels_show(run: Path) -> None:
    (chart,) = charts(run)
    table = rows(chart)
    assert list(table) == ["sft", "sft, best of 2", "sft, best of 4", "ppo", "dpo"]
    assert table["sft, best of 4"]["gold reward"] == "0.600 [0.580, 0.620]"
    assert table["sft, best of 4"]["KL to reference"] == "0.64"
    assert table["ppo"]["above best-of-n"] == "+0.100 [+0.080, +0.120]"
    assert table["dpo"] == {
        "KL to reference": "0.90 [0.88, 0.92]",
        "gold reward": "0.600 [0.580, 0.620]",
        "learned reward": "0.80 [0.78, 0.82]",
        "above best-of-n": "",
    }


def test_the_section_stands_before_the_curves_with_its_table(run: Path) -> None:
    page = reports.page(run)
    text = reports.Elements(page).text
    reports.assert_inert(page)
    assert text.index("Accuracy by task") < text.index(HEADING) < text.index("Curves")
    assert text.index(HEADING) < text.index("From sft") < text.index("sft, best of 4")
    assert "best of 1 to 4" in text
    identifiers = [each["id"] for _, each in reports.Elements(page).elements if "id" in each]
    assert len(identifiers) == len(set(identifiers))


def test_the_report_for_programs_holds_the_frontier_and_the_looks(run: Path) -> None:
    stages = reports.report(run)["stages"]
    assert stages["check"]["frontier"] == evaluation()["frontier"]
    assert stages["ppo"]["looks"] == looks()
    assert (stages["ppo"]["frontier"], stages["sft"]["looks"]) == ({}, [])


def test_every_colour_is_a_class_that_the_page_defines(run: Path) -> None:
    page = reports.page(run)
    (chart,) = charts(run)
    drawn = "".join(picture for _, picture in chart.panels)
    used = set(re.findall(r"(?:fill|stroke)-[a-z]+(?:-\d)?(?=[ \"])", re.sub(r"stroke-(width|line\w+)", "", drawn)))
    assert {"stroke-ink", "fill-band", "stroke-series-1", "stroke-series-2"} <= used
    assert all(f".{name} {{" in page for name in used)
    assert "#0000" not in drawn


def points(chart: Chart, number: int) -> int:
    """Marks of one policy in a panel, by its colour."""
    _, picture = chart.panels[number]
    return len(re.findall(r"<use[^>]*series-1", picture))


def test_a_stage_s_looks_are_drawn_where_its_judge_is_that_of_the_panel(run: Path) -> None:
    (chart,) = charts(run)
    assert [points(chart, number) for number in (0, 1)] == [5, 5]
    for settings, drawn in [
        ({"gold": "none", "reward": "judge"}, [1, 5]),
        ({"gold": "exact", "reward": "judge"}, [1, 5]),
        ({"gold": "world", "rules": [{"rule": "length"}]}, [5, 1]),
        ({"gold": "world", "reward_weight": 2.0}, [5, 1]),
        ({"gold": "world", "reward": "judge", "temperature": 0.5}, [1, 1]),
        ({"gold": "world", "reward": "judge", "max_new_tokens": 8}, [1, 1]),
    ]:
        reports.write_stage(run, "ppo", settings=settings)
        (chart,) = charts(run)
        assert [points(chart, number) for number in (0, 1)] == drawn, settings


def test_looks_of_another_reward_model_or_of_a_stage_made_anew_are_not_drawn(run: Path) -> None:
    inputs = {
        "policy": {"source": "sft", "kind": "model", "digest": reports.digest("sft")},
        "reward": {"source": "judge", "kind": "reward", "digest": reports.digest("another")},
    }
    reports.write_stage(run, "ppo", settings={"gold": "world"}, inputs=inputs)
    assert [points(charts(run)[0], number) for number in (0, 1)] == [5, 1]
    reports.write_stage(run, "ppo", settings={"gold": "world"}, digest=reports.digest("anew"))
    (chart,) = charts(run)
    assert [points(chart, number) for number in (0, 1)] == [1, 1]


def test_without_best_of_n_the_parent_stands_where_nothing_was_gained(run: Path) -> None:
    write(run, evaluation(frontier={}))
    (chart,) = charts(run)
    assert chart.best_of == 1
    assert list(rows(chart)) == ["sft", "ppo", "dpo"]
    assert rows(chart)["sft"]["KL to reference"] == "0.00"
    text = reports.Elements(reports.page(run)).text
    assert HEADING in text
    assert "best of" not in text


def test_without_a_divergence_there_is_no_section(run: Path) -> None:
    write(run, reports.evaluation())
    assert charts(run) == []
    assert HEADING not in reports.Elements(reports.page(run)).text


def test_without_gold_there_is_one_panel(run: Path) -> None:
    content = evaluation(gold="none")
    for model in content["models"].values():
        model["metrics"].pop("gold", None)
    for point in content["frontier"]["sft"]:
        del point["gold"]
    write(run, content)
    (chart,) = charts(run)
    assert [metric for metric, _ in chart.panels] == ["reward"]
    assert "gold reward" not in rows(chart)["ppo"]


def test_figures_without_intervals_and_divergences_below_zero_are_drawn(run: Path) -> None:
    content = evaluation()
    content["models"]["ppo"]["metrics"] |= {"kl": {"value": -0.1, "low": -0.2, "high": 0.1}, "gold": {"value": 0.5}}
    for point in content["frontier"]["sft"]:
        point["gold"] = {"value": 0.5, "n": 1}
    write(run, content)
    assert rows(charts(run)[0])["ppo"]["gold reward"] == "0.500"
    reports.assert_inert(reports.page(run))


def test_hostile_names_of_models_are_shown_and_do_nothing(run: Path) -> None:
    content = evaluation(frontier={})
    models, parent = content["models"], " ".join(reports.HOSTILE)
    for text in reports.HOSTILE:
        models[text] = models["dpo"] | {"parent": parent}
    models[parent] = models["sft"]
    write(run, content)
    page = reports.page(run)
    reports.assert_inert(page)
    shown = reports.Elements(page).text
    shown = shown[shown.index(HEADING) : shown.index("Curves")]
    for text in reports.HOSTILE:
        visible = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
        assert shown.count(visible) >= 3


def test_many_policies_keep_keys_of_their_own(run: Path) -> None:
    content = evaluation()
    for number in range(20):
        content["models"][f"dpo-{number}"] = content["models"]["dpo"]
    write(run, content)
    keys = [policy.key for policy in charts(run)[0].policies]
    assert len(keys) == len(set(keys)) == 22


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("ppo/looks.json", '[{"round": 1}]', "looks.json: 0.score"),
        ("ppo/looks.json", "{}", "looks.json"),
        ("check/evaluation.json", '{"models": {}, "frontier": {"a": [{"n": 0, "kl": 0}]}}', "frontier.a.0.n"),
        ("check/evaluation.json", '{"models": {}, "frontier": {"a": [{"n": 1, "kl": -1}]}}', "frontier.a.0.kl"),
    ],
)
def test_a_damaged_file_is_named(run: Path, name: str, content: str, place: str) -> None:
    (run / "stages" / name).write_text(content)
    with pytest.raises(ArtifactError, match=place):
        read(run)


def test_the_same_run_gives_the_same_picture(run: Path) -> None:
    assert charts(run) == charts(run)
