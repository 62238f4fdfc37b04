"""Who may write to a run directory: one process, by the kernel's lock, and by the record where that may not do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline import lock
from pipeline.errors import BusyError, StorageError

HOLD = """
import sys; from pathlib import Path; from pipeline import lock
with lock.hold(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()
"""


def holder(directory: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until its standard input ends."""
    command = [sys.executable, "-c", HOLD, str(directory)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def record(directory: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((directory / lock.FILE_NAME).read_text())
    return found


def write_record(directory: Path, **changes: object) -> None:
    """The record of a process that did not let go."""
    own = {"host": "elsewhere", "boot": "other", "pid": 7, "started": "2026-01-01T00:00:00+00:00"}
    (directory / lock.FILE_NAME).write_text(json.dumps(own | changes))


def test_a_second_process_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with (
            pytest.raises(BusyError, match=f"in use by process {process.pid} on .* since 20") as caught,
            lock.hold(tmp_path),
        ):
            pass
        assert caught.value.exit_code == 75
        process.kill()
    with lock.hold(tmp_path):  # the kernel dropped the dead process's lock
        assert record(tmp_path)["pid"] == os.getpid()


def test_who_has_not_said_who_they_are_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT", 0.05)
    with holder(tmp_path) as process:
        named = (tmp_path / lock.FILE_NAME).read_text()
        (tmp_path / lock.FILE_NAME).write_text("")
        with pytest.raises(BusyError) as caught, lock.hold(tmp_path):
            pass
        assert caught.value.what == "in use"
        monkeypatch.setattr("time.sleep", lambda seconds: (tmp_path / lock.FILE_NAME).write_text(named))
        with pytest.raises(BusyError, match=f"in use by process {process.pid} "), lock.hold(tmp_path):
            pass
        process.kill()


def test_the_record_names_host_boot_process_and_start_and_goes_with_the_process(tmp_path: Path) -> None:
    with lock.hold(tmp_path):
        found = record(tmp_path)
    assert found.keys() == {"host", "boot", "pid", "started"}
    assert found["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert (tmp_path / lock.FILE_NAME).read_text() == ""
    with pytest.raises(KeyboardInterrupt), lock.hold(tmp_path):
        raise KeyboardInterrupt
    assert (tmp_path / lock.FILE_NAME).read_text() == ""


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "\x00" * 5000])
def test_a_record_that_cannot_be_read_keeps_nobody_out(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "file_system", lambda path: "nfs4")
    (tmp_path / lock.FILE_NAME).write_text(content)
    with lock.hold(tmp_path):
        assert record(tmp_path)["pid"] == os.getpid()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    with lock.hold(tmp_path):
        here, there = socket.socketpair()
        child = os.fork()
        if child == 0:
            here.close()
            there.sendall(b".")
            there.recv(1)  # until the parent closes its end
            os._exit(0)
        there.close()
        assert here.recv(1) == b"."
    with lock.hold(tmp_path):
        here.close()
    assert os.waitpid(child, 0)[1] == 0


def test_a_forked_child_that_leaves_the_block_takes_nothing_from_its_parent(tmp_path: Path) -> None:
    child = None
    with lock.hold(tmp_path):
        try:
            child = os.fork()
            if child == 0:
                with lock.hold(tmp_path):  # the parent has it
                    pass
        except BusyError:
            os._exit(75)
        finally:
            if child == 0:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
        assert record(tmp_path)["pid"] == os.getpid()


def test_another_machine_that_did_not_let_go_keeps_a_network_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(tmp_path)
    monkeypatch.setattr(lock, "file_system", lambda path: "nfs4")
    refused = pytest.raises(BusyError, match=r"in use by process 7 on elsewhere since 2026.* nfs4")
    with refused as caught, lock.hold(tmp_path):
        pass
    assert f"remove {tmp_path}/.lock" in caught.value.hint
    assert record(tmp_path)["host"] == "elsewhere"


@pytest.mark.parametrize("changes", [{"host": socket.gethostname()}, {"boot": lock._boot()}])
def test_what_was_this_machine_keeps_no_network_directory(
    tmp_path: Path, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(tmp_path, **changes)
    monkeypatch.setattr(lock, "file_system", lambda path: "nfs4")
    with lock.hold(tmp_path):
        assert record(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("kind", ["ext4", "tmpfs", ""])
def test_a_directory_copied_from_another_machine_is_not_locked(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(tmp_path)
    monkeypatch.setattr(lock, "file_system", lambda path: kind)
    assert lock.caveat(tmp_path) == ""
    with lock.hold(tmp_path):
        assert record(tmp_path)["pid"] == os.getpid()


def test_the_type_of_a_file_system_is_that_of_the_innermost_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "with space"
    inner.mkdir()
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        f"28 27 0:5 / {tmp_path}/with\\040space rw shared:7 - nfs4 server:/x rw\n"
        f"29 27 0:6 / {tmp_path}/other rw - fuse.sshfs x rw\n"
        f"30 27 0:7 / {tmp_path}/other rw - xfs x rw\n"
    )
    monkeypatch.setattr(lock, "_MOUNTS", mounts)
    found = [lock.file_system(path) for path in (tmp_path, inner, inner / "run", tmp_path / "other")]
    assert found == ["ext4", "nfs4", "nfs4", "xfs"]
    assert "nfs4 may not keep processes of other machines out" in lock.caveat(inner)
    monkeypatch.setattr(lock, "_MOUNTS", tmp_path / "missing")
    assert lock.file_system(inner) == ""


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(StorageError, match="cannot be locked: No locks available"), lock.hold(tmp_path):
        pass


@pytest.mark.slow
def test_no_lock_is_stale_after_a_kill(tmp_path: Path) -> None:
    for _ in range(20):
        here, there = socket.socketpair()
        child = os.fork()
        if child == 0:
            with lock.hold(tmp_path):
                there.sendall(b".")
                signal.pause()
            os._exit(1)
        assert here.recv(1) == b"."
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with lock.hold(tmp_path):
            assert record(tmp_path)["pid"] == os.getpid()
        here.close()
        there.close()
