"""How the report shows the diagnostics of rounds: which, when they are marked, and looks beside them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import reports
from conftest import REPOSITORY

from pipeline.diagnostics import DIAGNOSTICS, SIGN_OF_A_ROUND
from pipeline.report.health import Trend, health, trends
from pipeline.report.inputs import read

HEADING = "Health"
LOOKS = [{"round": each, "score": 0.25 + each, "reward": each / 2, "kl": each / 4} for each in range(3)]


def rounds(name: str, values: list[Any]) -> list[dict[str, Any]]:
    """Records of rounds with one diagnostic; None where a round has not got it."""
    return [
        {"step": step, SIGN_OF_A_ROUND: 0.001} | ({} if value is None else {name: value})
        for step, value in enumerate(values, 1)
    ]


def trend(name: str, values: list[Any]) -> Trend:
    (found,) = [each for each in trends(rounds(name, values)) if each.diagnostic.name == name]
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run without an evaluation, in which `ppo` has logged all diagnostics and looked at held-out prompts."""
    return write_run(tmp_path / "first")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of that run, with every diagnostic drawn."""
    return reports.page(write_run(tmp_path_factory.mktemp("health")))


def write_run(directory: Path) -> Path:
    root = reports.write_run(directory)
    records = [
        {"step": step, "total": 12, "seconds": step} | {each.name: step / 100 for each in DIAGNOSTICS}
        for step in range(1, 13)
    ]
    reports.write_lines(root / "stages" / "ppo" / "metrics.jsonl", records)
    (root / "stages" / "ppo" / "looks.json").write_text(json.dumps(LOOKS))
    for path in (root / "stages" / "check").iterdir():
        path.unlink()
    return root


def section(page: str) -> str:
    """The markup of the section."""
    start = page.index(f"<h2>{HEADING}</h2>")
    return page[start : page.index("</section>", start)]


def test_a_trend_has_the_means_of_five_rounds_and_the_extremes_of_all() -> None:
    found = trend("kl", [0.0, 1.0, 2.0, 3.0, 4.0, 99.0, -7.0, 10.0, 11.0, 12.0, 13.0, 14.0])
    assert (found.first, found.last, found.least, found.most, found.rounds) == (2.0, 12.0, -7.0, 99.0, 12)


@pytest.mark.parametrize(
    ("values", "first", "last"),
    [
        ([3.0], 3.0, 3.0),
        ([3.0, 5.0], 3.0, 5.0),
        ([3.0, 4.0, 5.0], 3.0, 5.0),
        ([1.0, 3.0, 100.0, 5.0, 7.0], 2.0, 6.0),
        ([None, 1.0, None, 2.0], 1.0, 2.0),
    ],
)
def test_no_round_of_a_short_training_is_both_first_and_last(values: list[Any], first: float, last: float) -> None:
    found = trend("entropy", values)
    assert (found.first, found.last) == (first, last)


def test_figures_of_rounds_count_alone() -> None:
    records = [*rounds("kl", [1.0, None, 3.0]), {"step": 6, "kl": 50.0}]
    (found,) = [each for each in trends(records) if each.diagnostic.name == "kl"]
    assert (found.least, found.most, found.rounds) == (1.0, 3.0, 2)
    assert trends([{"step": 1, "loss": 1.0, "kl": 50.0, "reward": 1.0}]) == []


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_a_figure_that_is_not_finite_is_not_called_healthy(text: str) -> None:
    found = trend("ratio_max", [1.1] * 20 + [text] * 5)
    assert found.side == "not finite"
    assert (found.most, found.rounds) == (1.1, 25)
    assert json.dumps(found.as_json(), allow_nan=False)
    assert trend("gradient_norm", [text] * 10).side == "not finite"


@pytest.mark.parametrize(
    ("name", "path", "side"),
    [
        *[("length", [20.0, 200.0], "above"), ("length", [20.0, 10.0], "below"), ("length", [20.0, 24.0], "within")],
        *[("entropy", [1.0, 0.4], "below"), ("entropy", [1.0, 0.6], "within"), ("distinct_2", [0.9, 0.1], "below")],
    ],
)
def test_some_figures_are_held_against_their_start(name: str, path: list[float], side: str) -> None:
    assert trend(name, path).side == side


@pytest.mark.parametrize(
    ("name", "value", "side"),
    [
        *[("kl", -0.1, "within"), ("kl", -1.0, "below"), ("kl", 9.9, "within"), ("kl", 31.0, "above")],
        *[("explained_variance", 0.5, "within"), ("explained_variance", -0.3, "below"), ("ended", 0.7, "below")],
        *[("ratio_first", 1.0, "within"), ("ratio_first", 1.2, "above"), ("reward_deviation", 0.0, "below")],
        *[("rollout_gap", 0.05, "above"), ("clip_fraction", 0.1, "within"), ("clip_fraction", 0.5, "above")],
        *[("clip_fraction", 0.0, "within"), ("approximate_kl", 1e-9, "within"), ("approximate_kl", 0.1, "above")],
        *[("entropy", 1e9, "within"), ("reward", -1e9, None), ("gradient_norm", 1e9, None)],
    ],
)
def test_a_last_value_outside_of_the_healthy_range_is_told_from_one_within(
    name: str, value: float, side: str | None
) -> None:
    records = [{"step": 1, SIGN_OF_A_ROUND: 0.0, name: value}]
    (found,) = [each for each in trends(records) if each.diagnostic.name == name]
    assert found.side == side


def test_diagnostics_have_names_of_their_own_and_ranges_that_hold_something() -> None:
    assert len({each.name for each in DIAGNOSTICS}) == len(DIAGNOSTICS)
    assert all(each.low < each.high for each in DIAGNOSTICS)
    assert all(each.meaning and each.healthy for each in DIAGNOSTICS)


def test_the_guide_has_every_diagnostic_and_calls_the_same_healthy() -> None:
    guide = (REPOSITORY / "docs" / "ppo.md").read_text(encoding="utf-8")
    table = guide.partition("| figure | healthy |")[2].partition("\n\n")[0]
    lines = [line.split("|") for line in table.splitlines()[2:]]
    healthy = {name: line[2].strip() for line in lines for name in re.findall(r"`(\w+)`", line[1])}
    assert healthy == {each.name: each.healthy for each in DIAGNOSTICS}


def test_the_section_has_every_diagnostic_with_its_figures(page: str) -> None:
    reports.assert_inert(page)
    rows = re.findall(r"<tr><th><code>(\w+)</code>.*?</tr>", section(page))
    assert rows == [each.name for each in DIAGNOSTICS]
    (row,) = re.findall(r"<tr><th><code>entropy</code>.*?</tr>", section(page))
    assert re.findall(r"<td[^>]*>(.*?)</td>", row) == [
        "0.03",
        "0.1",
        "0.01",
        "0.12",
        "falls slowly, above half of its start",
    ]


def test_a_value_outside_of_its_range_is_marked_in_words_too(page: str) -> None:
    marked = re.findall(
        r'<code>(\w+)</code>(?:(?!</tr>).)*<span class="outside">.*?<small>(.*?)</small>', section(page)
    )
    sides = {each.name: each.side(0.1, 0.03) for each in DIAGNOSTICS}
    expected = {name: side for name, side in sides.items() if side in ("below", "above")}
    assert dict(marked) == {name: f"{side} its range" for name, side in expected.items()}
    assert {"ended", "rollout_gap", "ratio_first"} <= dict(marked).keys()


def test_every_cell_says_on_a_phone_what_it_is(page: str) -> None:
    cells = re.findall(r"<td([^>]*)>", section(page))
    assert len(cells) == 5 * len(DIAGNOSTICS) + 3 * len(LOOKS)
    assert all('data-label="' in each for each in cells)


def test_looks_stand_beside_the_diagnostics_without_an_evaluation(page: str) -> None:
    looks = section(page).partition("Looks at held-out prompts")[2]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(<th>round .*?)</tr>", looks)]
    assert rows == [
        ["round 0", "0.00", "0.250", "0.000"],
        ["round 1", "0.25", "1.250", "0.500"],
        ["round 2", "0.50", "2.250", "1.000"],
    ]
    assert page.count("Looks at held-out prompts") == 1


def test_looks_are_on_the_page_once_where_there_is_an_evaluation(run: Path) -> None:
    found = reports.evaluation()
    found["models"]["ppo"]["metrics"]["kl"] = reports.metric(1.4)
    (reports.write_stage(run, "check") / "evaluation.json").write_text(json.dumps(found))
    page = reports.page(run)
    text = reports.Elements(page).text
    assert text.index("Reward against divergence") < text.index(HEADING) < text.index("Curves")
    assert len(re.findall("[Ll]ooks (at|of)", text)) == 1


def test_every_diagnostic_is_drawn_once_it_was_logged_in_two_rounds(run: Path) -> None:
    records = rounds("kl", [0.1, 0.2, 0.3])
    records[0]["entropy"] = 2.0
    reports.write_lines(run / "stages" / "ppo" / "metrics.jsonl", records)
    (found,) = health(read(run))
    assert [(each.quantity, each.first, each.last) for each in found.curves] == [
        ("kl", 0.1, 0.3),
        (SIGN_OF_A_ROUND, 0.001, 0.001),
    ]
    assert [each.diagnostic.name for each in found.trends] == ["kl", "entropy", SIGN_OF_A_ROUND]


def test_all_curves_are_on_the_page_and_share_no_identifier(page: str) -> None:
    folded = section(page).partition("<details>")[2]
    assert re.findall(r"<figcaption><b>(\w+)</b>", folded) == [each.name for each in DIAGNOSTICS]
    assert folded.count("<svg") == len(DIAGNOSTICS)
    identifiers = [each["id"] for _, each in reports.Elements(page).elements if "id" in each]
    assert len(identifiers) == len(set(identifiers))


def test_a_training_of_many_rounds_does_not_make_a_heavy_page(run: Path) -> None:
    records = [
        {"step": step, "total": 3000, "seconds": step}
        | {each.name: math.sin(step * place) for place, each in enumerate(DIAGNOSTICS, 1)}
        for step in range(1, 3001)
    ]
    reports.write_lines(run / "stages" / "ppo" / "metrics.jsonl", records)
    assert len(section(reports.page(run)).encode()) < 300_000


def test_a_stage_that_has_only_looks_shows_them(run: Path) -> None:
    (run / "stages" / "ppo" / "metrics.jsonl").unlink()
    page = section(reports.page(run))
    assert "Looks at held-out prompts" in page
    assert "<code>" not in page


def test_without_rounds_and_looks_there_is_no_section(run: Path) -> None:
    (run / "stages" / "ppo" / "metrics.jsonl").unlink()
    (run / "stages" / "ppo" / "looks.json").unlink()
    assert f"<h2>{HEADING}</h2>" not in reports.page(run)


def test_the_report_for_programs_has_the_same_figures(run: Path) -> None:
    stages = reports.report(run)["stages"]
    found = stages["ppo"]["health"]
    assert found.keys() == {each.name for each in DIAGNOSTICS}
    assert found["ended"] == {
        **{"first": pytest.approx(0.03), "last": pytest.approx(0.1), "least": 0.01, "most": 0.12},
        **{"rounds": 12, "healthy": "above 0.9", "side": "below"},
    }
    assert stages["sft"]["health"] == {}


def test_a_stage_s_own_reward_is_what_it_trains_for_and_not_an_evaluation_s(tmp_path: Path) -> None:
    run = reports.write_run(tmp_path)
    reports.write_stage(run, "ppo", metrics={"reward": reports.metric(1.25), "kl": reports.metric(2.0)})
    text = reports.Elements(reports.page(run)).text
    compared, _, own = text.partition("Measured by the stages themselves")
    own = own.partition("Curves")[0]
    assert "reward trained for" in own
    assert "KL to reference" in own
    assert "learned reward" not in own
    assert "learned reward" in compared


def test_the_loss_of_a_policy_is_drawn_beside_the_four_curves(run: Path) -> None:
    figures = dict.fromkeys(("reward", "kl", "entropy", "clip_fraction", "policy_loss", "value_loss"), 0.5)
    reports.write_lines(run / "stages" / "ppo" / "metrics.jsonl", [{"step": step, **figures} for step in (1, 2)])
    curves = reports.page(run).partition("<h2>Curves</h2>")[2].partition("<h3>ppo ")[2].partition("</section>")[0]
    names = re.findall(r"<figcaption><b>(.*?)</b>", curves.partition("<h3>")[0])
    assert names == ["reward", "kl", "entropy", "clip fraction", "policy loss"]
