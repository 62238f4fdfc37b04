"""A stage as a plain model directory for other software: weights, tokenizer, template, a model card and a record.

The directory appears whole or not at all, by the means by which stages are published (`pipeline/durable.py`), and only
after the written model computed what the stage's does.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from pipeline import card, durable, inputs, store
from pipeline import manifest as manifests
from pipeline.contract import Artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.manifest import OutputRecord, SealedRecord
from pipeline.store import RunDirectory
from pipeline.terminal import printable

FILE_NAME = "baton.json"
EXPORTED = ("model", "adapter", "reward")


class ExportRecord(SealedRecord):
    """Where an exported model came from, how it compares with the stage's, and its files."""

    stage: str
    kind: str
    """`model`, or `reward` for a classifier with one label."""
    digest: str
    """Content digest of the stage."""
    manifest_sha256: str
    dtype: str
    largest_difference: float
    """Of logits or scores on the stage's probes, computed in float32."""
    largest_value: float
    compared: int
    """Values that were compared."""
    score_offset: float | None = None
    """What has to be added to the exported model's scores to have the reward stage's."""
    outputs: list[OutputRecord]


def export(stage: Path, target: Path) -> ExportRecord:
    """Write a stage's model to a new directory.

    Args:
        stage: Directory of a stage that made a model, an adapter or a reward model.
        target: Where nothing is yet.

    Raises:
        ConfigError: `target` exists, or the stage has no model that `transformers` can load.
        ArtifactError: The stage is damaged, or what was written computes something else.
        StorageError: No space, or no permission to write.
    """
    from stages.core.export import write

    artifact = _artifact(stage)
    if target.exists() or target.is_symlink():
        raise ConfigError("exists already", where=printable(str(target), None), hint="give another directory")
    work = target.parent / f".{target.name}-{uuid.uuid4().hex[:12]}"
    with store.storage_errors(target):
        work.mkdir(parents=True)
        try:
            store.check_space(work, inputs.size(artifact))
            parity = write(artifact, work)
            text = card.write(artifact, name=target.name, parity=parity)
            (work / card.FILE_NAME).write_text(text, encoding="utf-8")
            record = ExportRecord(
                stage=_manifest(artifact).stage,
                kind="reward" if artifact.kind == "reward" else "model",
                digest=artifact.digest,
                manifest_sha256=manifests.sha256(stage),
                dtype=parity.dtype,
                largest_difference=parity.difference,
                largest_value=parity.largest,
                compared=parity.values,
                score_offset=parity.offset,
                outputs=durable.inventory(work),
            )
            _publish(work, target, record)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return record


def described(record: ExportRecord, target: Path) -> str:
    """What was written, for people."""
    what = "scores" if record.kind == "reward" else "logits"
    lines = [
        f"wrote {target}: {record.kind} in {record.dtype}, {sum(each.bytes for each in record.outputs):,} bytes",
        f"largest difference from the stage: {record.largest_difference:.3g}, of {record.compared:,} {what} of up to "
        f"{record.largest_value:.3g}",
    ]
    if record.score_offset:
        lines.append(
            f"transformers' classifiers have no bias: the stage's scores are these plus {record.score_offset:.6g}"
        )
    return "\n".join(lines)


def _artifact(stage: Path) -> Artifact:
    artifact = inputs.resolve(str(stage.resolve()), RunDirectory(stage), ())
    if artifact.manifest is None:
        raise ConfigError("a model directory already, not a stage", where=stage, hint="use it as it is")
    return inputs.require(artifact, "export", EXPORTED)


def _manifest(artifact: Artifact) -> manifests.Manifest:
    assert artifact.manifest is not None
    return artifact.manifest


def _publish(work: Path, target: Path, record: ExportRecord) -> None:
    durable.seal(work, FILE_NAME, record)
    found = list(manifests.differences(work, record.outputs, FILE_NAME))
    if found:
        raise ArtifactError(f"damaged while it was written: {'; '.join(map(str, found))}", where=target)
    durable.rename_new(work, target)
    durable.sync(target.parent)
