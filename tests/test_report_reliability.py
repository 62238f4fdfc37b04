"""The report's reliability diagrams: what is drawn, what is written, and that names cannot act in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import reports

from pipeline.report.inputs import read
from pipeline.report.picture import CLASSES
from pipeline.report.suites import suites
from reward import calibration

MARGINS = [0.1, -0.1, 0.3, 0.3, -0.5, 0.9, 1.2, 2.0, 2.0, -2.0, 3.5, 4.0, 9.0, 0.0]


def evaluation(judge: str = "judge", **bins: Any) -> dict[str, Any]:
    """An evaluation with a suite that measures a reward model."""
    curve = [vars(each) for each in calibration.curve(MARGINS)]
    error = calibration.expected_error(MARGINS).model_dump()
    metrics = {"suite.manners": reports.metric(0.7), "suite.manners_calibration_error": error}
    suite = {
        "method": "preference",
        "measures": "Polite replies preferred.",
        "observations": len(MARGINS),
        "calibration": {judge: curve} | bins,
    }
    found = reports.evaluation()
    found["models"][judge] = {"parent": None, "metrics": metrics}
    return found | {"suites": {"manners": suite}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose evaluation measured how sure its reward model is."""
    root = reports.write_run(tmp_path / "first")
    write(root, evaluation())
    return root


def write(run: Path, content: dict[str, Any]) -> None:
    (run / "stages" / "check" / "evaluation.json").write_text(json.dumps(content))


def picture(run: Path) -> str:
    (table,) = suites(read(run))
    (found,) = table.calibration
    return str(found.picture)


def shapes(picture: str, name: str) -> list[list[tuple[float, float]]]:
    """Corners of every path of a class, in the picture's units."""
    found = []
    for path in re.findall(r"<path[^>]*>", picture):
        if f'class="{name}"' in path:
            numbers = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)
            found.append([(float(x), float(y)) for x, y in numbers])
    return found


def test_bars_and_points_stand_where_the_bins_are(run: Path) -> None:
    drawn, curve = picture(run), calibration.curve(MARGINS)
    (diagonal,) = shapes(drawn, "stroke-ink")
    (left, foot), (right, head) = diagonal[0], diagonal[-1]  # confidence and share of 0.5, and of 1
    share = (foot - head) / 0.5
    expected = [
        (left + (each.confidence - 0.5) / 0.5 * (right - left), head + (1 - each.accuracy) * share) for each in curve
    ]
    points = max(shapes(drawn, f"stroke-{CLASSES['#000002']}"), key=len)
    assert points == [pytest.approx(each, abs=0.01) for each in expected]
    bars = shapes(drawn, "fill-band")
    assert len(bars) == len(curve)
    for bar, (place, height) in zip(bars, expected, strict=True):
        assert min(x for x, _ in bar) - 1.5 < place < max(x for x, _ in bar) + 1.5
        assert min(y for _, y in bar) == pytest.approx(height, abs=0.01)


def test_every_bar_has_its_number_of_pairs(run: Path) -> None:
    written = re.findall(r">([\d,]+)</text>", picture(run))
    assert written[-len(calibration.curve(MARGINS)) :] == [str(each.n) for each in calibration.curve(MARGINS)]


def test_the_caption_has_the_expected_calibration_error_and_the_table_the_bins(run: Path) -> None:
    page = reports.page(run)
    text = " ".join(reports.Elements(page).text.split())
    error = calibration.expected_error(MARGINS)
    assert "How sure judge is and how often it is right" in text
    assert error.low is not None
    assert error.high is not None
    written = f"{error.value:.1%} [{error.low:.1%}, {error.high:.1%}]"
    assert f"Expected calibration error {written}: the mean distance from the diagonal over 14 pairs." in text
    for each in calibration.curve(MARGINS):
        assert f'data-label="Mean confidence">{each.confidence:.3f}</td>' in page
    reports.assert_inert(page)


def test_each_reward_model_has_its_diagram_and_a_page_is_the_same_again(run: Path) -> None:
    write(run, evaluation(other=[{"confidence": 1.0, "accuracy": 0.5, "n": 2000}]))
    (table,) = suites(read(run))
    assert [each.model for each in table.calibration] == ["judge", "other"]
    assert [each.error != "" for each in table.calibration] == [True, False]
    assert ">2,000</text>" in table.calibration[1].picture
    page = reports.page(run)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert page == reports.page(run)


@pytest.mark.slow
def test_hostile_names_of_reward_models_are_shown_and_do_nothing(run: Path) -> None:
    write(run, evaluation(**{name: [{"confidence": 0.7, "accuracy": 0.5, "n": 2}] for name in reports.HOSTILE}))
    page = reports.page(run)
    reports.assert_inert(page)
    shown = reports.Elements(page).text
    for name in reports.HOSTILE:
        visible = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)
        assert shown.count(visible) >= 2
