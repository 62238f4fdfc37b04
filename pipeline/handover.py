"""What a stage directory must be beyond its hashes: what its manifest says of the model, and made from what it names.

A tool that writes weights in another precision, leaves out a tensor or edits the configuration may hash everything
anew. The manifest also holds what the files said of the model when the stage published them; they are read again here,
without loading a model. What only a computation shows is left to the probes (`stages/core/probes.py`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import model_files
from pipeline.errors import ArtifactError
from pipeline.manifest import Manifest
from pipeline.terminal import printable

CONFIGURATIONS = ("config.json", "generation_config.json", "adapter_config.json")
Description = dict[str, dict[str, str]]
"""What files say of a model, by file."""

LARGEST_HEADER = 100 * 2**20
"""Bytes that the list of a file's tensors takes at most, as in safetensors itself."""
_AGAIN = "run the stage again with `--force`, or bring back the files that it published"


def describe(directory: Path) -> Description:
    """File name -> its settings, or its tensors' precisions and shapes, by name; files of other kinds are left out.

    Raises:
        ArtifactError: A configuration is not a JSON object, or a file of weights has no list of its tensors.
    """
    found = {name: _settings(directory / name) for name in CONFIGURATIONS if (directory / name).is_file()}
    return found | {path.name: _contents(path) for path in sorted(directory.glob("*.safetensors")) if path.is_file()}


def tensors(directory: Path) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape, of all files of weights in a directory.

    Raises:
        ArtifactError: A file of weights has no list of its tensors.
    """
    files = [path for path in sorted(directory.glob("*.safetensors")) if path.is_file()]
    contents = (text for path in files for text in _contents(path).items())
    return {name: tuple(json.loads(text.partition(" ")[2])) for name, text in contents}


def require(directory: Path, manifest: Manifest) -> None:
    """Raise ArtifactError, with both values, where a stage directory is not what its manifest says of it.

    Args:
        directory: A directory whose files have the hashes of its manifest.
        manifest: Its manifest.
    """
    for name, recorded, found in _differences(manifest.model, describe(directory)):
        what = f"{printable(name, 200)}: recorded {printable(recorded)}, found {printable(found)}"
        raise ArtifactError(what, where=directory, hint=_AGAIN)
    _require_ancestry(directory, manifest)


def _require_ancestry(directory: Path, manifest: Manifest) -> None:
    """The base and the reference that a manifest names are the policy that the stage was given, as far as it tells."""
    adaptation, policy = manifest.adaptation, manifest.inputs.get("policy")
    if adaptation is None or policy is None:
        return
    named = {"reference": adaptation.reference}
    if policy.kind == "model":
        named["base"] = adaptation.base
    for what, digest in named.items():
        if digest is not None and digest != policy.digest:
            raise ArtifactError(
                f"its {what} has digest {printable(digest)}, the policy it was trained from {printable(policy.digest)}",
                where=directory / "manifest.json",
                hint=_AGAIN,
            )


def _differences(recorded: Description, found: Description) -> Iterator[tuple[str, str, str]]:
    """`file: setting`, old and new value of all that differs."""
    for file in sorted(recorded.keys() | found.keys()):
        old, new = recorded.get(file), found.get(file)
        if old is None or new is None:
            yield file, "absent" if old is None else "a file", "absent" if new is None else "a file"
            continue
        for name in sorted(old.keys() | new.keys()):
            was, is_ = old.get(name, "absent"), new.get(name, "absent")
            if was != is_:
                yield f"{file}: {name}", was, is_


def _settings(path: Path) -> dict[str, str]:
    """Setting -> its value as JSON text, in which infinity has a name as it has in the file."""
    settings = model_files.json_object(path)
    return {name: json.dumps(value, sort_keys=True, ensure_ascii=False) for name, value in settings.items()}


def _contents(path: Path) -> dict[str, str]:
    """Tensor -> precision and shape."""
    try:
        header = {name: each for name, each in _header(path).items() if name != "__metadata__"}
        return {name: f"{each['dtype']} {list(each['shape'])}" for name, each in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ArtifactError(f"no readable list of tensors: {printable(str(error))}", where=path, hint=_AGAIN) from None


def _header(path: Path) -> dict[str, Any]:
    """The JSON at the beginning of a safetensors file, whose length the first eight bytes are."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > LARGEST_HEADER:
            raise ValueError(f"it claims {length:,} bytes")
        header: dict[str, Any] = json.loads(stream.read(length))
        return header
