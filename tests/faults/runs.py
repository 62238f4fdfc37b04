"""Whole runs to break: the real runner over five stages that take steps, leave checkpoints and write little files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import fakes

from data import read  # noqa: F401  a process that is forked later has it
from pipeline import checkpoints, cli, fingerprint, report, store
from pipeline import manifest as manifests
from pipeline.config import PRODUCES
from pipeline.contract import Context, Result
from pipeline.errors import BatonError
from pipeline.fingerprint import digest
from pipeline.manifest import Adaptation, Metric
from pipeline.store import RunDirectory

from . import children
from .children import Blow, Point

STEPS = 3
# Which code and libraries there are is asked before every stage and takes longer than the stage; asked once here.
_sources, _environment = cache(fingerprint.sources), cache(fingerprint.environment)
WEIGHTS = 200
"""Digests that make the weights: 12,800 bytes."""


def run_stage(context: Context) -> Result:
    """A stage whose every step follows from the one before, with a checkpoint after each."""
    inputs = {role: artifact.digest for role, artifact in context.inputs.items()}
    state, done = digest([context.settings.kind, inputs, context.seed]), 0
    if found := context.checkpoints.resume():
        state, done = json.loads((found / "state.json").read_text(encoding="utf-8"))
    with context.checkpoints.steps(100):
        while done < STEPS:
            state, done = digest([state, done]), done + 1
            context.progress({"loss": int(state[:6], 16) / 2**24}, done=done, total=STEPS)
            context.checkpoints.after(done, partial(_save, [state, done]))
    (context.directory / "nested").mkdir()
    weights = "".join(digest([state, number]) for number in range(WEIGHTS))
    (context.directory / "nested" / "model.safetensors").write_text(weights, encoding="utf-8")
    (context.directory / "config.json").write_text('{"model_type": "none"}\n', encoding="utf-8")
    policy = context.inputs.get("policy")
    base = (policy.base or policy) if policy else None
    return Result(
        kind=PRODUCES[context.settings.kind][0],
        metrics={"accuracy": Metric(value=0.5, low=0.25, high=0.75, n=4)},
        adaptation=Adaptation(base=base.digest, base_source=base.source) if base else None,
        tokens=1000,
    )


def write_configuration(root: Path) -> None:
    """The configuration of a run in a directory, with its data."""
    fakes.write_world(root)


def run(root: Path, stage: Callable[[Context], Result] = run_stage) -> int:
    """`baton run`, in a process of its own; returns the exit code."""
    store.RESERVE = 0  # the file systems that are filled up are small
    fakes.install(sys.modules, stage)
    report.write = fakes.write_report
    fingerprint.sources, fingerprint.environment = _sources, _environment
    return cli.execute(cli.app, ["run", str(root / "config.yaml"), "checkpoint_minutes=0"])


def results(root: Path) -> dict[str, Any]:
    """Stage -> content digest, metrics and log but for times; every byte is verified."""
    directory = RunDirectory(root / "run")
    found = {name: (manifests.verify(directory.stage(name)), directory.stage(name)) for name in directory.published()}
    return {name: (each.digest, each.key, each.metrics, records(place)) for name, (each, place) in found.items()}


def records(stage: Path) -> list[dict[str, Any]]:
    """A stage's log but for times."""
    path = stage / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def require_whole(root: Path) -> None:
    """Every stage and checkpoint that is there is complete; nothing that was replaced is damaged.

    Raises:
        AssertionError: It is not so.
        BatonError: Something is there and damaged.
    """
    directory = RunDirectory(root / "run")
    if not directory.stages.is_dir():
        return
    for place in (*directory.stages.iterdir(), *store.archived(directory).values()):
        manifests.verify(place)
    for place in directory.root.glob(".checkpoints/*/step-*"):
        assert checkpoints._damage(place) is None, place


def require_end(root: Path, expected: dict[str, Any]) -> None:
    """A run that went on to its end has the results of one that was never broken, and nothing is left over."""
    assert results(root) == expected
    directory = RunDirectory(root / "run")
    assert list(directory.work.iterdir()) == []
    assert not list(directory.root.glob(".failed/*"))
    assert not list(directory.quarantine.glob("*"))


def whole(root: Path) -> tuple[dict[str, Any], list[Point]]:
    """The results of a run that is not broken, and every changing system call of it."""
    place = root / "whole"
    place.mkdir()
    _environment()
    for kind in PRODUCES:
        _sources(kind)
    write_configuration(place)
    made = children.calls(partial(run, place), root / "output", root / "calls")
    return results(place), children.points(made)


def blows(root: Path, how: str, every: int = 1, first: int = 0) -> Iterator[Blow]:
    """Break a run at its points; all that is there must be complete, and it must go on to the same end.

    Args:
        root: Where.
        how: What happens, as `strace` says it.
        every: At every n-th point only.
        first: The first of them.
    """
    expected, points = whole(root)
    for point in points[first::every]:
        place, output = root / "broken", root / "output"
        place.mkdir()
        output.unlink()
        write_configuration(place)
        code = children.broken(partial(run, place), output, point, how)
        yield Blow(point, code, _problem(place, output, expected))
        shutil.rmtree(place)


def goes_on_from_the_newest(root: Path, name: str, step: int) -> bool:
    """Whether a stage that was killed after a step goes on from there though the clock was set back in between."""
    place, output = root / "clock", root / "output"
    place.mkdir()
    output.unlink(missing_ok=True)
    write_configuration(place)
    assert children.run(partial(run, place, partial(_run_until, name, step)), output) == -signal.SIGKILL
    directory = RunDirectory(place / "run").checkpoints(name)
    for age, checkpoint in enumerate(sorted(directory.iterdir())):
        changed = time.time() - 86400 * age
        os.utime(checkpoint, (changed, changed))
    assert children.run(partial(run, place), output) == 0
    said = output.read_text(encoding="utf-8")
    shutil.rmtree(place)
    return f"{name}: goes on after step {step}\n" in said


def _problem(place: Path, output: Path, expected: dict[str, Any]) -> str:
    try:
        require_whole(place)
        code = children.run(partial(run, place), output)
        assert code == 0, f"the next run ended with {code}: {output.read_text(encoding='utf-8')}"
        require_end(place, expected)
    except (AssertionError, BatonError) as error:
        return str(error)
    return ""


def _run_until(name: str, step: int, context: Context) -> Result:
    """A run's stage; one of them kills its process when it has left the checkpoint of a step."""
    after = context.checkpoints.after

    def killed(taken: int, write: Callable[[Path], None]) -> None:
        after(taken, write)
        if (context.name, taken) == (name, step):
            os.kill(os.getpid(), signal.SIGKILL)

    context.checkpoints.after = killed  # type: ignore[method-assign]
    return run_stage(context)


def _save(state: Sequence[Any], directory: Path) -> None:
    (directory / "state.json").write_text(json.dumps(state), encoding="utf-8")
