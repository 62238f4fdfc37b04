"""The report of a run: `report.json` for programs and `report.html` for people, from manifests and logs.

Nothing is measured here and only small text files are read, so a report can be made on any machine that has
the run directory, and the same directory gives the same bytes every time.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline import durable, store
from pipeline.errors import ArtifactError
from pipeline.report.inputs import read
from pipeline.report.page import render
from pipeline.report.summary import summarise
from pipeline.report.verdict import NOT_EVALUATED

PAGE, REPORT = "report.html", "report.json"


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
    path = run_directory / PAGE
    with store.storage_errors(path):
        as_json = json.dumps(summary, indent=2, sort_keys=True, allow_nan=False)
        durable.write_text(run_directory / REPORT, as_json + "\n")
        durable.write_text(path, page)
    return path


def sentence(run_directory: Path) -> str:
    """The first sentence of the report that is there, with what is to be held against it; nothing where no model was
    evaluated.

    Raises:
        ArtifactError: There is no report, or it is damaged.
    """
    path = run_directory / REPORT
    try:
        found = json.loads(path.read_bytes())["verdict"]
        return "" if found["state"] == NOT_EVALUATED else f"{found['sentence']} {found['caution']}".rstrip()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"not a report: {error!r:.80}", where=path, hint="`baton report RUN` writes it") from error


__all__ = ["PAGE", "REPORT", "sentence", "write"]
