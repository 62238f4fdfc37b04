"""What a running stage shows, and what it leaves on disk."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.diagnostics import DIAGNOSTICS
from pipeline.progress import StageProgress
from pipeline.terminal import printable, printable_lines, table


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def progress(tmp_path: Path, clock: Clock, output: io.StringIO) -> Iterator[StageProgress]:
    console = Console(file=output, markup=False, emoji=False, highlight=False, soft_wrap=True)
    with StageProgress("sft", tmp_path, console, clock) as progress:
        yield progress


def records(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_every_record_is_on_disk_at_once(progress: StageProgress, clock: Clock, tmp_path: Path) -> None:
    progress({"loss": 2.5, "phase": "warm"}, done=1, total=4)
    clock.now += 1.25
    progress({"loss": 1.5}, done=2, total=4)
    assert records(tmp_path) == [
        {"step": 1, "total": 4, "seconds": 0.0, "loss": 2.5, "phase": "warm"},
        {"step": 2, "total": 4, "seconds": 1.25, "loss": 1.5},
    ]


def test_figures_that_are_not_finite_are_valid_json(progress: StageProgress, tmp_path: Path) -> None:
    progress({"loss": float("nan"), "kl": float("-inf")}, done=1, total=1)
    assert records(tmp_path)[0]["loss"] == "nan"
    assert records(tmp_path)[0]["kl"] == "-inf"


def test_lines_come_every_tenth_of_the_steps(progress: StageProgress, output: io.StringIO) -> None:
    for step in range(1, 1001):
        progress({"loss": 1.0}, done=step, total=1000)
    assert len(output.getvalue().splitlines()) == 10


def test_lines_come_every_ten_seconds(progress: StageProgress, clock: Clock, output: io.StringIO) -> None:
    for step in range(1, 101):
        clock.now += 1
        progress({"loss": 1.0}, done=step, total=10_000)
    assert len(output.getvalue().splitlines()) == 10


def test_a_stage_that_logs_nothing_leaves_no_log(tmp_path: Path) -> None:
    with StageProgress("sft", tmp_path, Console(file=io.StringIO())):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_gets_a_bar_and_the_bar_goes(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120, color_system=None)
    with StageProgress("sft", tmp_path, console) as progress:
        progress({"loss": 0.12345}, done=3, total=4)
    assert "3/4" in output.getvalue()
    assert "loss 0.1235" in output.getvalue()


ROUND = {"tokens": 7.0, "loss": 1.5, "learning_rate": 0.25} | {each.name: 0.5 for each in reversed(DIAGNOSTICS)}


def names(line: str) -> list[str]:
    """The fields after the name and the steps, which are two cells apart."""
    return [field.split(" ")[0] for field in line.rstrip().split("  ")[1:]]


def test_a_line_of_a_round_has_all_of_its_diagnostics_the_most_telling_first(
    progress: StageProgress, output: io.StringIO
) -> None:
    progress(ROUND, done=1, total=1)
    (line,) = output.getvalue().splitlines()
    assert names(line) == [*(each.name for each in DIAGNOSTICS), "loss", "learning_rate"]
    assert line.startswith("sft: 1/1  reward 0.5  kl 0.5  entropy 0.5  explained_variance 0.5  ended 0.5  length 0.5")


def test_a_line_of_a_round_has_no_figure_that_the_round_has_not(progress: StageProgress, output: io.StringIO) -> None:
    progress({"kl": 0.1, "reward": -1.0, "rollout_gap": 0.0}, done=1, total=1)
    assert output.getvalue() == "sft: 1/1  reward -1  kl 0.1  rollout_gap 0\n"


def test_the_line_of_another_stage_has_its_own_few_figures(progress: StageProgress, output: io.StringIO) -> None:
    record = {"learning_rate": 0.1, "gradient_norm": 3.0, "entropy": 1.0, "kl": 0.2, "accuracy": 0.9, "loss": 2.0}
    progress(record, done=1, total=1)
    assert output.getvalue() == "sft: 1/1  loss 2  accuracy 0.9  kl 0.2  learning_rate 0.1\n"


def on_a_bar(directory: Path, width: int, record: dict[str, float], total: int = 60) -> str:
    """What is left in the last line of a bar behind the time, on a terminal of so many cells."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, color_system=None)
    with StageProgress("sft", directory, console) as progress:
        progress(record, done=50, total=total)
    shown = [line for line in output.getvalue().replace("\r", "\n").splitlines() if f"50/{total} -:--:-- " in line]
    return shown[-1].partition("-:--:-- ")[2].rstrip()


@pytest.mark.parametrize("width", [45, 60, 79, 80, 81, 100, 137, 200, 300, 1000])
def test_a_bar_has_as_many_whole_figures_as_the_terminal_is_wide(tmp_path: Path, width: int) -> None:
    whole = [f"{each.name} 0.5" for each in DIAGNOSTICS] + ["loss 1.5", "learning_rate 0.25"]
    shown = on_a_bar(tmp_path, width, ROUND).split("  ")
    room = width - len("sft 50/60 00:00:00 ") - len("x" * 10 + " ")
    assert shown == whole[: len(shown)]
    assert len("  ".join(shown)) <= room
    assert len(shown) == len(whole) or len("  ".join(whole[: len(shown) + 1])) > room


@pytest.mark.parametrize(("width", "shown"), [(34, ""), (40, "reward 0.5")])
def test_a_bar_on_a_narrow_terminal_has_the_first_figure_or_none(tmp_path: Path, width: int, shown: str) -> None:
    assert on_a_bar(tmp_path, width, ROUND) == shown


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (50, "loss 0.7164"),
        (64, "loss 0.7164  accuracy 0.8182"),
        (90, "loss 0.7164  accuracy 0.8182  learning_rate 1.492e-08"),
    ],
)
def test_a_bar_of_another_stage_has_whole_figures_too(tmp_path: Path, width: int, shown: str) -> None:
    record = {"loss": 0.71639, "accuracy": 0.81818, "learning_rate": 1.492e-08}
    assert on_a_bar(tmp_path, width, record, total=1000) == shown


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_long_name_is_cut_before_steps_and_time_are(tmp_path: Path, width: int) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, color_system=None)
    with StageProgress("a-rather-long-name-of-a-stage", tmp_path, console) as progress:
        progress(ROUND, done=50, total=60)
    assert re.search(r"a-rather\S*… .*50/60 -:--:-- ", output.getvalue())


def test_what_a_stage_says_is_harmless(progress: StageProgress, output: io.StringIO) -> None:
    progress.say("a\x1b[31mred\x1b]8;;http://x\x07 [bold]b\u202e\n:smile: " + "x" * 1000)
    (line,) = output.getvalue().splitlines()
    assert line.startswith(r"sft: a\x1b[31mred\x1b]8;;http://x\x07 [bold]b\u202e\n:smile: xxx")
    assert len(line) == len("sft: ") + 400


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("Grüße, 世界 🙂", "Grüße, 世界 🙂"),
        ("\x00\x07\x1b\x7f\x9b", r"\x00\x07\x1b\x7f\x9b"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("\u202a\u2066\u200b\ufeff", r"\u202a\u2066\u200b\ufeff"),
        ("\ud800", r"\ud800"),
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"),
        ("y" * 81, "y" * 77 + "..."),
    ],
)
def test_text_from_files_is_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert shown.isprintable()


def test_lines_stay_lines() -> None:
    assert printable_lines("a\x1b\nb\n" + "c" * 200) == "a\\x1b\nb\n" + "c" * 200


def test_a_table_lines_up() -> None:
    assert table(("a", "bb"), [("ccc", "d"), ("e\n", "")]) == "a    bb\nccc  d\ne\\n"
