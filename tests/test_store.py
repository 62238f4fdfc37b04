"""The run directory: absent or complete, one writer, nothing lost."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
from conftest import REPOSITORY

from pipeline import durable, store
from pipeline import manifest as manifests
from pipeline.errors import ArtifactError, StorageError
from pipeline.manifest import Cost, Manifest
from pipeline.store import RunDirectory

FLIPPED = "deep/er/model.safetensors"


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


def edit_cost(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"tokens": 1,', '"tokens": 7,'))


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
        (edit_cost, ["manifest.json: changed since it was written"]),
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
        (b"[]", "schema version None, expected 2"),
        (b'{"schema_version": 1}', r"another version of Baton \(schema 1, this one writes 2\)"),
        (b'{"schema_version": 1, "seal": "of another text"}', "schema version 1, expected 2"),
        (b'{"schema_version": -1}', "schema version -1, expected 2"),
        (b'{"schema_version": true}', "schema version True, expected 2"),
        (b'{"schema_version": 2}', "malformed manifest: stage"),
    ],
)
def test_a_broken_manifest_is_an_artifact_error(run: RunDirectory, content: bytes, message: str) -> None:
    directory = publish(run)
    (directory / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        manifests.damages(directory)


@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir, lambda path: Path(path).symlink_to("/etc/hostname")])
def test_a_manifest_that_is_no_file_is_neither_followed_nor_waited_for(
    run: RunDirectory, plant: Callable[[Path], None]
) -> None:
    directory = publish(run)
    (directory / "manifest.json").unlink()
    plant(directory / "manifest.json")
    with pytest.raises(ArtifactError, match="the manifest cannot be read"):
        manifests.damages(directory)


def test_a_directory_without_manifest_is_no_stage(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a finished stage"):
        manifests.load(tmp_path)


@pytest.mark.parametrize(("name", "every"), [(FLIPPED, 1), (manifests.FILE_NAME, 17)])
def test_every_single_flipped_bit_is_found(run: RunDirectory, name: str, every: int) -> None:
    directory = publish(run)
    path = directory / name
    content = path.read_bytes()
    for position in range(0, len(content) * 8, every):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(ArtifactError, match=path.name):
            manifests.verify(directory)
    path.write_bytes(content)
    assert manifests.damages(directory) == []


def test_a_stage_may_not_leave_links(run: RunDirectory) -> None:
    work = fill(run)
    (work / "link").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="only leave regular files"):
        durable.inventory(work)


def test_what_a_dead_process_left_is_put_aside_without_its_weights(run: RunDirectory) -> None:
    work = fill(run)
    with store.lock(run):
        assert list(run.work.iterdir()) == []
    kept = sorted(path.name for path in manifests.walk(run.failed("sft")))
    assert kept == ["config.json", "metrics.jsonl"]
    assert not work.exists()


def test_a_replacement_cut_off_between_its_two_renames_is_brought_to_its_end(run: RunDirectory) -> None:
    old = manifests.sha256(publish(run))
    run.stage("sft").rename(run.work / "sft-0123456789ab")
    with store.lock(run):
        assert manifests.sha256(run.stage("sft")) == old
        assert list(run.work.iterdir()) == []


def test_a_finished_stage_that_was_not_published_is_kept_beside_the_published_one(run: RunDirectory) -> None:
    work = fill(run, b"new")
    durable.seal(work, manifests.FILE_NAME, manifest_of(work))
    old = manifests.sha256(publish(run, b"old"))
    with store.lock(run):
        assert manifests.sha256(run.stage("sft")) == old
        (kept,) = run.archive.iterdir()
        assert (manifests.damages(kept), (kept / FLIPPED).read_bytes()) == ([], b"new")


def test_a_damaged_one_that_was_not_published_is_cleared_away(run: RunDirectory) -> None:
    work = fill(run)
    durable.seal(work, manifests.FILE_NAME, manifest_of(work))
    flip(work)
    with store.lock(run):
        assert not run.stage("sft").exists()
        assert not (run.failed("sft") / FLIPPED).exists()


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_renameat2", lambda source, target, flags: False)


def no_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "exchange", fail_to_write)


def fail_to_write(*arguments: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("harm", [no_archive, no_exchange])
def test_a_replacement_that_fails_leaves_what_was_published(
    run: RunDirectory, harm: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it fails: what is given up afterwards may not be the old stage, which changes places with the new."""
    publish(run, b"old")
    with monkeypatch.context() as patch:
        harm(patch)
        if harm is no_exchange:
            patch.setattr(store, "_set_aside", fail_to_write)
        work = fill(run, b"new")
        with pytest.raises(OSError, match="Input/output error"):
            store.publish(work, run, "sft", manifest_of(work))
    if work.exists():
        store.fail(run, work)
    with store.lock(run):
        assert manifests.damages(run.stage("sft")) == []
        assert (run.stage("sft") / FLIPPED).read_bytes() == b"old"


@pytest.mark.parametrize("plain", [False, True])
def test_a_name_that_leads_nowhere_is_replaced_as_a_stage_is(
    run: RunDirectory, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.stages.mkdir()
    run.stage("sft").symlink_to("nowhere")
    if plain:
        no_exchange(monkeypatch)
    publish(run)
    assert manifests.damages(run.stage("sft")) == []
    assert [path.is_symlink() for path in run.archive.iterdir()] == [True]


def test_what_was_published_meanwhile_is_not_replaced_where_renaming_has_no_flags(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_exchange(monkeypatch)
    run.stages.mkdir()
    run.stage("sft").mkdir()
    with pytest.raises(OSError, match="File exists"):
        durable.rename_new(fill(run), run.stage("sft"))


def test_work_and_stages_on_two_file_systems_are_refused_before_anything_is_computed(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = Path.stat

    def elsewhere(path: Path, **options: bool) -> os.stat_result:
        found = status(path, **options)
        return os.stat_result((*found[:2], found.st_dev + 1, *found[3:])) if path == run.stages else found

    monkeypatch.setattr(Path, "stat", elsewhere)
    with pytest.raises(StorageError, match=r"stages: on another file system than .*\.work"):
        store.begin(run, "sft")
    monkeypatch.undo()
    assert list(run.work.iterdir()) == []


def test_a_device_that_fails_is_a_storage_error(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    work = fill(run)
    manifest = manifest_of(work)
    synced: list[Path] = []

    def failing(path: Path) -> None:
        synced.append(path)
        fail_to_write()

    monkeypatch.setattr(durable, "sync", failing)
    with pytest.raises(StorageError, match="the device failed") as caught, store.storage_errors(run.root):
        store.publish(work, run, "sft", manifest)
    assert caught.value.exit_code == 6
    assert len(synced) == 1  # what could not be synced once is not tried again
    assert not run.stage("sft").exists()


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


@pytest.mark.usefixtures("fork_server")
def test_a_kill_at_any_step_leaves_the_old_stage_or_the_new_one(run: RunDirectory) -> None:
    """The process is killed before its 1st, 2nd, ... change of the file system, until it gets through."""
    program = KILLED.format(tests=str(Path(__file__).parent))
    publish(run, b"old")
    expected = {b"old", b"new"}
    for points in range(0, 400, 7):
        ended = forks.run(program, run.root, str(points), cwd=REPOSITORY)
        assert manifests.damages(run.stage("sft")) == []
        assert (run.stage("sft") / FLIPPED).read_bytes() in expected
        with store.lock(run):
            assert list(run.work.iterdir()) == []
        if ended.returncode == 0:
            break
        assert ended.returncode == -9, ended.stderr
    assert ended.returncode == 0
    assert (run.stage("sft") / FLIPPED).read_bytes() == b"new"
