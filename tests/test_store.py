"""The run directory: absent or complete, one writer, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline import durable, store
from pipeline import manifest as manifests
from pipeline.errors import ArtifactError, BusyError, StorageError
from pipeline.manifest import Cost, Manifest
from pipeline.store import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")


def fill(run: RunDirectory, content: bytes = b"weights") -> Path:
    work = store.begin(run, "sft")
    (work / "deep" / "er").mkdir(parents=True)
    (work / "deep" / "er" / "model.safetensors").write_bytes(content)
    (work / "deep" / "er" / "model.safetensors").chmod(0o600)
    (work / "config.json").write_text("{}")
    (work / "metrics.jsonl").write_text('{"seconds": 1}\n')
    return work


def manifest_of(work: Path) -> Manifest:
    outputs = durable.inventory(work)
    return Manifest(
        stage="sft",
        stage_kind="sft",
        kind="model",
        key="k",
        digest=manifests.content_digest(outputs),
        inputs={},
        settings={},
        data_settings={},
        data=[],
        outputs=outputs,
        adaptation=None,
        tokenizer={},
        metrics={},
        cost=Cost(seconds=1, tokens=1, peak_memory_bytes=1),
        environment={},
        seed=0,
        warnings=[],
        command="",
        started="",
    )


def publish(run: RunDirectory, content: bytes = b"weights") -> Path:
    work = fill(run, content)
    return store.publish(work, run, "sft", manifest_of(work))


def test_a_published_stage_is_intact_and_its_work_directory_is_gone(run: RunDirectory) -> None:
    directory = publish(run)
    assert directory == run.stage("sft")
    assert manifests.damages(directory) == []
    assert manifests.load(directory) == manifests.verify(directory)
    assert list(run.work.iterdir()) == []


def test_files_get_the_mode_of_the_umask(run: RunDirectory) -> None:
    before = os.umask(0o027)
    try:
        directory = publish(run)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in manifests.walk(directory)}
    assert set(modes.values()) == {0o640}


def test_logs_do_not_enter_the_content_digest(run: RunDirectory) -> None:
    first = durable.inventory(fill(run))
    work = fill(run)
    (work / "metrics.jsonl").write_text('{"seconds": 2}\n')
    second = durable.inventory(work)
    assert first != second
    assert manifests.content_digest(first) == manifests.content_digest(second)


def test_a_replaced_stage_is_archived_whole(run: RunDirectory) -> None:
    old = manifests.sha256(publish(run, b"old"))
    publish(run, b"new")
    (archived,) = run.archive.iterdir()
    assert archived.name == f"sft-{old[:8]}"
    assert manifests.damages(archived) == []
    assert (archived / "deep/er/model.safetensors").read_bytes() == b"old"
    assert (run.stage("sft") / "deep/er/model.safetensors").read_bytes() == b"new"


def test_replacing_works_where_renaming_has_no_flags(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_renameat2", lambda source, target, flags: False)
    publish(run, b"old")
    publish(run, b"new")
    assert len(list(run.archive.iterdir())) == 1
    assert manifests.damages(run.stage("sft")) == []


def test_publishing_never_replaces_what_it_did_not_see(run: RunDirectory) -> None:
    run.stages.mkdir()
    work = fill(run)
    run.stage("sft").mkdir()
    with pytest.raises(OSError, match="File exists"):
        durable.rename_new(work, run.stage("sft"))


def test_a_work_directory_that_changed_after_the_inventory_is_not_published(run: RunDirectory) -> None:
    work = fill(run)
    manifest = manifest_of(work)
    (work / "config.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"config\.json: sha256"):
        store.publish(work, run, "sft", manifest)
    assert not run.stage("sft").exists()


FLIPPED = "deep/er/model.safetensors"


def flip(directory: Path) -> None:
    path = directory / FLIPPED
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def link(directory: Path) -> None:
    path = directory / FLIPPED
    path.rename(directory.parent / "elsewhere")
    path.symlink_to(directory.parent / "elsewhere")


def link_folder(directory: Path) -> None:
    (directory / "deep").rename(directory.parent / "elsewhere")
    (directory / "deep").symlink_to(directory.parent / "elsewhere")


def fifo(directory: Path) -> None:
    (directory / FLIPPED).unlink()
    os.mkfifo(directory / FLIPPED)


def edit_hash(directory: Path) -> None:
    path = directory / "manifest.json"
    fields = json.loads(path.read_text())
    fields["outputs"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (flip, [f"{FLIPPED}: sha256 ", ", expected sha256 "]),
        (lambda d: (d / FLIPPED).write_bytes(b""), [f"{FLIPPED}: 0 bytes, expected 7 bytes"]),
        (lambda d: (d / FLIPPED).unlink(), [f"{FLIPPED}: missing, expected 7 bytes"]),
        (lambda d: (d / "new").write_text("x"), ["new: not in the manifest"]),
        (link, [f"{FLIPPED}: a link, expected a regular file"]),
        (link_folder, ["deep: not in the manifest", f"{FLIPPED}: missing"]),
        (fifo, [f"{FLIPPED}: not a regular file"]),
        (edit_hash, ["config.json: sha256", "manifest.json: digest of the listed files differs"]),
    ],
)
def test_every_damage_is_named_with_both_values(run: RunDirectory, harm: object, named: list[str]) -> None:
    directory = publish(run)
    harm(directory)  # type: ignore[operator]
    with pytest.raises(ArtifactError) as caught:
        manifests.verify(directory)
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "schema version None, expected 1"),
        (b'{"schema_version": 2}', "schema version 2, expected 1"),
        (b'{"schema_version": 1}', "malformed manifest: stage"),
    ],
)
def test_a_broken_manifest_is_an_artifact_error(run: RunDirectory, content: bytes, message: str) -> None:
    directory = publish(run)
    (directory / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        manifests.damages(directory)


def test_a_directory_without_manifest_is_no_stage(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a finished stage"):
        manifests.load(tmp_path)


def test_every_single_flipped_bit_is_found(run: RunDirectory) -> None:
    directory = publish(run)
    path = directory / FLIPPED
    content = path.read_bytes()
    for position in range(len(content) * 8):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert len(manifests.damages(directory)) == 1
    path.write_bytes(content)
    assert manifests.damages(directory) == []


def test_a_stage_may_not_leave_links(run: RunDirectory) -> None:
    work = fill(run)
    (work / "link").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="only leave regular files"):
        durable.inventory(work)


def test_a_second_process_is_told_who_holds_the_run(run: RunDirectory) -> None:
    program = (
        "import sys; from pathlib import Path; from pipeline.store import RunDirectory, lock\n"
        "with lock(RunDirectory(Path(sys.argv[1]))): print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, run.root],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(BusyError, match=f"in use by process {holder.pid} on .* since 20") as caught,
            store.lock(run),
        ):
            pass
        assert caught.value.exit_code == 75
        holder.kill()
    with store.lock(run):  # the kernel dropped the dead process's lock
        assert json.loads((run.root / ".lock").read_text())["pid"] == os.getpid()


def test_a_forked_child_does_not_keep_the_lock(run: RunDirectory) -> None:
    with store.lock(run):
        here, there = socket.socketpair()
        child = os.fork()
        if child == 0:
            here.close()
            there.sendall(b".")
            there.recv(1)  # until the parent closes its end
            os._exit(0)
        there.close()
        assert here.recv(1) == b"."
    with store.lock(run):
        here.close()
    assert os.waitpid(child, 0)[1] == 0


def test_what_a_dead_process_left_is_put_aside_without_its_weights(run: RunDirectory) -> None:
    work = fill(run)
    with store.lock(run):
        assert list(run.work.iterdir()) == []
    kept = sorted(path.name for path in manifests.walk(run.failed("sft")))
    assert kept == ["config.json", "metrics.jsonl"]
    assert not work.exists()


def test_a_replacement_cut_off_between_its_two_renames_loses_nothing(run: RunDirectory) -> None:
    old = manifests.sha256(publish(run))
    run.stage("sft").rename(run.work / "sft-0123456789ab")
    with store.lock(run):
        assert [path.name for path in run.archive.iterdir()] == [f"sft-{old[:8]}"]


def test_success_clears_the_record_of_an_earlier_failure(run: RunDirectory) -> None:
    store.fail(run, fill(run))
    assert run.failed("sft").is_dir()
    publish(run)
    assert not run.failed("sft").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_refusals_of_the_system_are_storage_errors_that_name_the_path(tmp_path: Path, number: int) -> None:
    path = tmp_path / "file"
    with pytest.raises(StorageError, match=str(path)) as caught, store.storage_errors(tmp_path):
        raise OSError(number, os.strerror(number), str(path))
    assert caught.value.exit_code == 6


def test_other_system_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), store.storage_errors(tmp_path):
        (tmp_path / "missing").read_bytes()


def test_too_little_space_is_refused_with_both_numbers(tmp_path: Path) -> None:
    store.check_space(tmp_path, 1)
    with pytest.raises(StorageError, match=r"2,000,104,857,600 bytes needed, [\d,]+ free"):
        store.check_space(tmp_path, 10**12)


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    durable.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        durable.write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_store
from pipeline.store import RunDirectory
points = int(sys.argv[2])
def count(event, arguments):
    global points
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlsym"):
        points -= 1
        if points < 0:
            os.kill(os.getpid(), 9)
sys.addaudithook(count)
test_store.publish(RunDirectory(Path(sys.argv[1])), b"new")
"""


def test_a_kill_at_any_step_leaves_the_old_stage_or_the_new_one(run: RunDirectory) -> None:
    """The process is killed before its 1st, 2nd, ... change of the file system, until it gets through."""
    program = KILLED.format(tests=str(Path(__file__).parent))
    publish(run, b"old")
    expected = {b"old", b"new"}
    for points in range(0, 400, 7):
        ended = subprocess.run(
            [sys.executable, "-c", program, run.root, str(points)],
            cwd=REPOSITORY,
            capture_output=True,
            check=False,
        )
        assert manifests.damages(run.stage("sft")) == []
        assert (run.stage("sft") / FLIPPED).read_bytes() in expected
        with store.lock(run):
            assert list(run.work.iterdir()) == []
        if ended.returncode == 0:
            break
        assert ended.returncode == -9, ended.stderr.decode()
    assert ended.returncode == 0
    assert (run.stage("sft") / FLIPPED).read_bytes() == b"new"
