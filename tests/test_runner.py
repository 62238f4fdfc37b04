"""Runs on fake stages: what is published, kept, put aside and recorded, however a stage ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import pytest
from conftest import Baton

from pipeline import cli, inspection, loader, lock, runner
from pipeline import manifest as manifests
from pipeline.contract import Context, Result
from pipeline.errors import ConfigError, Interrupted, NumericalError, StorageError
from pipeline.manifest import Metric
from pipeline.store import RunDirectory
from pipeline.terminal import console

Run = Callable[..., list[runner.Outcome]]


@pytest.fixture
def run(config: Path, fake_stages: None) -> Run:
    def call(*overrides: str, **options: Any) -> list[runner.Outcome]:
        return runner.run(loader.load(config, overrides), console=console(), **options)

    return call


@pytest.fixture
def directory(config: Path) -> RunDirectory:
    return RunDirectory.of(loader.load(config))


def ran(outcomes: list[runner.Outcome]) -> list[str]:
    return [outcome.stage for outcome in outcomes if outcome.ran]


def snapshot(directory: RunDirectory) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in manifests.walk(directory.stages)}


def replace_stage(monkeypatch: pytest.MonkeyPatch, kind: str, run: Callable[[Context], Result]) -> None:
    module = types.ModuleType(kind)
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"stages.{kind}", module)


def test_all_stages_run_once_and_then_none(
    run: Run, directory: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran(run()) == fakes.STAGES
    before = snapshot(directory)
    capsys.readouterr()
    assert ran(run()) == []
    assert snapshot(directory) == before
    assert "nothing to do: every stage is up to date" in capsys.readouterr().out


def test_a_run_goes_on_after_its_lock_was_removed_by_hand(run: Run, directory: RunDirectory) -> None:
    """As the error about another machine's stale lock says to."""
    run(until="base")
    (directory.root / ".lock").unlink()
    assert [state["state"] for state in inspection.status(directory.root)][:3] == ["published", "published", "not run"]
    assert ran(run(until="sft")) == ["sft"]


def test_a_config_of_somebody_elses_is_not_written_over(run: Run, directory: RunDirectory) -> None:
    directory.root.mkdir()
    directory.config.write_text("theirs: true\n")
    with pytest.raises(ConfigError, match=r"holds a config\.yaml and is no run directory"):
        run()
    assert directory.config.read_text() == "theirs: true\n"
    assert [path.name for path in directory.root.iterdir()] == ["config.yaml"]


def test_a_manifest_says_what_the_stage_was_made_from(run: Run, directory: RunDirectory, config: Path) -> None:
    run("stages.dpo.beta=0.3", command=f"baton run {config} stages.dpo.beta=0.3")
    manifest = manifests.verify(directory.stage("dpo"))
    assert manifest.stage == manifest.stage_kind == "dpo"
    assert manifest.kind == "adapter"
    assert manifest.settings["beta"] == 0.3
    assert manifest.settings["seed"] == manifest.seed == 1
    assert manifest.settings["optimizer"]["name"] == "adamw"
    parent = manifest.inputs["policy"]
    assert (parent.source, parent.kind, parent.directory) == ("sft", "model", "stages/sft")
    assert parent.digest == manifests.load(directory.stage("sft")).digest
    assert parent.manifest_sha256 == manifests.sha256(directory.stage("sft"))
    assert manifest.data_settings["data"]["held_out"] == 0.1
    assert len(manifest.data_settings["data"]["digest"]) == 64
    assert {output.path: output.role for output in manifest.outputs} == {
        "metrics.jsonl": "log",
        "nested/weights.safetensors": "artifact",
    }
    assert manifest.cost.tokens == 1000
    assert manifest.cost.peak_memory_bytes > 2**20
    assert manifest.environment["chosen_device"] == "cpu"
    assert len(manifest.environment["code"]) == 64
    assert manifest.command == f"baton run {config} stages.dpo.beta=0.3 --only dpo"


def test_the_same_run_elsewhere_has_the_same_keys_and_digests(
    run: Run, directory: RunDirectory, tmp_path: Path
) -> None:
    run()
    run(f"output={tmp_path}/other")
    other = RunDirectory(tmp_path / "other")
    for name in fakes.STAGES:
        first, second = (manifests.load(each.stage(name)) for each in (directory, other))
        assert (first.key, first.digest) == (second.key, second.digest)


def test_a_stage_that_comes_out_the_same_leaves_its_children(run: Run) -> None:
    run()
    assert ran(run("stages.tok.vocab_size=9000")) == ["tok"]  # the fake tokenizer is always the same


def test_a_changed_stage_and_its_descendants_run_and_the_old_ones_are_archived(
    run: Run, directory: RunDirectory
) -> None:
    run()
    assert ran(run("stages.sft.epochs=2")) == ["sft", "rm", "dpo"]
    assert sorted(path.name.partition("-")[0] for path in directory.archive.iterdir()) == ["dpo", "rm", "sft"]
    assert all(manifests.damages(path) == [] for path in directory.archive.iterdir())
    assert inspection.integrity(directory.root) == {name: [] for name in sorted(fakes.STAGES)}


def test_a_damaged_stage_is_quarantined_and_made_again(run: Run, directory: RunDirectory) -> None:
    run()
    (directory.stage("sft") / "nested" / "weights.safetensors").write_text("0" * 64)
    assert ran(run()) == ["sft"]  # it came out as it was, so its children stay
    (aside,) = directory.quarantine.iterdir()
    assert aside.name.startswith("sft-")
    assert (aside / "nested" / "weights.safetensors").read_text() == "0" * 64
    assert inspection.integrity(directory.root) == {name: [] for name in sorted(fakes.STAGES)}


def test_a_stage_that_fails_leaves_the_others_and_its_log(
    run: Run, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STAGE", "rm:nan")
    with pytest.raises(NumericalError, match="the loss is not finite"):
        run()
    assert directory.published() == ["base", "sft", "tok"]
    assert [path.name for path in directory.failed("rm").iterdir()] == ["metrics.jsonl"]
    assert len((directory.failed("rm") / "metrics.jsonl").read_text().splitlines()) == 2
    assert list(directory.work.iterdir()) == []
    assert inspection.status(directory.root)[3] == {
        "stage": "rm",
        "kind": "reward",
        "state": "not run",
        "failed": True,
        "checkpoint": None,
        "running": None,
    }
    monkeypatch.delenv("FAKE_STAGE")
    assert ran(run()) == ["rm", "dpo"]
    assert not directory.failed("rm").exists()


def test_a_failing_rerun_leaves_the_published_stage(
    run: Run, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    before = snapshot(directory)
    monkeypatch.setenv("FAKE_STAGE", "rm:bug")
    with pytest.raises(RuntimeError, match="a bug"):
        run(force=["rm"])
    assert snapshot(directory) == before


def test_history_remembers_why_and_how_each_run_ended(
    run: Run, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    monkeypatch.setenv("FAKE_STAGE", "rm:nan")
    with pytest.raises(NumericalError):
        run(force=["rm"])
    with directory.history.open("a") as stream:
        stream.write('{"stage": "rm", "torn')
    last = inspection.history(directory, "rm")
    assert last is not None
    assert last["reasons"] == ["forced"]
    assert last["outcome"] == "NumericalError: step 2: the loss is not finite"
    first = inspection.history(directory, "tok")
    assert first is not None
    assert (first["reasons"], first["outcome"]) == (["never ran"], "published")


def test_a_metric_that_is_not_finite_is_refused(
    run: Run, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_finite(context: Context) -> Result:
        return Result(kind="model", metrics={"loss": Metric(value=float("nan"))})

    replace_stage(monkeypatch, "sft", not_finite)
    with pytest.raises(NumericalError, match="`loss` is not finite"):
        run()
    assert directory.published() == ["base", "tok"]


def test_a_full_disk_is_a_storage_error_whatever_the_library_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(context: Context) -> Result:
        monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=0))
        raise RuntimeError("unexpected pos 64 vs 0")

    replace_stage(monkeypatch, "sft", full)
    with pytest.raises(StorageError, match="no space left: 0 bytes free"):
        run()


def test_the_stage_gets_its_inputs_its_data_and_its_seed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Context] = []

    def watched(context: Context) -> Result:
        seen.append(context)
        return fakes.run_stage(context)

    replace_stage(monkeypatch, "dpo", watched)
    run("seed=5", "device=cpu", "dtype=float32")
    (context,) = seen
    assert (context.name, context.seed, context.device, context.dtype) == ("dpo", 5, "cpu", "float32")
    assert context.inputs["policy"].source == "sft"
    assert context.data["data"].source.endswith("pairs.jsonl")
    assert context.settings.beta == 0.1


def test_status_says_what_is_running_how_far_it_is_and_by_whom(
    run: Run, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def watched(context: Context) -> Result:
        for done in (None, 3):
            if done:
                context.progress({"loss": 1.0}, done=done, total=8)
            capsys.readouterr()
            assert cli.execute(cli.app, ["status", str(directory.root)]) == 0
            said.append(capsys.readouterr().out)
        return fakes.run_stage(context)

    monkeypatch.setenv("FAKE_STAGE", "dpo:bug")
    with pytest.raises(RuntimeError):
        run()
    monkeypatch.delenv("FAKE_STAGE")
    replace_stage(monkeypatch, "dpo", watched)
    run()
    first, second = said
    assert re.search(r"^dpo +dpo +running$", first, re.MULTILINE)
    assert re.search(r"^dpo +dpo +running, step 3 of 8$", second, re.MULTILINE)
    assert f"dpo: process {os.getpid()} on " in second
    assert "running" not in "".join(line for line in second.splitlines() if line.startswith("sft "))
    assert [each["running"] for each in inspection.status(directory.root)] == [None] * 5


def test_what_a_killed_run_left_is_not_running(
    run: Run, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    (directory.work / "dpo-0123456789ab").mkdir(parents=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    record = {"host": socket.gethostname(), "boot": lock._boot(), "pid": ended.pid, "started": "2026-01-01T00:00:00"}
    for pid in (ended.pid, os.getpid(), 0, -1, 2**70):
        (directory.root / lock.FILE_NAME).write_text(json.dumps(record | {"pid": pid}))
        assert not any(each["running"] for each in inspection.status(directory.root))
    with lock.hold(directory.root):
        assert [each["stage"] for each in inspection.status(directory.root) if each["running"]] == ["dpo"]


@pytest.mark.parametrize("line", ["", "{", "[" * 100_000, '{"step": Infinity, "total": 3}', '{"step": []}', "7"])
def test_a_log_that_tells_no_step_is_no_matter_to_status(run: Run, directory: RunDirectory, line: str) -> None:
    run()
    work = directory.work / "dpo-0123456789ab"
    work.mkdir(parents=True)
    (work / "metrics.jsonl").write_text(line)
    with lock.hold(directory.root):
        (found,) = [each["running"] for each in inspection.status(directory.root) if each["running"]]
    assert found["step"] is None


def test_several_processes_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2"):
        run()


def test_the_report_is_written_when_something_ran_or_it_is_missing(run: Run, directory: RunDirectory) -> None:
    run(until="sft")
    report = directory.root / "report.html"
    assert report.read_text() == "base sft tok"
    report.write_text("mine")
    run(until="sft")
    assert report.read_text() == "mine"
    run()
    assert report.read_text() == "base dpo rm sft tok"
    report.unlink()
    run()
    assert report.exists()


def test_the_resolved_configuration_is_kept(run: Run, directory: RunDirectory, config: Path) -> None:
    run("stages.dpo.beta=0.3")
    assert loader.load(directory.config) == loader.load(config, ["stages.dpo.beta=0.3"])


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_stops_the_run_and_keeps_what_was_published(
    run: Run, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    monkeypatch.setenv("FAKE_STAGE", f"rm:{name}")
    with pytest.raises(Interrupted) as caught:
        run()
    assert caught.value.exit_code == code
    assert directory.published() == ["base", "sft", "tok"]
    assert list(directory.work.iterdir()) == []
    assert directory.failed("rm").is_dir()
    last = inspection.history(directory, "rm")
    assert last is not None
    assert last["outcome"] == "interrupted"
    monkeypatch.delenv("FAKE_STAGE")
    assert ran(run()) == ["rm", "dpo"]


def test_a_signal_while_publishing_waits_until_the_stage_is_there(
    run: Run, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = manifests.verify

    def signalled(path: Path) -> manifests.Manifest:
        if path.parent == directory.work:
            os.kill(os.getpid(), signal.SIGTERM)
        return verify(path)

    monkeypatch.setattr(manifests, "verify", signalled)
    with pytest.raises(Interrupted):
        run()
    assert directory.published() == ["tok"]
    assert manifests.damages(directory.stage("tok")) == []


def test_a_second_signal_while_publishing_stops_at_once_and_loses_nothing(
    run: Run, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    before = snapshot(directory)
    verify = manifests.verify

    def signalled(path: Path) -> manifests.Manifest:
        if path.parent == directory.work:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return verify(path)

    monkeypatch.setattr(manifests, "verify", signalled)
    with pytest.raises(Interrupted):
        run("stages.sft.epochs=2")
    assert snapshot(directory) == before
    assert list(directory.work.iterdir()) == []


def test_a_file_system_without_known_locks_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(until="tok")
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr("pipeline.lock.file_system", lambda path: "nfs4")
    run(until="tok")
    assert "run: nfs4 may not keep processes of other machines out" in capsys.readouterr().out


def test_a_killed_process_leaves_a_run_that_goes_on(baton: Baton, config: Path, directory: RunDirectory) -> None:
    assert baton("run", config, FAKE_STAGE="rm:SIGKILL").returncode == -9
    assert directory.published() == ["base", "sft", "tok"]
    done = baton("run", config)
    assert done.returncode == 0, done.stderr
    assert "tok: running" not in done.stdout
    assert directory.published() == sorted(fakes.STAGES)
    assert (directory.root / ".lock").read_text() == ""  # nobody holds it any more
