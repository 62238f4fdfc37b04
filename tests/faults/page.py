"""docs/reliability.md: what was found, part by part, with the command that finds it again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import lock

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = REPOSITORY / "docs" / "reliability.md"
INTRODUCTION = """\
# Reliability

What Baton promises of a run directory, and how often it held when things were broken on purpose. Every figure is
written by the command beside it; `make faults` runs them all. Processes are real ones that run the real functions;
they are killed by `strace` on entering a system call, or by another process. All but the promises, the guards and the
cost happens in memory (tmpfs), where a sync takes no time; these are in the temporary directory, of which the file
system is named.

* A stage or checkpoint is absent or complete and verified, whenever its process or the machine stops.
* Exit code 0 means that what was published survives a power cut (Linux; other systems sync less).
* What is not what was written is refused before its use, and the file named.
* One process works in a run directory, others end with 75; a lock goes with its holder.
* A run that was stopped goes on to the bytes that it would have come to.
* Nothing that was published is deleted: replaced stages are in `archive/`, damaged ones in `quarantine/`, until
  `baton gc --delete`.
"""


@dataclass(frozen=True)
class Figure:
    """How often something held."""

    what: str
    good: float
    of: float
    unit: str = ""
    """Empty for cases out of cases."""

    @property
    def found(self) -> str:
        """As the page says it."""
        good = f"{self.good:,}" if isinstance(self.good, int) else f"{self.good:.3g}"
        return f"{good} {self.unit}" if self.unit else f"{good} of {self.of:,}"


def keep(part: str, title: str, command: str, seconds: float, figures: Sequence[Figure]) -> None:
    """Remember what a part found, and write the page anew from what all parts found last."""
    RESULTS.mkdir(exist_ok=True)
    record = {
        **{"title": title, "command": command, "seconds": round(seconds), "commit": _commit(), "machine": _machine()},
        "figures": [asdict(figure) for figure in figures],
    }
    (RESULTS / f"{part}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write(parts: Sequence[str]) -> None:
    """Write the page from what the parts found last; a part that never ran is named."""
    lines = [INTRODUCTION]
    for part in parts:
        path = RESULTS / f"{part}.json"
        if path.exists():
            lines += _section(json.loads(path.read_text(encoding="utf-8")))
        else:
            lines += [f"`{part}` has not been run.", ""]
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _section(record: dict[str, Any]) -> list[str]:
    figures = [Figure(**figure) for figure in record["figures"]]
    rows = [f"| {figure.what} | {figure.found} |" for figure in figures]
    made = f"`{record['command']}`: {record['seconds']:,} s at {record['commit']} on {record['machine']}."
    return [f"## {record['title']}", "", "| what | held |", "|---|---|", *rows, "", made, ""]


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout

    outside = [":!tests/faults/results", ":!docs/reliability.md"]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *outside)
    return (git("rev-parse", "--short=10", "HEAD").strip() or "no commit") + (", changed" if changed else "")


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    cores = len(os.sched_getaffinity(0))
    kind = lock.file_system(Path("/tmp"))
    versions = f"Linux {platform.release()}, Python {platform.python_version()}, {kind}"
    return f"{cores} core{'s' * (cores > 1)} of an {model}, {versions}"
