"""What a running stage shows, and what it leaves on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

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
