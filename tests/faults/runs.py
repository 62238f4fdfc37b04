"""Whole runs to break: the real runner over five stages that take steps, leave checkpoints and write little files."""

from __future__ import annotations

import json
import shutil
import sys
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
from pipeline.fingerprint import digest
from pipeline.manifest import Adaptation, Metric
from pipeline.store import RunDirectory

from . import children
from .children import Point

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


def blows(root: Path, how: str, every: int = 1, first: int = 0) -> Iterator[tuple[Point, int]]:
    """Break a run at its points, and let it go on to its end; yields the point and the exit code of the broken one.

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
        try:
            require_whole(place)
            ended = children.run(partial(run, place), output)
            assert ended == 0, f"the next one ended with {ended}"
            require_end(place, expected)
        except Exception as error:
            said = output.read_text(encoding="utf-8")
            raise AssertionError(f"{how} at {point}, exit code {code}: {error}\n{said}") from error
        yield point, code
        shutil.rmtree(place)


def _save(state: Sequence[Any], directory: Path) -> None:
    (directory / "state.json").write_text(json.dumps(state), encoding="utf-8")
