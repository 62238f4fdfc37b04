"""Runs the stages of a configuration that need it, one after another, and publishes each when it is done.

Every stage is planned again right before it runs, when the contents of its inputs are known: a stage whose
inputs came out as they were is kept. What was published stays published, whatever happens later.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import (
    checkpoints,
    checks,
    durable,
    fingerprint,
    forecast,
    gate,
    handover,
    inputs,
    loader,
    lock,
    memory,
    store,
    terminal,
    tracking,
)
from pipeline import manifest as manifests
from pipeline.config import PRODUCES, RunSettings, evaluated, trained
from pipeline.contract import Artifact, Context, Result
from pipeline.cost import Meter
from pipeline.errors import ConfigError, NumericalError, RequirementError
from pipeline.interruption import Interruption
from pipeline.manifest import Cost, InputRecord, Manifest
from pipeline.plan import Decision, decide, plan, sources
from pipeline.progress import StageProgress
from pipeline.redaction import redacted, redacted_texts
from pipeline.resumption import StageCheckpoints
from pipeline.store import RunDirectory
from pipeline.terminal import printable


@dataclass(frozen=True)
class Outcome:
    """What became of one stage."""

    stage: str
    ran: bool
    manifest: Manifest


def run(
    settings: RunSettings,
    *,
    only: Collection[str] = (),
    until: str | None = None,
    force: Collection[str] = (),
    strict: bool = False,
    command: str = "",
    console: Console | None = None,
) -> list[Outcome]:
    """Bring the selected stages up to date and write the report.

    Args:
        settings: The run.
        only: Just these stages.
        until: This stage and what it needs.
        force: Run these whether or not anything changed.
        strict: Let changed code and environment count as reasons to run.
        command: What reproduces a stage when ` --only STAGE` is added; recorded in its manifest.
        console: Where to print; standard output when None.

    Raises:
        BatonError: A stage's own error, or one of planning and publishing; earlier stages are kept.
        RequirementError: An evaluation is not as required; it is published, and the report written.
        Interrupted: A signal came.
    """
    _refuse_several_processes()
    tracking.require(settings.track)
    directory = RunDirectory.of(settings)
    _refuse_foreign_directory(directory)
    runner = _Runner(settings, directory, command, console or terminal.console())
    with store.lock(directory), runner.interruption.watch(), store.storage_errors(directory.root):
        runner.warn_of_locks()
        return runner.run(only, until, force, strict)


class _Runner:
    def __init__(self, settings: RunSettings, directory: RunDirectory, command: str, console: Console) -> None:
        self.settings = settings
        self.directory = directory
        self.command = command
        self.console = console
        self.interruption = Interruption()

    def warn_of_locks(self) -> None:
        """Say so where nobody knows whether a lock holds between machines."""
        if caveat := lock.caveat(self.directory.root):
            self.console.print(f"warning: {printable(str(self.directory.root), None)}: {caveat}")

    def run(self, only: Collection[str], until: str | None, force: Collection[str], strict: bool) -> list[Outcome]:
        decisions = plan(self.settings, only=only, until=until, force=force, strict=strict)
        checks.check_device(self.settings, [decision.stage for decision in decisions if decision.run])
        forecast.require_fit(self.settings, decisions)
        reconfigured = loader.write_resolved(self.settings, self.directory.config)
        outcomes = [self._bring_up_to_date(decision, decision.stage in force, strict) for decision in decisions]
        if not any(outcome.ran for outcome in outcomes):
            self.console.print("nothing to do: every stage is up to date")
        self._report(outcomes, reconfigured)
        self._check(outcomes)
        return outcomes

    def _bring_up_to_date(self, planned: Decision, forced: bool, strict: bool) -> Outcome:
        name = planned.stage
        decision = planned
        if planned.run:  # a stage that was planned to be kept has no input that ran since
            verify = cache(manifests.verify)  # a base that several inputs share is hashed once
            decision = decide(self.settings, name, forced=forced, strict=strict, download=True, verify=verify)
        if not decision.run:
            if planned.run:
                self.console.print(f"{name}: kept, its inputs came out the same")
            for reason in decision.reasons:
                self.console.print(f"{name}: kept, though different: {reason}")
            return Outcome(name, False, manifests.load(self.directory.stage(name)))
        self.console.print(f"{name}: running ({'; '.join(map(str, decision.reasons))})")
        manifest = self._run_stage(decision)
        cost = manifest.cost
        what = f"{cost.seconds:.1f} s, {cost.tokens:,} tokens, {memory.peak_in_words(cost)}"
        self.console.print(f"{name}: done in {what}")
        return Outcome(name, True, manifest)

    def _run_stage(self, decision: Decision) -> Manifest:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        if decision.damaged:
            kept = store.quarantine(self.directory, decision.stage)
            self.console.print(f"{decision.stage}: damaged, moved to {printable(str(kept), None)}")
        store.check_space(self.directory.root, _expected_size(decision))
        work = store.begin(self.directory, decision.stage)
        try:
            result, cost = self._compute(decision, work)
            manifest = self._manifest(decision, result, cost, work, started)
            with self.interruption.wait():
                store.publish(work, self.directory, decision.stage, manifest)
                self._remember(decision, started, "published")
                checkpoints.clear(self.directory.checkpoints(decision.stage))
        except BaseException as error:
            self._give_up(decision, work, started, error)
            raise
        return manifest

    def _compute(self, decision: Decision, work: Path) -> tuple[Result, Cost]:
        name = decision.stage
        stage = self.settings.stages[name]
        module = importlib.import_module(f"stages.{stage.kind}")
        meter = Meter()
        with (
            tracking.mirrored(self.settings.track, self._tracked(decision), self.console.print) as mirror,
            StageProgress(name, work, self.console, mirror=mirror) as progress,
        ):
            context = Context(
                name=name,
                settings=stage,
                inputs=decision.wanted.artifacts,
                data=sources(self.settings, stage),
                directory=work,
                progress=progress,
                say=progress.say,
                seed=self.settings.seed,
                device=self.settings.device,
                dtype=self.settings.dtype,
                memory=self.settings.memory_limit,
                sources=self.settings.data,
                trained=trained(self.settings),
                pretrained=trained(self.settings, text=True),
                evaluated=evaluated(self.settings, stage),
                checkpoints=self._checkpoints(decision, progress),
            )
            result: Result = module.run(context)
        _refuse_not_finite(name, result)
        cost = meter.read(result.tokens, progress.earlier)
        return result, cost.model_copy(update={"expected_memory": result.expected_memory})

    def _tracked(self, decision: Decision) -> tracking.Tracked:
        root, wanted = self.directory.root, decision.wanted
        return tracking.Tracked(root.resolve().name, root, decision.stage, decision.kind, wanted.key, wanted.settings)

    def _checkpoints(self, decision: Decision, progress: StageProgress) -> StageCheckpoints:
        place, minutes = self.directory.checkpoints(decision.stage), self.settings.checkpoint_minutes
        return StageCheckpoints(place, decision.maker, minutes, progress, self.interruption)

    def _manifest(self, decision: Decision, result: Result, cost: Cost, work: Path, started: str) -> Manifest:
        outputs = durable.inventory(work)
        wanted = decision.wanted
        code = {"code": fingerprint.sources(decision.kind)}
        return Manifest(
            stage=decision.stage,
            stage_kind=decision.kind,
            kind=result.kind,
            key=wanted.key,
            digest=manifests.content_digest(outputs),
            inputs={role: self._input_record(artifact) for role, artifact in wanted.artifacts.items()},
            settings=wanted.settings,
            data_settings=wanted.data,
            data=[card.model_copy(update={"source": redacted(card.source)}) for card in result.data],
            outputs=outputs,
            adaptation=result.adaptation,
            tokenizer=result.tokenizer,
            model=handover.describe(work),
            metrics=result.metrics,
            cost=cost,
            environment=redacted_texts(fingerprint.environment() | code | result.compute),
            seed=self.settings.seed,
            warnings=redacted_texts(result.warnings),
            command=redacted(f"{self.command} --only {shlex.quote(decision.stage)}".strip()),
            started=started,
        )

    def _input_record(self, artifact: Artifact) -> InputRecord:
        directory = artifact.directory.absolute()
        root = self.directory.root.absolute()
        inside = directory.is_relative_to(root)
        return InputRecord(
            source=artifact.source,
            kind=artifact.kind,
            digest=artifact.digest,
            manifest_sha256=manifests.sha256(artifact.directory) if artifact.manifest else None,
            directory=(directory.relative_to(root) if inside else directory).as_posix(),
        )

    def _give_up(self, decision: Decision, work: Path, started: str, error: BaseException) -> None:
        """Put the attempt aside; that this may fail on a full file system must not hide the first error."""
        if not work.exists():  # it was published before the error came
            return
        full = store.hides_no_space(error, work)
        with self.interruption.wait(), contextlib.suppress(OSError):
            store.fail(self.directory, work)
            stopped = isinstance(error, KeyboardInterrupt)
            outcome = "interrupted" if stopped else f"{type(error).__name__}: {error}"
            self._remember(decision, started, printable(outcome, 400))
        if full:
            raise store.no_space(self.directory.root) from error

    def _remember(self, decision: Decision, started: str, outcome: str) -> None:
        """Add a line to the run's history: what ran, why, and how it ended."""
        line = {
            "stage": decision.stage,
            "started": started,
            "reasons": [redacted(str(reason)) for reason in decision.reasons],
            "outcome": outcome,
        }
        with self.directory.history.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        durable.sync(self.directory.history)

    def _report(self, outcomes: list[Outcome], reconfigured: bool) -> None:
        from pipeline import report

        root = self.directory.root
        whole = (root / report.PAGE).exists() and (root / report.REPORT).exists()
        if reconfigured or any(outcome.ran for outcome in outcomes) or not whole:
            report.write(root)
        headings = ("stage", "kind", "", "seconds", "digest", "metrics")
        self.console.print(terminal.table(headings, map(_row, outcomes)))
        if sentence := report.sentence(root):
            self.console.print(printable(sentence, None))
        self.console.print(f"report: {printable(str(root / report.PAGE), None)}")

    def _check(self, outcomes: list[Outcome]) -> None:
        """Hold evaluations against what is required of them, whether or not they ran now."""
        failed: list[str] = []
        for outcome in outcomes:
            required = getattr(self.settings.stages[outcome.stage], "require", {})
            checks = gate.check(required, outcome.manifest.metrics)
            failed += [f"stages.{outcome.stage}.require: {each}" for each in checks if not each.holds]
            if checks:
                held = sum(each.holds for each in checks)
                self.console.print(f"{outcome.stage}: {held} of {len(checks)} requirements hold")
        if failed:
            hint = "report.html shows every requirement beside its figure; all stages are published as they are"
            raise RequirementError("\n".join(failed), hint=hint)


def _row(outcome: Outcome) -> tuple[str, ...]:
    manifest = outcome.manifest
    figures = [f"{name} {metric.value:.4g}" for name, metric in list(manifest.metrics.items())[:3]]
    return (
        outcome.stage,
        manifest.stage_kind,
        "ran" if outcome.ran else "kept",
        f"{manifest.cost.seconds:.1f}",
        manifest.digest[:8],
        ", ".join(figures),
    )


def _expected_size(decision: Decision) -> int:
    """About as many bytes as a stage's biggest input, if it publishes a model; adapters and figures are small."""
    if "model" not in PRODUCES[decision.kind]:
        return 0
    return max(map(inputs.size, decision.wanted.artifacts.values()), default=0)


def _refuse_several_processes() -> None:
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        hint = "start it without `torchrun` or `accelerate launch`"
        raise ConfigError(f"WORLD_SIZE={printable(count)}: a stage runs in one process", hint=hint)


def _refuse_foreign_directory(directory: RunDirectory) -> None:
    """A run writes its `config.yaml`, and must not write over one that is somebody else's."""
    if directory.config.exists() and not directory.is_begun:
        what = "holds a config.yaml and is no run directory"
        raise ConfigError(what, where=directory.root, hint="choose another `output`")


def _refuse_not_finite(name: str, result: Result) -> None:
    for metric, figure in result.metrics.items():
        values: Mapping[str, Any] = figure.model_dump()
        bad = {part: value for part, value in values.items() if value is not None and not math.isfinite(value)}
        if bad:
            raise NumericalError(f"the metric `{printable(metric)}` is not finite: {bad}", where=name)
