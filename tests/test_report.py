"""The report: what it says, that it always says the same, and that nothing a model wrote can act in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import reports

from pipeline.errors import ArtifactError, StorageError
from pipeline.manifest import Metric
from pipeline.report import sentence, write
from pipeline.report.curves import draw_curves
from pipeline.report.inputs import ModelEvaluation
from pipeline.report.lineage import BOX_HEIGHT, BOX_WIDTH, lay_out
from pipeline.report.verdict import judge
from pipeline.report.wording import duration, number, size


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished six-stage run."""
    return reports.write_run(tmp_path / "first")


def test_the_verdict_comes_first_and_names_the_best_stage_and_its_gain(run: Path) -> None:
    sentence = "ppo is best and better than its parent sft: gold reward +0.200 [+0.180, +0.220] over 100 prompts."
    assert reports.report(run)["verdict"]["sentence"] == sentence
    text = reports.Elements(reports.page(run)).text
    assert text.index(sentence) < text.index("Lineage")


def test_report_json_holds_every_stage_with_its_parents_metrics_and_digests(run: Path) -> None:
    report = reports.report(run)
    manifest = run / "stages" / "ppo" / "manifest.json"
    stage = report["stages"]["ppo"]
    assert set(report) == {"run", "created_by", "command", "stages", "verdict", "requirements"}
    assert report["run"] == "first"
    assert report["command"] == "baton run 'runs/my first/config.yaml'"
    assert set(report["stages"]) == set(reports.PARENTS)
    assert stage["parents"] == reports.PARENTS["ppo"]
    assert stage["manifest_sha256"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert stage["metrics"]["gold_gain"] == pytest.approx(reports.metric(0.2))
    assert (stage["kind"], stage["stage_kind"], stage["digest"]) == ("adapter", "ppo", reports.digest("ppo"))
    assert stage["data"][0]["dropped"] == {"identical responses": 7}


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(run: Path, tmp_path: Path) -> None:
    page, data = reports.page(run), (run / "report.json").read_bytes()
    moved = shutil.copytree(run, tmp_path / "elsewhere" / "first")
    assert reports.page(moved) == page
    assert (moved / "report.json").read_bytes() == data
    assert data.decode() == json.dumps(json.loads(data), indent=2, sort_keys=True) + "\n"


def test_the_page_admits_its_own_style_and_nothing_else(run: Path) -> None:
    page = reports.page(run)
    reports.assert_inert(page)
    styles = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    policy = next(
        each for _, each in reports.Elements(page).elements if each.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(styles[0].encode()).digest()).decode()
    assert len(styles) == 1
    assert "url(" not in styles[0]
    assert policy["content"] == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_hostile_text_is_shown_and_does_nothing(run: Path) -> None:
    texts = reports.HOSTILE
    cards = [
        {"role": text, "source": text, "digest": text, "format": text, "rows": 1, "dropped": {text: 1}}
        for text in texts
    ]
    changes = {"warnings": texts, "command": " ".join(texts), "environment": {text: text for text in texts}}
    metrics = {text: reports.metric(1.0) for text in texts}
    reports.write_stage(run, "base", **changes, data=cards, metrics=metrics)
    inputs = {text: {"source": text, "kind": "model", "digest": text} for text in texts}
    reports.write_stage(run, "words", inputs=inputs, digest=reports.digest("words"))
    joined = " ".join(texts)
    sample = reports.sample(0, joined) | {"answer": joined, "prompt": [{"role": joined, "content": joined}]}
    responses = {text: text for text in texts}
    reports.write_lines(run / "stages" / "check" / "samples.jsonl", [sample | {"responses": responses}])
    config = "".join(f"# {text}\n" for text in texts)
    (run / "config.yaml").write_text(config, encoding="utf-8", errors="surrogatepass")
    for log in run.glob("stages/*/metrics.jsonl"):
        log.unlink()
    page = reports.page(run)
    reports.assert_inert(page)
    shown = reports.Elements(page).text
    for text in texts:
        visible = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
        assert shown.count(visible) >= 16, text


def test_hostile_names_of_figures_are_drawn_and_do_nothing(run: Path) -> None:
    figures = {text: 1.0 / number for number, text in enumerate(reports.HOSTILE, 1)}
    lines = [{"step": step, "total": 3, "seconds": 1.0, **figures, "loss": step} for step in (1, 2, 3)]
    reports.write_lines(run / "stages" / "sft" / "metrics.jsonl", lines)
    reports.assert_inert(reports.page(run))


def test_thirty_texts_and_more_are_tried() -> None:
    assert len(set(reports.HOSTILE)) >= 30


def test_only_the_first_six_prompts_are_shown_with_their_scores(run: Path) -> None:
    text = reports.Elements(reports.page(run)).text
    assert [number for number in range(8) if f"Question {number}:" in text] == [0, 1, 2, 3, 4, 5]
    assert "gold 1.00, reward −0.25" in text  # noqa: RUF001


def test_a_long_response_is_cut_and_says_so(run: Path) -> None:
    reports.write_lines(run / "stages" / "check" / "samples.jsonl", [reports.sample(0, "x" * 5_000)])
    page = reports.page(run)
    assert "cut here; 5,000 characters in all" in page
    assert "x" * 2_001 not in page


def test_sections_without_content_are_absent(tmp_path: Path) -> None:
    reports.write_stage(tmp_path, "words", data=[], environment={})
    text = reports.Elements(reports.page(tmp_path)).text
    headings = [
        "Each model",
        "Accuracy by task",
        "Curves",
        "Samples",
        "Data",
        "Environment",
        "warning",
        "Configuration",
    ]
    assert [heading for heading in headings if heading in text] == []
    assert "Not evaluated" in text
    assert "Cost" in text


def test_full_runs_have_every_section_in_order(run: Path) -> None:
    reports.write_stage(run, "judge", metrics={"pair_accuracy": reports.metric(0.8)}, warnings=["12 pairs tie"])
    text = reports.Elements(reports.page(run)).text
    headings = (
        *("1 warning", "Lineage", "Each model against its parent", "Accuracy by task"),
        *(
            "Measured by the stages",
            "Curves",
            "Samples",
            "Data",
            "Cost",
            "Digests",
            "Environment",
            "Make it again",
        ),
    )
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)


def test_a_stage_made_from_another_parent_is_warned_about(run: Path) -> None:
    reports.write_stage(run, "judge", digest=reports.digest("another"))
    stages = reports.report(run)["stages"]
    assert "made from another judge (reward)" in stages["ppo"]["warnings"][0]
    assert stages["sft"]["warnings"] == []


@pytest.mark.parametrize(("names", "told"), [
    ([], ""), (["judge"], ""), (["ppo"], "an earlier ppo"), (["sft"], "an earlier sft"),
    (["ppo", "sft"], "an earlier sft and ppo"), (["base"], "an earlier base"),
])  # fmt: skip
def test_a_verdict_of_models_that_were_made_anew_since_says_so(run: Path, names: list[str], told: str) -> None:
    for name in names:
        reports.write_stage(run, name, digest=reports.digest("another"))
    found = reports.report(run)["verdict"]
    expected = f"The evaluation is of {told} than the run's: evaluate again." if told else ""
    assert (found["stage"], found["caution"]) == ("ppo", expected)
    assert sentence(run) == f"{found['sentence']} {expected}".rstrip()


def test_reward_up_and_gold_down_is_called_over_optimised(run: Path) -> None:
    evaluation = reports.evaluation()
    evaluation["models"]["ppo"]["metrics"]["gold_gain"] = reports.metric(-0.1)
    (run / "stages" / "check" / "evaluation.json").write_text(json.dumps(evaluation))
    assert "over-optimised" in reports.report(run)["stages"]["ppo"]["warnings"][0]


def _models(**gains: tuple[float, Metric | None]) -> dict[str, ModelEvaluation]:
    found = {"start": ModelEvaluation(metrics={"gold": Metric(value=0.5)})}
    for name, (level, gain) in gains.items():
        metrics = {"gold": Metric(value=level)} | ({"gold_gain": gain} if gain else {})
        found[name] = ModelEvaluation(parent="start", metrics=metrics)
    return found


@pytest.mark.parametrize(
    ("level", "gain", "state", "words"),
    [
        (0.6, Metric(value=0.1, low=0.05, high=0.15), "better", "child is best"),
        (0.6, Metric(value=0.1, low=-0.01, high=0.2), "unclear", "includes 0"),
        (0.6, Metric(value=0.1, low=0.0, high=0.2), "unclear", "includes 0"),
        (0.6, Metric(value=0.1, n=1), "unclear", "no interval"),
        (0.6, Metric(value=-0.1, low=-0.2, high=-0.05), "worse", "worse than its parent"),
        (0.6, None, "no gain measured", "not compared"),
        (0.4, Metric(value=-0.1, low=-0.2, high=-0.05), "start is best", "No stage improves on start"),
    ],
)
def test_the_verdict_claims_no_more_than_the_interval(
    level: float, gain: Metric | None, state: str, words: str
) -> None:
    verdict = judge(_models(child=(level, gain)))
    assert verdict.state == state
    assert words in verdict.sentence


def test_a_verdict_by_the_learned_reward_warns_of_its_judge() -> None:
    metrics = {"reward": Metric(value=1.0), "reward_gain": Metric(value=1.0, low=0.5, high=1.5)}
    verdict = judge({"ppo": ModelEvaluation(parent="sft", metrics=metrics)})
    assert (verdict.state, verdict.metric) == ("better", "reward")
    assert "learned to please" in verdict.caution


def test_without_scores_nothing_is_called_better() -> None:
    assert judge({"sft": ModelEvaluation(metrics={"perplexity": Metric(value=3.0)})}).state == "not evaluated"
    assert judge({}).state == "not evaluated"


def test_unfinished_and_temporary_stages_are_not_reported(run: Path) -> None:
    shutil.copytree(run / "stages" / "sft", run / "stages" / "sft.tmp-1")
    (run / "stages" / "dpo").mkdir()
    assert set(reports.report(run)["stages"]) == set(reports.PARENTS)


def test_a_run_without_finished_stages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished stage"):
        write(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("sft/metrics.jsonl", '{"step": 1}\n{"step": 2', "metrics.jsonl:2"),
        ("sft/metrics.jsonl", "[1]\n", "metrics.jsonl:1"),
        ("check/samples.jsonl", '{"prompt": []}\n', "samples.jsonl:1: responses"),
        ("check/evaluation.json", '{"models": {"sft": {"metrics": {"gold": {"value": NaN}}}}}', "nan|NaN"),
        ("check/evaluation.json", '{"models": {"sft": {"metrics": {"gold": {"value": 1e999}}}}}', "1e999"),
        ("check/evaluation.json", '{"models": 3}', "evaluation.json: models"),
        ("sft/manifest.json", "{}", "manifest.json: stage"),
    ],
)
def test_a_damaged_file_is_named(run: Path, name: str, content: str, place: str) -> None:
    (run / "stages" / name).write_text(content)
    with pytest.raises(ArtifactError, match=place):
        write(run)


def test_stages_that_are_their_own_ancestors_are_refused(run: Path) -> None:
    inputs = {"model": {"source": "ppo", "kind": "adapter", "digest": reports.digest("ppo")}}
    reports.write_stage(run, "base", inputs=inputs)
    with pytest.raises(ArtifactError, match="own ancestors"):
        write(run)


def test_a_report_that_cannot_be_made_leaves_the_old_one(run: Path) -> None:
    before = reports.page(run)
    (run / "stages" / "sft" / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError):
        write(run)
    assert (run / "report.html").read_text(encoding="utf-8") == before
    assert not [path for path in run.iterdir() if path.name.startswith(".report")]


def test_no_room_for_the_report_is_a_storage_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="no space left"):
        write(run)
    assert not [path for path in run.iterdir() if "report" in path.name]


def test_boxes_never_overlap_and_long_arrows_run_clear_of_them() -> None:
    edges = {(parent, name): role for name, roles in reports.PARENTS.items() for role, parent in roles.items()}
    drawing = lay_out(edges, list(reports.PARENTS))
    for one, other in combinations(drawing.boxes, 2):
        assert abs(one.x - other.x) >= BOX_WIDTH or abs(one.y - other.y) >= BOX_HEIGHT
    for arrow in drawing.arrows:
        points = [(float(x), float(y)) for x, y in re.findall(r"(?:M|C.* )([\d.]+) ([\d.]+)(?= |$)", arrow.path)]
        ends = [float(each) for each in re.findall(r"[\d.]+", arrow.path)]
        boxes = {box.name: box for box in drawing.boxes}
        assert points[0][0] == pytest.approx(boxes[arrow.source].x + BOX_WIDTH, abs=0.1)
        assert ends[-2] == pytest.approx(boxes[arrow.target].x, abs=0.1)
        for start, height, end in _level_parts(arrow.path):
            crossed = [box for box in drawing.boxes if start - 1 < box.x < end]
            assert all(not box.y < height < box.y + BOX_HEIGHT for box in crossed)


def _level_parts(path: str) -> list[tuple[float, float, float]]:
    """(x, y, x) of every horizontal part."""
    parts = re.findall(r"([\d.]+) ([\d.]+) H([\d.]+)", path)
    return [(float(start), float(height), float(end)) for start, height, end in parts]


def test_curves_skip_what_is_not_a_finite_number() -> None:
    steps: list[dict[str, Any]] = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": "nan"},
        {"step": 3, "loss": 1.0},
        {"step": 4, "loss": True},
    ]
    curves = draw_curves("sft", steps)
    assert [(curve.quantity, curve.first, curve.last) for curve in curves] == [("loss", 2.0, 1.0)]
    assert draw_curves("sft", steps[:2]) == []


def test_pictures_on_one_page_share_no_identifier(run: Path) -> None:
    identifiers = [each["id"] for _, each in reports.Elements(reports.page(run)).elements if "id" in each]
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number("accuracy.sums", 0.1234), "12.3%"),
        (number("gold_gain", 0.5, signed=True), "+0.500"),
        (number("reward", -1.239), "\N{MINUS SIGN}1.24"),
        (duration(4.21), "4.2 s"),
        (duration(200), "3 min 20 s"),
        (duration(7_500), "2 h 05 min"),
        (size(2**20), "1 MiB"),
        (size(3 * 2**29), "1.5 GiB"),
    ],
)
def test_numbers_are_written_for_people(written: str, expected: str) -> None:
    assert written == expected


def test_writing_a_report_imports_neither_torch_nor_pyplot(run: Path) -> None:
    check = (
        "import sys; from pathlib import Path; from pipeline.report import write; write(Path(sys.argv[1]));"
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-W", "error", "-c", check, str(run)], check=False).returncode == 0


def test_answers_are_marked_against_the_parent_s_and_stay_inert(tmp_path: Path) -> None:
    run = reports.write_run(tmp_path)
    answer = f"Happy to help, the answer is {' '.join(reports.HOSTILE)} and no more."
    samples = [
        reports.sample(0, answer) | {"responses": {"sft": answer.replace("no more", "that is all"), "ppo": answer}}
    ]
    reports.write_lines(run / "stages" / "check" / "samples.jsonl", samples)
    found = reports.page(run)
    reports.assert_inert(found)
    assert "<ins> no more</ins>" in found
    assert "<del> that is all</del>" in found
    assert "ppo <small" in found
    assert "against sft" in reports.Elements(found).text


def test_alarms_of_training_stand_before_everything_but_the_verdict(tmp_path: Path) -> None:
    run = reports.write_run(tmp_path)
    alarm = "kl_runaway: divergence 21.7 after round 40"
    reports.write_stage(run, "ppo", warnings=[alarm])
    found = reports.page(run)
    assert found.index("verdict") < found.index(alarm) < found.index("<h2>Lineage</h2>")
