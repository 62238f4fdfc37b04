"""Baton's side of a comparison: the real stage, of which only the progress is followed.

`python -m bench.ours JOB`
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.base import context
from bench.job import Job
from bench.watch import Watch
from pipeline import config
from pipeline.config import DataSource, StageSettings
from pipeline.contract import Artifact, Context

SETTINGS: dict[str, type[StageSettings]] = {
    "sft": config.SftSettings,
    "reward": config.RewardSettings,
    "dpo": config.DpoSettings,
    "pretrain": config.PretrainSettings,
}


class LastStepTakenError(Exception):
    """Ends a training of which only the steps are measured."""


class Steps:
    """Follows the progress of a stage."""

    def __init__(self, job: Job, watch: Watch) -> None:
        self._job, self._watch = job, watch
        self.losses: list[float] = []

    def __call__(self, record: Mapping[str, Any], *, done: int, total: int) -> None:
        """Note a step; after the last, go on only if its result is wanted."""
        self._watch.step()
        self.losses.append(record["loss"])
        if done == total and not self._job.result:
            raise LastStepTakenError


def stage_settings(job: Job) -> StageSettings:
    """The stage's settings: those that the peer is given too, and the job's own."""
    optimizer = {"learning_rate": job.learning_rate, "schedule": "constant", "warmup": 0.0, "betas": (0.9, 0.95)}
    given = {
        "policy": "base",
        "data": "rows",
        "steps": job.steps,
        "examples_per_step": job.examples_per_step,
        "max_length": job.max_length,
        "optimizer": optimizer,
    }
    return SETTINGS[job.kind].model_validate(_merged(given, job.settings))


def stage_context(job: Job, name: str, policy: Artifact | None = None, **options: Any) -> Context:
    """What the stage is run with, on the base or another policy; it writes into a new directory `name` within the
    material's."""
    directory = Path(job.result) if job.result else job.directory / name
    shutil.rmtree(directory, ignore_errors=True)
    source = DataSource(source=str(job.source))
    inputs = {"policy": policy or Artifact(job.base, "model", "base", source="base")}
    options = {"seed": job.seed, "device": job.device, "dtype": job.dtype, **options}
    return context(stage_settings(job), source, inputs, directory, **options)


def main() -> None:
    """Run one job."""
    job = Job.read(Path(sys.argv[1]))
    stage = import_module(f"stages.{job.kind}")
    watch = Watch(job)
    steps = Steps(job, watch)
    with suppress(LastStepTakenError):
        stage.run(stage_context(job, "ours", progress=steps))
    watch.report(steps.losses)


def _merged(given: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(given[key], over[key]) for key in given.keys() & over.keys() if isinstance(given[key], dict)}
    return {**given, **over, **both}


if __name__ == "__main__":
    main()
