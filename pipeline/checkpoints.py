"""Checkpoints of a stage that is not finished: its state between two steps, to go on from exactly there.

    RUN/.checkpoints/STAGE/step-00000012/   checkpoint.json and the files that the stage and its progress wrote

A checkpoint comes to be as a stage directory does: every file durable and hashed, the record written last, all of it
read back, then renamed. Whoever goes on from it must be who made it: the same hard key, code, libraries and machine.
The newest is that of the highest step; times say nothing.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import durable, seal, store
from pipeline import manifest as manifests
from pipeline.errors import ArtifactError
from pipeline.manifest import OutputRecord, SealedRecord

FILE_NAME = "checkpoint.json"
OTHER_VERSION = "made by another version of Baton"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Maker:
    """What makes a stage's checkpoints; another could not go on from them and come out the same."""

    key: str
    """Hard key of the stage."""
    environment: Mapping[str, Any]
    """Code, libraries and machine."""


class CheckpointRecord(SealedRecord):
    """What a checkpoint says of itself."""

    schema_version: Literal[2] = 2
    step: int
    """Steps that were taken."""
    key: str
    environment: dict[str, Any]
    outputs: list[OutputRecord]
    tokens_per_batch: int | None = None
    """Tokens of the batches that were computed: others round differently."""


def publish(
    directory: Path, maker: Maker, step: int, fill: Callable[[Path], None], tokens_per_batch: int | None = None
) -> Path:
    """Make the checkpoint of a step; when this returns, it survives a power cut.

    Args:
        directory: The stage's checkpoints.
        maker: The running stage.
        step: Steps that were taken.
        fill: Writes files into an empty directory.
        tokens_per_batch: What the batches were bounded by.

    Raises:
        ArtifactError: What is on disk is not what was written.
        StorageError: There is no space for it.
    """
    work, target = directory / f".work-{uuid.uuid4().hex[:12]}", directory / f"step-{step:08}"
    work.mkdir(parents=True)
    try:
        fill(work)
        outputs = durable.inventory(work)
        environment = dict(maker.environment)
        record = CheckpointRecord(
            step=step, key=maker.key, environment=environment, outputs=outputs, tokens_per_batch=tokens_per_batch
        )
        durable.seal(work, FILE_NAME, record)
        _require_intact(work, record)
        if target.exists():  # it was there and could not serve
            _remove(target)
        durable.rename_new(work, target)
    except BaseException as error:
        full = store.hides_no_space(error, directory)
        shutil.rmtree(work, ignore_errors=True)
        if full:
            raise store.no_space(directory) from error
        raise
    for folder in (directory, directory.parent, directory.parent.parent):
        durable.sync(folder)
    return target


def newest(directory: Path, maker: Maker) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that the maker can go on from, every file re-hashed, and why newer ones do not serve."""
    passed: list[str] = []
    for path in _newest_first(directory):
        reason = _misfit(path, maker) or _damage(path)
        if reason is None:
            return path, passed
        passed.append(f"{path.name}: {reason}")
    return None, passed


def next_step(directory: Path, maker: Maker) -> int | None:
    """The step after which the maker would go on, as far as the records tell; nothing is hashed."""
    return step_of(path) if (path := _next(directory, maker)) else None


def tokens_per_batch(directory: Path, maker: Maker) -> int | None:
    """What bounded the batches before the step after which the maker would go on; nothing is hashed."""
    path = _next(directory, maker)
    record = _record(path) if path else None
    return record.tokens_per_batch if record else None


def last_step(directory: Path) -> int | None:
    """The highest step of which there is a checkpoint, whoever made it."""
    return next(map(step_of, _newest_first(directory)), None)


def step_of(checkpoint: Path) -> int:
    """Steps that were taken before a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def keep(directory: Path, kept: Collection[Path]) -> None:
    """Remove all checkpoints but these, and what dead processes left of others."""
    for path in sorted(directory.iterdir()):
        if path not in kept:
            _remove(path)


def clear(directory: Path) -> None:
    """Remove all checkpoints of a stage, the oldest first: what is left at any moment is the newest."""
    for path in reversed(_newest_first(directory)):
        _remove(path)
    shutil.rmtree(directory, ignore_errors=True)


def garbage(directory: Path, published: str | None) -> Iterator[tuple[Path, str]]:
    """What nobody can go on from, and why; nothing is hashed.

    Args:
        directory: A stage's checkpoints.
        published: Hard key of the stage that was published.
    """
    for path in sorted(directory.iterdir()):
        record = _record(path) if _NAME.fullmatch(path.name) else None
        if record is None:
            if (why := _unreadable(path)) != OTHER_VERSION:
                yield path, why
        elif record.key == published:
            yield path, "its stage is published"


def _next(directory: Path, maker: Maker) -> Path | None:
    """The newest checkpoint whose record fits the maker."""
    return next((path for path in _newest_first(directory) if _misfit(path, maker) is None), None)


def _newest_first(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def _misfit(path: Path, maker: Maker) -> str | None:
    """Why a checkpoint is not the maker's, by its record."""
    record = _record(path)
    if record is None:
        return _unreadable(path)
    if record.step != step_of(path):
        return f"its record is of step {record.step}"
    if record.key != maker.key:
        return "made from other settings, inputs or data"
    names = record.environment.keys() | maker.environment.keys()
    other = sorted(name for name in names if record.environment.get(name) != maker.environment.get(name))
    return f"made with other {', '.join(other)}: to go on would not be exact" if other else None


def _damage(path: Path) -> str | None:
    record = _record(path)
    found = next(manifests.differences(path, record.outputs if record else (), FILE_NAME), None)
    return f"damaged: {found}" if found else None


def _record(path: Path) -> CheckpointRecord | None:
    try:
        text = manifests.read_record(path / FILE_NAME)
        return CheckpointRecord.model_validate_json(text) if seal.is_intact(text) else None
    except (OSError, ValueError, ArtifactError):
        return None


def _unreadable(path: Path) -> str:
    """Why a checkpoint has no record that can be used."""
    with contextlib.suppress(OSError, ArtifactError):
        if manifests.is_of_another_version(manifests.read_record(path / FILE_NAME)):
            return OTHER_VERSION
    return f"no readable {FILE_NAME}"


def _require_intact(work: Path, written: CheckpointRecord) -> None:
    found = "the record differs" if _record(work) != written else _damage(work)
    if found:
        raise ArtifactError(f"the checkpoint on disk is not what was written: {found}", where=work)


def _remove(path: Path) -> None:
    """Take a checkpoint away at once, then its files: one that is there is whole."""
    gone = path.with_name(f".gone-{uuid.uuid4().hex[:12]}")
    path.rename(gone)
    durable.sync(path.parent)  # its files may not go before its name
    if gone.is_dir() and not gone.is_symlink():
        shutil.rmtree(gone, ignore_errors=True)
    else:
        gone.unlink()
