"""The report of a run: `report.json` for programs and `report.html` for people, from manifests and logs.

Nothing is measured here and only small text files are read, so a report can be made on any machine that has
the run directory, and the same directory gives the same bytes every time.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline import durable, store
from pipeline.report.inputs import read
from pipeline.report.page import render
from pipeline.report.summary import summarise


def write(run_directory: Path) -> Path:
    """Write `report.json` and `report.html` into `run_directory` and return the path of the page.

    Each is replaced at once: a reader sees the old report or the new one.

    Raises:
        ArtifactError: When there are no finished stages, or a file of one is damaged.
        StorageError: When the report cannot be written.
    """
    run = read(run_directory)
    summary = summarise(run)
    page = render(run, summary)
    path = run_directory / "report.html"
    with store.storage_errors(path):
        as_json = json.dumps(summary, indent=2, sort_keys=True, allow_nan=False)
        durable.write_text(run_directory / "report.json", as_json + "\n")
        durable.write_text(path, page)
    return path


__all__ = ["write"]
