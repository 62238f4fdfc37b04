"""`baton gc`: only what no published stage refers to, and only when it is told to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Baton

from pipeline import checkpoints, cli, garbage, inspection, loader, lock, runner, store
from pipeline import manifest as manifests
from pipeline.checkpoints import Maker
from pipeline.errors import ArtifactError, BusyError
from pipeline.store import RunDirectory
from pipeline.terminal import console

Run = Callable[..., RunDirectory]


@pytest.fixture
def run(config: Path, fake_stages: None) -> Run:
    def call(*overrides: str, **options: object) -> RunDirectory:
        settings = loader.load(config, overrides)
        runner.run(settings, console=console(stderr=True), **options)  # type: ignore[arg-type]
        return RunDirectory.of(settings)

    return call


def found(directory: RunDirectory) -> dict[str, str]:
    with store.lock(directory):
        return {str(each.path.relative_to(directory.root)): each.why for each in garbage.find(directory)}


def leave_checkpoint(directory: RunDirectory, stage: str, step: int, key: str) -> Path:
    def fill(work: Path) -> None:
        (work / "state.json").write_text("{}")

    return checkpoints.publish(directory.checkpoints(stage), Maker(key, {}), step, fill)


def test_a_finished_run_has_no_garbage(run: Run) -> None:
    assert found(run()) == {}


def test_a_replaced_stage_is_kept_while_a_published_one_was_made_from_it(run: Run) -> None:
    """The middle of a chain is kept as well: `rm` was made from the old `sft`, that from the old `base`."""
    directory = run()
    old = {name: manifests.sha256(directory.stage(name)) for name in ("base", "sft", "rm", "dpo")}
    run("stages.base.epochs=3", "stages.sft.epochs=2", until="sft")
    run("stages.base.epochs=3", "stages.sft.epochs=2", only=["dpo"])
    kept = {f"archive/{name}-{old[name][:8]}" for name in ("base", "sft")}
    assert {f"archive/{path.name}" for path in directory.archive.iterdir()} == kept | {f"archive/dpo-{old['dpo'][:8]}"}
    assert found(directory).keys() == {f"archive/dpo-{old['dpo'][:8]}"}
    run("stages.base.epochs=3", "stages.sft.epochs=2")
    assert found(directory).keys() == {f"archive/{name}-{old[name][:8]}" for name in old}
    assert not [problem for problems in inspection.integrity(directory.root).values() for problem in problems]


def test_what_failed_and_what_was_damaged_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = run()
    (directory.stage("dpo") / "nested" / "weights.safetensors").write_text("0" * 64)
    monkeypatch.setenv("FAKE_STAGE", "dpo:bug")
    with pytest.raises(RuntimeError):
        run()
    aside = next(directory.quarantine.iterdir()).name
    assert found(directory) == {
        f"quarantine/{aside}": "damaged",
        ".failed/dpo": "records of an attempt that did not finish",
    }


def as_of_schema_1(record: Path) -> None:
    """As versions wrote records before they were sealed."""
    fields = json.loads(record.read_text()) | {"schema_version": 1}
    del fields["seal"]
    record.write_text(json.dumps(fields))


def test_what_another_version_wrote_is_called_that_and_replaced_and_kept(
    run: Run, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run()
    run("stages.dpo.beta=0.2")
    said = "written by another version of Baton (schema 1, this one writes 2)"
    for stage in [directory.stage(name) for name in directory.published()] + list(directory.archive.iterdir()):
        as_of_schema_1(stage / manifests.FILE_NAME)
    before = {path.name for path in directory.archive.iterdir()}
    capsys.readouterr()

    assert cli.execute(cli.app, ["verify", str(directory.root)]) == 5
    printed, errors = capsys.readouterr()
    assert f"base: {said}" in printed
    assert "damaged" not in printed + errors
    assert {state["state"] for state in inspection.status(directory.root)} == {"other version"}
    assert cli.execute(cli.app, ["plan", str(config)]) == 0
    assert said in capsys.readouterr().out
    assert found(directory) == {}

    old = {f"{name}-{manifests.sha256(directory.stage(name))[:8]}" for name in directory.published()}
    run("stages.dpo.beta=0.2")
    assert not directory.quarantine.exists()
    assert {path.name for path in directory.archive.iterdir()} == before | old
    assert found(directory) == {}
    assert cli.execute(cli.app, ["verify", str(directory.root)]) == 0


def test_replaced_stages_are_kept_while_a_published_one_is_of_another_version(run: Run) -> None:
    directory = run()
    run("stages.dpo.beta=0.2")
    assert found(directory)
    as_of_schema_1(directory.stage("rm") / manifests.FILE_NAME)
    assert found(directory) == {}


def test_a_checkpoint_of_another_version_is_kept(run: Run) -> None:
    directory = run()
    path = leave_checkpoint(directory, "sft", 3, "of other settings")
    as_of_schema_1(path / checkpoints.FILE_NAME)
    assert found(directory) == {}


def test_a_checkpoint_is_kept_until_its_stage_is_published(run: Run) -> None:
    directory = run()
    key = manifests.load(directory.stage("sft")).key
    leave_checkpoint(directory, "sft", 3, key)
    leave_checkpoint(directory, "sft", 4, "of other settings")
    leave_checkpoint(directory, "unfinished", 5, key)
    (directory.checkpoints("sft") / ".work-0123").mkdir()
    (leave_checkpoint(directory, "unfinished", 6, key) / "checkpoint.json").write_text("{")
    assert found(directory) == {
        ".checkpoints/sft/.work-0123": "no readable checkpoint.json",
        ".checkpoints/sft/step-00000003": "its stage is published",
        ".checkpoints/unfinished/step-00000006": "no readable checkpoint.json",
    }


def test_nothing_is_removed_until_told_and_then_all_of_it(
    run: Run, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run()
    run("stages.dpo.beta=0.2")
    (archived,) = directory.archive.iterdir()
    size = sum(path.stat().st_size for path in manifests.walk(archived))
    (directory.root / ".gone-0123").mkdir()  # by one that was killed
    before = sorted(directory.root.rglob("*"))
    capsys.readouterr()
    assert cli.execute(cli.app, ["gc", str(directory.root)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"archive/{archived.name}: {size:,} bytes: replaced, and no published stage was made from it",
        ".gone-0123: 0 bytes: not removed to the end",
        f"{size:,} bytes could be removed; `--delete` does",
    ]
    assert sorted(directory.root.rglob("*")) == before
    assert cli.execute(cli.app, ["gc", str(directory.root), "--delete"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{size:,} bytes removed"
    assert list(directory.archive.iterdir()) == []
    assert list(directory.root.glob(".gone-*")) == []
    assert cli.execute(cli.app, ["gc", str(directory.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert cli.execute(cli.app, ["gc", str(directory.root)]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"
    assert not [problem for problems in inspection.integrity(directory.root).values() for problem in problems]


def test_it_waits_for_nobody_who_works_in_the_run(run: Run, baton: Baton) -> None:
    directory = run()
    with lock.hold(directory.root):
        refused = baton("gc", directory.root, "--delete")
    assert refused.returncode == BusyError.exit_code
    assert "in use by process" in refused.stderr


def test_while_a_manifest_cannot_be_relied_on_nothing_is_found(run: Run) -> None:
    directory = run()
    shutil.copytree(directory.stage("dpo"), directory.archive / "dpo-12345678")
    path = directory.stage("sft") / manifests.FILE_NAME
    path.write_text(path.read_text().replace('"policy"', '"polixy"'))
    with pytest.raises(ArtifactError, match=r"sft: what it was made from cannot be told: manifest.json: changed"):
        found(directory)
