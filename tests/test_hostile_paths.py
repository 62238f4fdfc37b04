"""No path in a manifest, an index or a description of data leads out of the directory that it stands in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli, inspection, loader
from pipeline import manifest as manifests
from pipeline.errors import ArtifactError, ConfigError
from pipeline.manifest import FILE_NAME, OutputRecord
from pipeline.references import HUB
from pipeline.store import RunDirectory

PATHS = {
    "parent": "../outside",
    "parent, later": "nested/../../outside",
    "parent, within": "nested/../weights",
    "absolute": "/etc/passwd",
    "absolute, doubled": "//etc/passwd",
    "this directory": ".",
    "parent alone": "..",
    "nothing": "",
    "through itself": "./weights",
    "slashes in a row": "nested//weights",
    "slash at the end": "nested/",
    "NUL": "weights\0.safetensors",
    "line break": "weights\nmore",
    "escape": "weights\x1b[2J",
    "reversed": "weights\u202esrotsnetefas",
    "invisible": "wei\u200bghts",
    "of another system": "..\\outside",
    "drive": "C:\\outside",
    "encoded as it looks": "\u2024\u2024/../outside",
    "surrogate": "weights\ud800",
}
SHA = "0" * 64


@pytest.fixture
def run(config: Path, fake_stages: None) -> RunDirectory:
    """A finished run of fake stages."""
    assert cli.execute(cli.app, ["run", str(config)]) == 0
    return RunDirectory.of(loader.load(config))


def rewritten(directory: Path, **changes: Any) -> None:
    """Change fields of a stage's manifest as nothing checks them."""
    path = directory / FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("path", list(PATHS.values()), ids=list(PATHS))
def test_a_manifest_lists_plain_paths_within_its_directory(path: str, run: RunDirectory, config: Path) -> None:
    sft = run.stage("sft")
    (sft.parent / "outside").write_bytes(b"outside")
    listed = json.loads((sft / FILE_NAME).read_text())["outputs"]
    rewritten(sft, outputs=[*listed, {"path": path, "bytes": 7, "sha256": SHA}])
    with pytest.raises(ArtifactError, match=r"malformed manifest: outputs\.\d+\.path"):
        manifests.verify(sft)
    assert cli.execute(cli.app, ["verify", str(run.root)]) == 5
    assert cli.execute(cli.app, ["run", str(config)]) == 0
    assert manifests.verify(sft).stage == "sft"
    assert (sft.parent / "outside").read_bytes() == b"outside"


@pytest.mark.parametrize("names", [("weights", "Weights"), ("\u00e9", "e\u0301"), ("x", "x"), ("\u212a", "k")])
def test_two_files_have_two_names_on_every_file_system(names: tuple[str, str], run: RunDirectory) -> None:
    rewritten(run.stage("sft"), outputs=[{"path": name, "bytes": 7, "sha256": SHA} for name in names])
    with pytest.raises(ArtifactError, match="two files have one name"):
        manifests.load(run.stage("sft"))


@pytest.mark.parametrize("path", ["../outside", "stages/../../outside", "..", "a/.."])
def test_an_input_is_within_the_run_or_absolute(path: str, run: RunDirectory) -> None:
    sft = run.stage("sft")
    (role, given), *_ = json.loads((sft / FILE_NAME).read_text())["inputs"].items()
    rewritten(sft, inputs={role: {**given, "directory": path}})
    with pytest.raises(ArtifactError, match=r"malformed manifest: inputs\.policy\.directory"):
        inspection.lineage(sft)


def test_a_name_that_only_differs_in_case_is_another_file(run: RunDirectory) -> None:
    weights = run.stage("sft") / "nested" / "weights.safetensors"
    weights.rename(weights.with_name("Weights.safetensors"))
    damages = [damage.file for damage in manifests.damages(run.stage("sft"))]
    assert damages == ["nested/Weights.safetensors", "nested/weights.safetensors"]


@pytest.mark.parametrize("what", ["link", "link to itself", "pipe", "directory"])
def test_a_manifest_is_a_file_of_its_own(what: str, run: RunDirectory, tmp_path: Path) -> None:
    path = run.stage("sft") / FILE_NAME
    path.rename(tmp_path / "outside.json")
    if what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path.symlink_to(path if what == "link to itself" else tmp_path / "outside.json")
    with pytest.raises(ArtifactError, match="not a regular file"):
        manifests.load(run.stage("sft"))


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"schema_version":' * 50_000, b"{} {}", b"\xff", b"5", b"null"])
def test_a_manifest_of_anything_else_is_refused(content: bytes, run: RunDirectory) -> None:
    (run.stage("sft") / FILE_NAME).write_bytes(content)
    with pytest.raises(ArtifactError):
        manifests.load(run.stage("sft"))


def test_an_endless_manifest_is_not_read(run: RunDirectory) -> None:
    with (run.stage("sft") / FILE_NAME).open("ab") as stream:
        stream.truncate(10**12)
    with pytest.raises(ArtifactError, match="larger than 100,000,000 bytes"):
        manifests.load(run.stage("sft"))


@pytest.mark.parametrize("target", ["outside", "nested/weights.safetensors", "/etc/hostname", "nowhere"])
def test_a_link_in_the_place_of_a_file_is_named_and_not_followed(target: str, run: RunDirectory) -> None:
    sft = run.stage("sft")
    (sft / "outside").write_bytes((sft / "nested" / "weights.safetensors").read_bytes())
    (sft / "nested" / "weights.safetensors").unlink()
    (sft / "nested" / "weights.safetensors").symlink_to(sft / target if target[0] != "/" else target)
    (sft / "outside").rename(sft.parent / "outside")
    with pytest.raises(ArtifactError, match=r"nested/weights\.safetensors: a link, expected a regular file"):
        manifests.verify(sft)


@pytest.mark.parametrize(
    "reference",
    ["hub:o/n@a/../../x", "hub:o/n@..", "hub:o/n@a\n", "hub:../n@a", "hub:o/..@a", "hub:o/n@/etc", "hub:o/n/../m@a"],
)
def test_a_reference_to_the_hub_leads_nowhere_else(reference: str) -> None:
    assert HUB.match(reference) is None


@pytest.mark.parametrize("name", ["../sft", "a/b", ".", "..", "", "a b", "a\0", "\u0455ft", "-x", ".hidden"])
def test_a_stage_s_name_is_no_path(name: str, config: Path) -> None:
    text = config.read_text().replace("  dpo:", f"  {json.dumps(name)}:")
    config.write_text(text)
    with pytest.raises(ConfigError):
        loader.load(config)


def test_a_directory_that_is_no_run_keeps_its_configuration(config: Path, fake_stages: None) -> None:
    before = config.read_bytes()
    assert cli.execute(cli.app, ["run", str(config), f"output={config.parent}"]) == 2
    assert config.read_bytes() == before
    assert not (config.parent / "stages").exists()


def test_paths_are_written_as_they_are_read() -> None:
    plain = ["model.safetensors", "nested/a-b_c.json", "\u30e2\u30c7\u30eb/\u00e9.json", "a b", "...", "a..b"]
    outputs = [OutputRecord(path=path, bytes=1, sha256=SHA) for path in plain]
    assert [output.path for output in outputs] == plain
