"""Where a running stage is: a bar on a terminal, now and then a line elsewhere, every record on disk."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from pipeline.diagnostics import DIAGNOSTICS, is_round
from pipeline.redaction import redacted
from pipeline.terminal import printable

FILE_NAME = "metrics.jsonl"
SECONDS_BETWEEN_LINES = 10.0
SHARE_BETWEEN_LINES = 0.1
SHOWN = ("loss", "reward", "score", "accuracy", "kl", "learning_rate")
"""Fields that are worth a place beside the bar, when a record has them."""
SHOWN_OF_ROUNDS = tuple(dict.fromkeys((*(each.name for each in DIAGNOSTICS), *SHOWN)))
"""The same of records of rounds of sampling and learning, most telling first."""
GAP = "  "
NARROWEST_BAR = 10
"""Cells that the bar itself keeps on a narrow terminal."""
TIME = len("00:00:00")


class StageProgress:
    """Logs the records of one stage to `metrics.jsonl` and shows them; a context manager.

    Attributes:
        earlier: Seconds that an attempt took from which this one went on.

    Args:
        name: The stage.
        directory: The stage's work directory.
        console: Where to show; a bar when it is a terminal.
        clock: Seconds; for tests.
        mirror: Is handed every record of the log in order, those of an earlier attempt that this one goes on from too.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
        mirror: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> None:
        self._name = name
        self._console = console
        self._mirror = mirror
        self._clock = clock
        self._started = self._line_at = clock()
        self.earlier = 0.0
        self._line_share = 0.0
        self._log = (directory / FILE_NAME).open("a", encoding="utf-8")
        self._bar = _bar(console) if console.is_terminal else None
        self._task = self._bar.add_task(name, total=None, figures="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        self._log.close()
        path = Path(self._log.name)
        if path.exists() and path.stat().st_size == 0:
            path.unlink()

    def __call__(self, record: Mapping[str, Any], *, done: int, total: int) -> None:
        """Log one record after `done` of `total` steps."""
        seconds = self._clock() - self._started
        line = {"step": done, "total": total, "seconds": round(seconds, 3), **record}
        fields = {name: _plain(value) for name, value in line.items()}
        self._log.write(json.dumps(fields, allow_nan=False) + "\n")
        self._log.flush()
        self._mirror(fields)
        self._show(fields, done, total)

    def copy_to(self, path: Path) -> None:
        """Copy the records."""
        shutil.copyfile(self._log.name, path)

    def take_up(self, path: Path) -> None:
        """Go on after the records of an earlier attempt: they take the place of this one's, and its time counts."""
        text = path.read_text(encoding="utf-8")
        self._log.truncate(0)
        self._log.write(text)
        self._log.flush()
        records = [json.loads(line) for line in text.splitlines()]
        for record in records:
            self._mirror(record)
        self.earlier = float(records[-1]["seconds"]) if records else 0.0
        self._started = self._clock() - self.earlier

    def say(self, text: str) -> None:
        """Print one line of the stage's."""
        self._console.print(f"{self._name}: {printable(text, 400)}")

    def _show(self, fields: Mapping[str, Any], done: int, total: int) -> None:
        figures = _figures(fields)
        if self._bar and self._task is not None:
            fitting = _fitting(figures, self._room(total))
            self._bar.update(self._task, completed=done, total=total, figures=GAP.join(fitting))
        elif self._line_is_due(done, total):
            self._console.print(f"{self._name}: {done}/{total}{GAP}{GAP.join(figures)}".rstrip())

    def _room(self, total: int) -> int:
        """Cells that name, bar, steps and time leave for figures."""
        name = min(cell_len(self._name), _longest_name(self._console))
        columns = (name, NARROWEST_BAR, len(f"{total}/{total}"), TIME)
        return self._console.width - sum(columns) - len(columns)

    def _line_is_due(self, done: int, total: int) -> bool:
        now, share = self._clock(), done / max(total, 1)
        due = (
            done == total
            or share - self._line_share >= SHARE_BETWEEN_LINES
            or now - self._line_at >= SECONDS_BETWEEN_LINES
        )
        if due:
            self._line_at, self._line_share = now, share
        return due


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn(
            "{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=_longest_name(console))
        ),
        BarColumn(),  # gives way where the terminal is narrow
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
        transient=True,
    )


def _longest_name(console: Console) -> int:
    """Cells that a stage's name takes at most."""
    return console.width // 4


def _plain(value: Any) -> Any:
    """A number, text without secrets or truth value for JSON, which has no NaN: that is written as text."""
    if isinstance(value, str):
        return redacted(value)
    if value is None or isinstance(value, bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _figures(fields: Mapping[str, Any]) -> list[str]:
    """The fields that are worth showing, each with its name."""
    shown = SHOWN_OF_ROUNDS if is_round(fields) else SHOWN
    return [f"{name} {_figure(fields[name])}" for name in shown if name in fields]


def _fitting(figures: Sequence[str], room: int) -> Sequence[str]:
    """As many of the first figures as so many cells have room for."""
    ends = accumulate(cell_len(each) + len(GAP) for each in figures)
    return figures[: sum(end - len(GAP) <= room for end in ends)]


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value), 20)
