"""What can be said about runs from their manifests alone: state, lineage, differences, integrity.

Everything here returns plain values that print as JSON; how they look on a terminal is the command line's
business.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import checkpoints, inputs, loader, lock, progress, store
from pipeline import manifest as manifests
from pipeline.config import RunSettings
from pipeline.errors import ArtifactError, ConfigError, OtherVersionError
from pipeline.manifest import InputRecord, Manifest
from pipeline.plan import changes
from pipeline.references import in_order
from pipeline.store import RunDirectory

_ENTRY = {"stage", "started", "reasons", "outcome"}
"""What every entry of a history holds."""


def settings_of(place: Path) -> RunSettings:
    """The settings of a run, given a configuration file or its directory, which may have been moved.

    Raises:
        ConfigError: Neither.
    """
    if not place.is_dir():
        return loader.load(place)
    run = RunDirectory(place)
    if not run.config.is_file() or not run.is_begun:
        raise ConfigError("not a run directory: no config.yaml, or no run has begun in it", where=place)
    return loader.load(run.config, [f"output={json.dumps(str(place))}"])


def run_of(place: Path) -> RunDirectory:
    """The run directory, given itself or a configuration file that names it.

    Raises:
        ConfigError: Neither, or nothing was run yet.
    """
    run = RunDirectory(place) if place.is_dir() else RunDirectory.of(settings_of(place))
    if not run.stages.is_dir():
        raise ConfigError("not a run directory, or nothing has been published in it", where=run.root)
    return run


def status(place: Path) -> list[dict[str, Any]]:
    """For each stage of a run: its kind, state and what its manifest says; nothing is re-hashed."""
    settings = settings_of(place)
    run = RunDirectory.of(settings)
    running = _running(run)
    return [_state(run, name, settings.stages[name].kind, running) for name in in_order(settings.stages)]


def lineage(directory: Path) -> list[dict[str, Any]]:
    """A stage and everything it was made from, nearest first, down to the base and the data.

    Raises:
        ArtifactError: Not a stage directory.
    """
    found: dict[str, dict[str, Any]] = {}
    waiting = [("", directory)]
    while waiting:
        role, place = waiting.pop(0)
        if str(place) in found:
            continue
        manifest = manifests.load(place) if (place / manifests.FILE_NAME).is_file() else None
        found[str(place)] = _ancestor(role, place, manifest)
        for name, record in manifest.inputs.items() if manifest else ():
            waiting.append((name, locate(place, record)))
    return list(found.values())


def locate(directory: Path, record: InputRecord) -> Path:
    """Where an input of the stage in this directory stands now; a run directory may have been moved."""
    path = Path(record.directory)
    return path if path.is_absolute() else directory.parent.parent / path


def integrity(place: Path, *, fast: bool = False) -> dict[str, list[str]]:
    """Stage -> what is wrong with its files or with the chain to its inputs; empty when all is well.

    Args:
        place: A run directory, its configuration or the directory of one stage.
        fast: Hash manifests only, and of other files compare names, kinds and sizes.
    """
    if (place / manifests.FILE_NAME).is_file():
        return {place.name: _problems(place, {}, fast)}
    run = run_of(place)
    shelf = store.archived(run)
    names = sorted(path.name for path in run.stages.iterdir())
    return {name: _problems(run.stage(name), shelf, fast) for name in names}


def history(run: RunDirectory, stage: str) -> dict[str, Any] | None:
    """The last entry of the run's history about a stage: when it ran, why, and how that ended."""
    if not run.history.is_file():
        return None
    entries = [entry for entry in _entries(run.history) if entry["stage"] == stage]
    return entries[-1] if entries else None


def differences(first: RunDirectory, second: RunDirectory) -> Iterator[tuple[str, str, str, str]]:
    """Stage, dotted name, old and new of everything that two runs differ in but their figures."""
    for name in sorted({*first.published(), *second.published()}):
        sides = [run.stage(name) if name in run.published() else None for run in (first, second)]
        old, new = (_comparable(manifests.load(side)) if side else None for side in sides)
        if old is None or new is None:
            yield (
                name,
                "stage",
                "absent" if old is None else "published",
                "absent" if new is None else "published",
            )
        else:
            for change in [*_one_sided_data(old, new), *changes(old, new)]:
                yield name, *change


def _one_sided_data(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What only one of two stages read, taken out of both: a line each, and not one for each of its settings."""
    for role in sorted(old["data"].keys() ^ new["data"].keys()):
        was, now = (each["data"].pop(role, {}).get("source", "absent") for each in (old, new))
        yield f"data.{role}", was, now


def _running(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """The stage that is being made, by whom, and the steps that it has taken and will take."""
    holder = lock.holder(run.root)
    if holder is None:
        return {}
    with contextlib.suppress(FileNotFoundError):  # nothing was begun, or it has just been published
        return {store.name_of(work): {"by": str(holder), **_last_step(work)} for work in run.work.iterdir()}
    return {}


def _last_step(work: Path) -> dict[str, int | None]:
    try:
        last = json.loads((work / progress.FILE_NAME).read_text(encoding="utf-8").splitlines()[-1])
        return {"step": int(last["step"]), "total": int(last["total"])}
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        # None yet, or one that is being written.
        return {"step": None, "total": None}


def _state(run: RunDirectory, name: str, kind: str, running: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {
        "stage": name,
        "kind": kind,
        "state": "not run",
        "failed": run.failed(name).is_dir(),
        "checkpoint": checkpoints.last_step(run.checkpoints(name)),
        "running": running.get(name),
    }
    if not run.stage(name).exists():
        return state
    try:
        manifest = manifests.load(run.stage(name))
    except OtherVersionError as error:
        return state | {"state": "other version", "problem": error.what}
    except ArtifactError as error:
        return state | {"state": "damaged", "problem": error.what}
    metrics = {metric: figure.model_dump() for metric, figure in manifest.metrics.items()}
    made = {"started": manifest.started, "cost": manifest.cost.model_dump(), "digest": manifest.digest}
    return state | {"state": "published", **made, "metrics": metrics, "warnings": manifest.warnings}


def _ancestor(role: str, place: Path, manifest: Manifest | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"role": role, "directory": str(place)}
    if manifest is None:
        return facts | {"stage": "", "kind": "model", "digest": "", "data": []}
    data = [f"{card.source} ({card.rows} rows, {card.split})" for card in manifest.data]
    return facts | {"stage": manifest.stage, "kind": manifest.kind, "digest": manifest.digest, "data": data}


def _problems(directory: Path, archived: Mapping[str, Path], fast: bool) -> list[str]:
    try:
        found = [str(damage) for damage in manifests.damages(directory, fast=fast)]
        manifest = manifests.load(directory)
    except OtherVersionError as error:
        return [error.what]
    except ArtifactError as error:
        return [f"{manifests.FILE_NAME}: {error.what}"]
    for role, record in manifest.inputs.items():
        if record.manifest_sha256 is not None:
            found += _broken_link(role, locate(directory, record), record, archived, fast)
        elif not fast:
            found += _changed_model(role, locate(directory, record), record)
    return found


def _changed_model(role: str, place: Path, record: InputRecord) -> list[str]:
    """What is wrong with a model that no stage made; one of a hub that is no longer cached cannot be looked at."""
    reference = record.source if record.source.startswith("hub:") else str(place)
    try:
        model = inputs.resolve(reference, RunDirectory(place), ())
    except inputs.NotDownloaded:
        return []
    except ArtifactError as error:
        return [f"input {role}: {error.where}: {error.what}"]
    if model.digest == record.digest:
        return []
    return [f"input {role}: {place}: content digest {model.digest}, expected {record.digest}"]


def _broken_link(role: str, place: Path, record: InputRecord, archived: Mapping[str, Path], fast: bool) -> list[str]:
    """What is wrong with the chain to one input.

    An input that was replaced since is in the archive; one that was made again may have come out the same.
    """
    expected, path = str(record.manifest_sha256), place / manifests.FILE_NAME
    found = manifests.sha256(place) if path.is_file() else "nothing"
    if found == expected:
        return []
    if expected in archived:
        kept = archived[expected]
        return [f"input {role}: {kept.name}/{damage}" for damage in manifests.damages(kept, fast=fast)]
    if path.is_file() and manifests.load(place).digest == record.digest:
        return []
    return [f"input {role}: {path}: sha256 {found}, expected {expected}"]


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # the last line may have been cut off by a power cut
            continue
        if isinstance(entry, dict) and entry.keys() >= _ENTRY:
            yield entry


def _comparable(manifest: Manifest) -> dict[str, Any]:
    return {
        "settings": manifest.settings,
        "data": dict(manifest.data_settings),
        "inputs": {role: record.digest for role, record in manifest.inputs.items()},
        "environment": manifest.environment,
        "digest": manifest.digest,
    }
