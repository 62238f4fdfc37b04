"""What an attacker puts beside a model: pickles that would act, fields that name code, manifests that lie."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from pipeline import manifest as manifests
from pipeline import seal
from pipeline.fingerprint import file_sha256
from pipeline.manifest import Manifest, OutputRecord

PICKLES = (
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "scaler.pt",
    "pytorch_model.bin",
    "adapter_model.bin",
)
"""The names under which trainers leave pickles."""


class _Canary:
    """Unpickled, it makes a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._directory),)


def plant_pickles(directory: Path, canary: Path) -> None:
    """Put pickles that make the directory `canary` into another, half of them in torch's archives."""
    content = pickle.dumps(_Canary(canary), protocol=2)
    for number, name in enumerate(PICKLES):
        if number % 2:
            (directory / name).write_bytes(content)
        else:
            with zipfile.ZipFile(directory / name, "w") as archive:
                archive.writestr("archive/data.pkl", content)
                archive.writestr("archive/version", "3\n")


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle or an archive of torch's, whatever its name is."""
    if zipfile.is_zipfile(path):
        return True
    content = path.read_bytes()
    if not content.startswith(b"\x80") or not content.endswith(b"."):
        return False
    try:
        return bool(list(pickletools.genops(content)))
    except Exception:  # it raises nearly anything
        return False


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def reseal(directory: Path, base: Path | None = None) -> None:
    """Make a stage's manifest say that its files are as they should be, and that it sits on the base as that is now."""
    manifest = manifests.load(directory)
    paths = [path for path in manifests.walk(directory) if path.name != manifests.FILE_NAME]
    known = {output.path: output.role for output in manifest.outputs}
    outputs = [_as_it_is(path, directory, known) for path in sorted(paths)]
    changes: dict[str, Any] = {"outputs": outputs, "digest": manifests.content_digest(outputs)}
    if base is not None and manifest.adaptation is not None:
        digest = manifests.load(base).digest
        reference = digest if manifest.adaptation.reference else None
        changes["adaptation"] = manifest.adaptation.model_copy(update={"base": digest, "reference": reference})
        policy = manifest.inputs["policy"].model_copy(update={"digest": digest})
        changes["inputs"] = {**manifest.inputs, "policy": policy}
    write_manifest(directory, manifest.model_copy(update=changes))
    manifests.verify(directory)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace a stage's manifest."""
    (directory / manifests.FILE_NAME).write_text(seal.sealed(manifest))


def _as_it_is(path: Path, directory: Path, known: dict[str, Any]) -> OutputRecord:
    name = path.relative_to(directory).as_posix()
    role = known.get(name, "artifact")
    return OutputRecord(path=name, bytes=path.stat().st_size, sha256=file_sha256(path), role=role)
