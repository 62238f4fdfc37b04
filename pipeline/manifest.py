"""The manifest: what a stage directory says about itself, and what a receiver checks before it uses it.

`manifest.json` is written last, so a directory that has one is complete. It lists every other file with its
size and sha256, and its last line is a seal of its own text. Its sha256 stands in the manifests of the stages that
use it, so the chain reaches back to the base model.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from pipeline import seal
from pipeline.errors import ArtifactError, OtherVersionError
from pipeline.fingerprint import content, file_sha256, on_all_cores
from pipeline.terminal import printable

SCHEMA_VERSION = 2
FILE_NAME = "manifest.json"
OTHER_VERSION = "written by another version of Baton"
LARGEST = 100_000_000
"""Bytes of a manifest."""


def _inside(path: str) -> str:
    """A path below the directory that its manifest stands in, written in the one way that there is to write it."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or printable(path, None) != path:
        raise ValueError("should be a plain path within the directory")
    return path


def _inside_if_relative(path: str) -> str:
    """A path relative to the run directory does not leave it; an absolute one is where the user had an input."""
    if path and not path.startswith("/") and ".." in path.split("/"):
        raise ValueError("should be within the run directory, or absolute")
    return path


class Record(BaseModel):
    """Base of all parts of a manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class SealedRecord(Record):
    """Base of what is written with a seal, which is the file's and not the record's."""

    @model_validator(mode="before")
    @classmethod
    def _without_seal(cls, fields: Any) -> Any:
        return {name: fields[name] for name in fields if name != seal.FIELD} if isinstance(fields, dict) else fields


class Metric(Record):
    """A figure with its 95% interval and the number of observations behind it."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


class InputRecord(Record):
    """An input as it was when the stage started."""

    source: str
    """The reference in the configuration."""
    kind: str
    digest: str
    """Content digest of its artefact files; enters the key."""
    manifest_sha256: str | None = None
    """None for foreign model directories."""
    directory: Annotated[str, AfterValidator(_inside_if_relative)] = ""
    """Relative to the run directory when inside it."""


class DataCard(Record):
    """What was read from one data source."""

    role: str
    source: str
    digest: str
    format: str
    rows: int
    """Rows used, after splitting and dropping."""
    epochs: float = 1.0
    """Times they are taken in one pass over the stage's data; not 1 in mixtures only."""
    split: str = "train"
    """`train` or `held-out`."""
    dropped: dict[str, int] = {}
    """Reason -> rows, those before the split included."""
    cut: int = 0
    """Rows whose prompt lost its beginning to fit."""
    prepared: dict[str, int] = {}
    """What preparation did -> documents."""
    diagnosis: dict[str, Any] = {}
    """What the doctor found when the stage read the source."""


class OutputRecord(Record):
    """One file of the stage directory."""

    path: Annotated[str, AfterValidator(_inside)]
    bytes: int
    sha256: str
    role: Literal["artifact", "log"] = "artifact"
    """Logs hold times and are left out of the content digest."""


class Adaptation(Record):
    """How trained weights relate to their base."""

    base: str
    """Content digest of the model they sit on."""
    base_source: str
    """Where that model was found: a stage name, a path or a hub reference."""
    reference: str | None = None
    """Content digest of the model that the policy was held close to."""
    merged: bool = False
    """Whether the adapter was merged into the weights in this directory."""
    quantization: str = "none"


class MemoryEstimate(Record):
    """Bytes that a stage was expected to take, by what takes them."""

    tokens_per_batch: int
    """What it was estimated for: the setting, or what `auto` chose."""
    weights: int
    adapters: int
    optimizer: int
    """Gradients and moments of what is trained."""
    activations: int
    logits: int
    cache: int
    """Keys and values of sampling."""
    fixed: int
    """The process itself; on an accelerator, whose memory is all that is measured then, nothing."""

    @property
    def parts(self) -> dict[str, int]:
        """Part -> bytes; they add up to the total."""
        return {name: size for name, size in self.model_dump().items() if name != "tokens_per_batch"}

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


class Cost(Record):
    """What the stage took."""

    seconds: float
    tokens: int
    peak_memory_bytes: int
    expected_memory: MemoryEstimate | None = None
    """What was estimated before, where the shape of the model was known."""


class Manifest(SealedRecord):
    """The record of a finished stage."""

    schema_version: int = SCHEMA_VERSION
    stage: str
    stage_kind: str
    kind: str
    key: str
    """Hard key: digest of kind, behavioural settings, input digests by role, data digests, seed."""
    digest: str
    """Content digest of the artefact files."""
    inputs: dict[str, InputRecord]
    settings: dict[str, Any]
    """All settings of the stage, defaults included, and the run's seed, device and dtype."""
    data_settings: dict[str, Any]
    """Data role -> its settings and digest."""
    data: list[DataCard]
    outputs: list[OutputRecord]
    adaptation: Adaptation | None
    tokenizer: dict[str, Any]
    model: dict[str, dict[str, str]] = {}
    """What each file says of a model (`pipeline/handover.py`): settings, or tensors with precision and shape."""
    metrics: dict[str, Metric]
    cost: Cost
    environment: dict[str, Any]
    """Soft key: python, platform, library versions, digest of the stage's source modules, threads; device and dtype are
    recorded beside it."""
    seed: int
    warnings: list[str]
    command: str
    """Reproduces the stage."""
    started: str
    """Information only; never used to order anything."""

    @model_validator(mode="after")
    def _one_file_a_name(self) -> Self:
        names = [unicodedata.normalize("NFC", output.path).casefold() for output in self.outputs]
        if len(set(names)) < len(names):
            raise ValueError("two files have one name, or names that some file systems take for one")
        return self


@dataclass(frozen=True)
class Damage:
    """A file of a stage directory that is not what the manifest says."""

    file: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{printable(self.file, None)}: {self.found}, expected {self.expected}"


def load(directory: Path) -> Manifest:
    """The manifest of a stage directory; says nothing about the files it lists.

    Raises:
        ArtifactError: No manifest, not a file of its own, not JSON, or malformed.
        OtherVersionError: Of another schema version.
    """
    path = directory / FILE_NAME
    try:
        text = read_record(path)
        fields = json.loads(text)
    except FileNotFoundError:
        raise ArtifactError(f"no {FILE_NAME}: not a finished stage", where=directory) from None
    except OSError as error:
        raise ArtifactError(f"the manifest cannot be read: {error.strerror}", where=path) from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the manifest is not JSON: {printable(str(error))}", where=path) from None
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    if version != SCHEMA_VERSION:
        hint = "use the version of Baton that wrote it, or run the stage again"
        if is_of_another_version(text):
            what = f"{OTHER_VERSION} (schema {printable(str(version))}, this one writes {SCHEMA_VERSION})"
            raise OtherVersionError(what, where=path, hint=hint)
        shown = printable(repr(version))
        raise ArtifactError(f"schema version {shown}, expected {SCHEMA_VERSION}", where=path, hint=hint)
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = printable(".".join(map(str, first["loc"])))
        raise ArtifactError(f"malformed manifest: {field}: {first['msg']}", where=path) from None


def is_of_another_version(text: bytes) -> bool:
    """Whether a record names another schema than this version's, and no seal says that it was changed since."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return False
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    is_other = type(version) is int and version > 0 and version != SCHEMA_VERSION
    return is_other and (seal.FIELD not in fields or seal.is_intact(text))


def read_record(path: Path) -> bytes:
    """The text of a record, which is a file: nothing else is followed or waited for.

    Raises:
        OSError: It is not there, not a file, or cannot be read.
        ArtifactError: It is larger than any record.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise OSError(errno.EINVAL, "not a regular file", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with os.fdopen(descriptor, "rb") as stream:
        content = stream.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ArtifactError(f"larger than {LARGEST:,} bytes", where=path, hint="no stage writes such a record")
    return content


def sha256(directory: Path) -> str:
    """Sha256 of the manifest file, by which the stages that use the directory know it."""
    return file_sha256(directory / FILE_NAME)


def content_digest(outputs: Iterable[OutputRecord]) -> str:
    """Digest of the artefact files; logs are left out."""
    return content({output.path: output.sha256 for output in outputs if output.role == "artifact"})


def damages(directory: Path, *, fast: bool = False) -> list[Damage]:
    """Everything in which a stage directory differs from its manifest; empty when it is intact.

    Args:
        directory: Of a stage.
        fast: Compare names, kinds and sizes of the files the manifest lists, and hash none of them.

    Raises:
        ArtifactError: The manifest itself cannot be read.
    """
    manifest = load(directory)
    found = list(differences(directory, manifest.outputs, FILE_NAME, fast=fast))
    if not seal.is_intact(read_record(directory / FILE_NAME)):
        found.append(Damage(FILE_NAME, "changed since it was written", "what its seal is of"))
    if content_digest(manifest.outputs) != manifest.digest:
        found.append(Damage(FILE_NAME, "digest of the listed files differs", f"digest {manifest.digest}"))
    return found


def differences(
    directory: Path, outputs: Iterable[OutputRecord], record: str, *, fast: bool = False
) -> Iterator[Damage]:
    """Everything in which the files of a directory, re-hashed, differ from those that its record lists.

    Args:
        directory: A sealed directory.
        outputs: The files that are listed.
        record: Name of the file that lists them, which is not among them.
        fast: Hash nothing.
    """
    listed = {output.path: output for output in outputs}
    present = {path.relative_to(directory).as_posix(): path for path in walk(directory)}
    present.pop(record, None)
    for name in sorted(present.keys() - listed.keys()):
        yield Damage(name, "not in the manifest", "no such file")
    expected = [listed[name] for name in sorted(listed)]
    found = on_all_cores(lambda output: _damage(present.get(output.path), output, fast), expected)
    yield from (damage for damage in found if damage is not None)


def verify(directory: Path) -> Manifest:
    """The manifest of a stage directory whose every file was re-hashed.

    Raises:
        ArtifactError: Names every damaged file with both values.
    """
    found = damages(directory)
    if found:
        what = "; ".join(map(str, found))
        raise ArtifactError(f"damaged: {what}", where=directory, hint="`baton run` on its run makes it again")
    return load(directory)


def walk(directory: Path) -> Iterator[Path]:
    """All entries below a directory that are not directories; links are not followed."""
    for parent, folders, files in os.walk(directory):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        yield from (Path(parent, name) for name in sorted(files + links))


def _damage(path: Path | None, output: OutputRecord, fast: bool) -> Damage | None:
    if path is None:
        return Damage(output.path, "missing", f"{output.bytes} bytes")
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        found = "a link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
        return Damage(output.path, found, "a regular file")
    if status.st_size != output.bytes:
        return Damage(output.path, f"{status.st_size} bytes", f"{output.bytes} bytes")
    if fast:
        return None
    digest = file_sha256(path)
    return None if digest == output.sha256 else Damage(output.path, f"sha256 {digest}", f"sha256 {output.sha256}")
