"""References resolve to inputs whose every byte was checked, down to the base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import fakes
import pytest

from pipeline import inputs, loader, runner
from pipeline.errors import ArtifactError, ConfigError
from pipeline.inputs import NotDownloaded, resolve
from pipeline.store import RunDirectory
from pipeline.terminal import console


@pytest.fixture
def run(config: Path, fake_stages: None) -> RunDirectory:
    settings = loader.load(config)
    runner.run(settings, console=console(stderr=True))
    return RunDirectory.of(settings)


def model_directory(directory: Path, weights: bytes = b"weights") -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "model.safetensors").write_bytes(weights)
    return directory


def in_cache(cache: Path, revision: str, commit: str, weights: bytes = b"weights") -> Path:
    """A model in the layout of the hub's local cache; returns the blob of its weights."""
    root = cache / "models--owner--name"
    blob = root / "blobs" / hashlib.sha256(weights).hexdigest()
    snapshot = root / "snapshots" / commit
    for folder in (blob.parent, snapshot, root / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(weights)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").symlink_to(blob)
    (root / "refs" / revision).write_text(commit)
    return blob


def test_a_stage_resolves_to_its_directory_and_an_adapter_to_its_base_too(run: RunDirectory) -> None:
    adapter = resolve("dpo", run, fakes.STAGES)
    assert (adapter.kind, adapter.source, adapter.directory) == ("adapter", "dpo", run.stage("dpo"))
    assert adapter.base is not None
    assert adapter.base.digest == resolve("sft", run, fakes.STAGES).digest
    assert adapter.base.base is None


def test_a_stage_directory_resolves_by_path_with_the_same_digest(run: RunDirectory) -> None:
    by_path = resolve(str(run.stage("dpo")), RunDirectory(Path("elsewhere")), [])
    by_name = resolve("dpo", run, fakes.STAGES)
    assert by_path.digest == by_name.digest
    assert by_path.base is not None
    assert by_path.base.directory == run.stage("sft")


def test_damage_is_found_in_a_base_as_in_the_adapter_itself(run: RunDirectory) -> None:
    (run.stage("sft") / "nested" / "weights.safetensors").write_text("0" * 64)
    with pytest.raises(
        ArtifactError, match=r"stages/sft: damaged: nested/weights.safetensors: sha256 \w{64}, expected"
    ):
        resolve("dpo", run, fakes.STAGES)


def test_another_base_than_it_was_trained_on_is_refused_with_both_digests(run: RunDirectory, config: Path) -> None:
    old = resolve("sft", run, fakes.STAGES).digest
    runner.run(loader.load(config, ["stages.sft.epochs=2"]), only=["sft"], console=console(stderr=True))
    new = resolve("sft", run, fakes.STAGES).digest
    with pytest.raises(ArtifactError, match=f"`sft` has digest {new}, it was trained on {old}"):
        resolve("rm", run, fakes.STAGES)


def test_a_stage_that_was_not_published_is_named(run: RunDirectory) -> None:
    with pytest.raises(ConfigError, match="stage `later` has not been published"):
        resolve("later", run, ["later"])


def test_a_model_directory_is_known_by_the_content_of_its_files(tmp_path: Path, run: RunDirectory) -> None:
    first = resolve(str(model_directory(tmp_path / "a")), run, [])
    same = resolve(str(model_directory(tmp_path / "b")), run, [])
    other = resolve(str(model_directory(tmp_path / "c", b"others")), run, [])
    assert first.kind == "model"
    assert first.digest == same.digest != other.digest
    (tmp_path / "b" / "README.md").write_text("read by nobody")
    assert resolve(str(tmp_path / "b"), run, []).digest == first.digest


def test_pickled_weights_are_refused_with_a_way_out(tmp_path: Path, run: RunDirectory) -> None:
    directory = model_directory(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ArtifactError, match=r"only pickled weights \(pytorch_model.bin\)(.|\n)*save_pretrained"):
        resolve(str(directory), run, [])


def test_an_adapter_of_unknown_base_is_refused(tmp_path: Path, run: RunDirectory) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="an adapter without a manifest"):
        resolve(str(tmp_path / "model"), run, [])


@pytest.mark.parametrize("shard", ["missing.safetensors", "../model.safetensors", "/etc/passwd"])
def test_shards_must_lie_in_the_directory(tmp_path: Path, run: RunDirectory, shard: str) -> None:
    directory = model_directory(tmp_path / "model")
    (tmp_path / "model.safetensors").write_bytes(b"outside")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ArtifactError, match="shards missing"):
        resolve(str(directory), run, [])


def test_what_is_neither_stage_nor_model_is_refused(tmp_path: Path, run: RunDirectory) -> None:
    with pytest.raises(ArtifactError, match="neither a stage"):
        resolve(str(tmp_path), run, [])
    with pytest.raises(ArtifactError, match="no such stage, directory, GGUF file or hub reference"):
        resolve("nowhere", run, [])


def test_a_role_refuses_another_kind(run: RunDirectory) -> None:
    artifact = resolve("tok", run, fakes.STAGES)
    assert inputs.require(artifact, "tokenizer", ("tokenizer",)) is artifact
    with pytest.raises(ArtifactError, match="`tok` is a tokenizer, `policy` needs a model or adapter"):
        inputs.require(artifact, "policy", ("model", "adapter"))


def test_a_hub_model_in_the_cache_is_known_by_its_commit(
    tmp_path: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    in_cache(tmp_path / "hub", "main", "a" * 40)
    by_name = resolve("hub:owner/name@main", run, [])
    by_commit = resolve(f"hub:owner/name@{'a' * 40}", run, [])
    assert by_name.digest == by_commit.digest
    assert by_name.directory.name == "a" * 40
    in_cache(tmp_path / "hub", "main", "b" * 40)
    assert resolve("hub:owner/name@main", run, []).digest != by_name.digest


def test_a_damaged_blob_of_the_cache_is_named(
    tmp_path: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    blob = in_cache(tmp_path / "hub", "main", "a" * 40)
    blob.write_bytes(b"WEIGHTS")
    with pytest.raises(ArtifactError, match=rf"model.safetensors: damaged: sha256 \w+, expected {blob.name}"):
        resolve("hub:owner/name@main", run, [])


def test_nothing_is_downloaded_unless_asked_for(
    tmp_path: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(NotDownloaded):
        resolve("hub:owner/name@main", run, [])
    assert not (tmp_path / "hub").exists()


def test_a_download_that_fails_says_what_to_check(
    tmp_path: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ArtifactError, match=r"hub:owner/name@main: cannot download: (.|\n)*check the name"):
        resolve("hub:owner/name@main", run, [], download=True)


@pytest.mark.parametrize(
    "reference",
    ["hub:name@main", "hub:owner/name", "hub:../x@main", "hub:o/n@../x", "hub:o/n/m@a", "hub:o/n@"],
)
def test_hub_references_are_checked(run: RunDirectory, reference: str) -> None:
    with pytest.raises(ConfigError, match="not of the form"):
        resolve(reference, run, [])
