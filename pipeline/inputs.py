"""From a reference in the configuration to an input whose every byte was checked.

A reference is a stage of the run, the path of a stage directory, the path of a plain `transformers` model
directory or of a GGUF file, or `hub:owner/name@revision`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from pipeline import fingerprint, handover, model_files
from pipeline import manifest as manifests
from pipeline.contract import Artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.manifest import Manifest
from pipeline.references import HUB
from pipeline.store import RunDirectory
from pipeline.terminal import printable

Verify = Callable[[Path], Manifest]
GGUF = ".gguf"
"""The ending of GGUF files."""


class NotDownloaded(ArtifactError):
    """A hub model is not in the local cache and downloading was not asked for."""


def resolve(
    reference: str,
    run: RunDirectory,
    stages: Collection[str],
    *,
    download: bool = False,
    verify: Verify = manifests.verify,
) -> Artifact:
    """Find an input and re-hash all of it, down to its base model.

    Args:
        reference: As in the configuration.
        run: The run directory that stage names are looked up in.
        stages: Names of the run's stages.
        download: Fetch a hub model, or convert a GGUF file, that is not in the local cache.
        verify: Re-hashes a stage directory; one that remembers saves work when many inputs share a base.

    Raises:
        ArtifactError: Missing, damaged, not a model, or on another base than it was trained on.
        ConfigError: A stage of the run that has not been published.
        NotDownloaded: A hub model is not cached and `download` is False.
    """
    if reference in stages:
        directory = run.stage(reference)
        if not (directory / manifests.FILE_NAME).is_file():
            raise ConfigError(f"stage `{reference}` has not been published", hint="run it first, or leave out `--only`")
        found = _stage(directory, reference, download, verify)
        _require_name(found, reference)
        return found
    return _elsewhere(reference, download, verify)


def require(artifact: Artifact, role: str, accepts: tuple[str, ...]) -> Artifact:
    """The artifact itself when a role takes its kind.

    Raises:
        ArtifactError: It is of another kind.
    """
    if artifact.kind not in accepts:
        what = f"`{printable(artifact.source)}` is a {artifact.kind}, `{role}` needs a {' or '.join(accepts)}"
        raise ArtifactError(what, where=artifact.directory)
    return artifact


def size(artifact: Artifact) -> int:
    """Bytes of an input's files, its base included."""
    if artifact.manifest is not None:
        own = sum(output.bytes for output in artifact.manifest.outputs)
    else:
        own = sum(path.stat().st_size for path in model_files.foreign(artifact.directory))
    return own + (size(artifact.base) if artifact.base else 0)


def _elsewhere(reference: str, download: bool, verify: Verify) -> Artifact:
    if reference.startswith("hub:"):
        return _hub(reference, download)
    directory = Path(reference)
    if (directory / manifests.FILE_NAME).is_file():
        return _stage(directory, reference, download, verify)
    if reference.endswith(GGUF) and directory.is_file():
        return _gguf(directory, reference, download)
    if not directory.is_dir():
        raise ArtifactError("no such stage, directory, GGUF file or hub reference", where=printable(reference))
    return Artifact(directory, "model", _foreign_digest(directory), source=reference)


def _stage(directory: Path, source: str, download: bool, verify: Verify) -> Artifact:
    manifest = verify(directory)
    model_files.require_harmless(directory, manifest.kind)
    handover.require(directory, manifest)
    artifact = Artifact(directory, manifest.kind, manifest.digest, manifest, source)
    if manifest.kind not in ("adapter", "reward"):
        return artifact
    return replace(artifact, base=_base(directory, source, manifest, download, verify))


def _require_name(artifact: Artifact, name: str) -> None:
    """A stage of the run is known by its directory, which must not have changed places with another's."""
    assert artifact.manifest is not None
    if artifact.manifest.stage != name:
        raise ArtifactError(
            f"holds the stage `{printable(artifact.manifest.stage)}`, expected `{name}`",
            where=artifact.directory,
            hint="move it back to its own place, or run the stage again",
        )


def _base(directory: Path, source: str, manifest: Manifest, download: bool, verify: Verify) -> Artifact:
    """The model that an adapter sits on: a stage beside it, or wherever its manifest says it was."""
    adaptation = manifest.adaptation
    if adaptation is None:
        raise ArtifactError(f"the manifest of this {manifest.kind} names no base", where=directory)
    sibling = _sibling(directory, adaptation.base_source)
    _require_model(sibling or Path(adaptation.base_source), directory)
    if sibling:
        # A stage's name means something in its own run only; from another run it is found by its path.
        found = str(sibling.resolve()) if "/" in source else adaptation.base_source
        base = _stage(sibling, found, download, verify)
    else:
        base = _elsewhere(adaptation.base_source, download, verify)
    if base.digest != adaptation.base:
        source = printable(adaptation.base_source)
        raise ArtifactError(
            f"its base `{source}` has digest {base.digest}, it was trained on {adaptation.base}",
            where=directory,
            hint="run the stage again on this base, or bring back the base it was trained on",
        )
    return base


def _sibling(directory: Path, name: str) -> Path | None:
    """The stage of that name beside this one, if there is one; a path is not a name."""
    found = directory.parent / name
    is_name = name == Path(name).name and name not in ("", "..")
    return found if is_name and (found / manifests.FILE_NAME).is_file() else None


def _require_model(base: Path, directory: Path) -> None:
    """An adapter that sits on another, or on itself, would be followed without end."""
    if (base / manifests.FILE_NAME).is_file() and (kind := manifests.load(base).kind) != "model":
        what = f"its base `{printable(str(base))}` is a {printable(kind)}, not a model"
        raise ArtifactError(what, where=directory, hint="run the stage again on a model")


def _gguf(file: Path, reference: str, download: bool) -> Artifact:
    """A GGUF file, known by its own digest; it is converted to a model directory when a stage is to read it."""
    from data import gguf

    digest = fingerprint.file_sha256(file)
    directory = gguf.place(digest)
    if download:
        directory = gguf.converted(file, digest)
        model_files.foreign(directory)
    elif not directory.is_dir():
        gguf.header_of(file)
    return Artifact(directory, "model", digest, source=reference)


def _foreign_digest(directory: Path) -> str:
    paths = list(model_files.foreign(directory))
    digests = fingerprint.on_all_cores(fingerprint.file_sha256, paths)
    return fingerprint.content({path.name: digest for path, digest in zip(paths, digests, strict=True)})


def _hub(reference: str, download: bool) -> Artifact:
    match = HUB.match(reference)
    if match is None:
        raise ConfigError(f"`{printable(reference)}` is not of the form `hub:owner/name@revision`")
    repository, revision = match["repository"], match["revision"]
    snapshot = _cached(repository, revision)
    if snapshot is None:
        if not download:
            raise NotDownloaded("not in the local cache", where=printable(reference))
        snapshot = _download(repository, revision)
    for path in model_files.foreign(snapshot):
        _check_blob(path)
    digest = fingerprint.digest({"repository": repository, "commit": snapshot.name})
    return Artifact(snapshot, "model", digest, source=reference)


def _cache() -> Path:
    """Where `huggingface_hub` keeps its cache, by the same variables."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _cached(repository: str, revision: str) -> Path | None:
    root = _cache() / f"models--{repository.replace('/', '--')}"
    reference = root / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = root / "snapshots" / commit
    complete = (snapshot / "config.json").is_file() and any(snapshot.glob("*.safetensors"))
    return snapshot if complete and model_files.shards(snapshot) <= {path.name for path in snapshot.iterdir()} else None


def _download(repository: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            repository, revision=revision, cache_dir=_cache(), allow_patterns=list(model_files.PATTERNS)
        )
    except (OSError, ValueError) as error:
        what = f"cannot download: {printable(str(error), 300)}"
        hint = "check the name, the revision and the connection, or give the path of a model directory"
        raise ArtifactError(what, where=f"hub:{repository}@{revision}", hint=hint) from error
    return Path(path)


def _check_blob(path: Path) -> None:
    """Re-hash a cached weight file: the cache names large files by their sha256."""
    expected = path.resolve().name
    if path.suffix != ".safetensors" or len(expected) != 64:
        return
    found = fingerprint.file_sha256(path)
    if found != expected:
        hint = "delete the file and run the same command again"
        raise ArtifactError(f"damaged: sha256 {found}, expected {expected}", where=path, hint=hint)
