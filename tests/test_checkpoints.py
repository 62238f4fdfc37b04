"""Checkpoints on disk: absent or whole, for their maker alone, the newest intact one first; and when they are made."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import pytest
from conftest import REPOSITORY, reseal
from rich.console import Console

from pipeline import checkpoints, durable, store
from pipeline import manifest as manifests
from pipeline.checkpoints import Maker
from pipeline.errors import ArtifactError, Interrupted, StorageError
from pipeline.interruption import Interruption
from pipeline.progress import StageProgress
from pipeline.resumption import StageCheckpoints

MAKER = Maker("key", {"code": "c", "libraries": {"torch": "2"}})
WEIGHTS = "deep/weights.safetensors"
SIZE = 9


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".checkpoints" / "sft"


def fill(content: bytes) -> Callable[[Path], None]:
    def write(work: Path) -> None:
        (work / "deep").mkdir()
        (work / WEIGHTS).write_bytes(content)
        (work / "state.json").write_text("{}")

    return write


def publish(directory: Path, *steps: int) -> list[Path]:
    return [checkpoints.publish(directory, MAKER, step, fill(f"weights {step}".encode())) for step in steps]


def test_the_newest_by_step_is_found_whatever_the_times_say(directory: Path) -> None:
    publish(directory, 2, 10, 9)
    os.utime(directory / "step-00000002", (2**31, 2**31))
    found, passed = checkpoints.newest(directory, MAKER)
    assert found == directory / "step-00000010"
    assert (found / WEIGHTS).read_bytes() == b"weights 10"
    assert passed == []
    assert checkpoints.next_step(directory, MAKER) == checkpoints.last_step(directory) == 10


def test_the_newest_is_that_of_the_highest_step_whatever_the_clock_says(directory: Path) -> None:
    for path in publish(directory, 9, 10):
        age = 3600 * checkpoints.step_of(path)
        os.utime(path, (time.time() - age, time.time() - age))
    assert checkpoints.newest(directory, MAKER) == (directory / "step-00000010", [])
    assert checkpoints.last_step(directory) == 10


def test_where_nothing_was_made_nothing_is_found(directory: Path) -> None:
    assert checkpoints.newest(directory, MAKER) == (None, [])
    assert checkpoints.next_step(directory, MAKER) is None
    assert checkpoints.last_step(directory) is None
    checkpoints.clear(directory)


def flip(path: Path) -> None:
    content = bytearray((path / WEIGHTS).read_bytes())
    content[3] ^= 1
    (path / WEIGHTS).write_bytes(content)


def link(path: Path) -> None:
    (path / WEIGHTS).rename(path.parent.parent / "elsewhere")
    (path / WEIGHTS).symlink_to(path.parent.parent / "elsewhere")


def edit(field: str, value: object) -> Callable[[Path], None]:
    return lambda path: reseal(path / checkpoints.FILE_NAME, **{field: value})


def too_large(path: Path) -> None:
    os.truncate(path / checkpoints.FILE_NAME, manifests.LARGEST + 1)


def edit_unsealed(path: Path) -> None:
    record = json.loads((path / checkpoints.FILE_NAME).read_text())
    (path / checkpoints.FILE_NAME).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flip, f"damaged: {WEIGHTS}: sha256 "),
        (lambda path: (path / WEIGHTS).write_bytes(b"w"), f"damaged: {WEIGHTS}: 1 bytes, expected 9 bytes"),
        (lambda path: (path / WEIGHTS).unlink(), f"damaged: {WEIGHTS}: missing"),
        (lambda path: (path / "more").write_text(""), "damaged: more: not in the manifest"),
        (link, f"damaged: {WEIGHTS}: a link"),
        (lambda path: (path / checkpoints.FILE_NAME).unlink(), "no readable checkpoint.json"),
        (lambda path: (path / checkpoints.FILE_NAME).write_bytes(b"{"), "no readable checkpoint.json"),
        (edit_unsealed, "no readable checkpoint.json"),
        (edit("schema_version", 1), "made by another version of Baton"),
        (edit("schema_version", "1"), "no readable checkpoint.json"),
        (too_large, "no readable checkpoint.json"),
        (edit("step", 3), "its record is of step 3"),
        (edit("key", "other"), "made from other settings, inputs or data"),
        (edit("environment", {"code": "d", "libraries": {"torch": "2"}}), "made with other code: "),
        (edit("environment", {"code": "c", "libraries": {}}), "made with other libraries: to go on would not be exact"),
        (edit("environment", {"code": "c"}), "made with other libraries: "),
    ],
)
def test_one_that_cannot_serve_is_passed_over_with_the_reason(
    directory: Path, harm: Callable[[Path], None], reason: str
) -> None:
    older, newer = publish(directory, 5, 6)
    harm(newer)
    found, (passed,) = checkpoints.newest(directory, MAKER)
    assert found == older
    assert passed.startswith(f"step-00000006: {reason}")


def test_every_flipped_bit_of_a_record_is_found(directory: Path) -> None:
    (made,) = publish(directory, 1)
    path = made / checkpoints.FILE_NAME
    content = path.read_bytes()
    for position in range(0, len(content) * 8, 5):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert checkpoints.newest(directory, MAKER)[0] is None
    path.write_bytes(content)
    assert checkpoints.newest(directory, MAKER) == (made, [])


def test_what_is_not_kept_goes_entirely_be_it_a_file(directory: Path) -> None:
    older, newer = publish(directory, 1, 2)
    (directory / "step-00000003").write_text("")
    (directory / "step-00000004").symlink_to(older)
    checkpoints.keep(directory, [older, newer])
    assert sorted(directory.iterdir()) == [older, newer]
    assert (older / WEIGHTS).is_file()


def test_a_damaged_one_of_the_same_step_is_replaced(directory: Path) -> None:
    (made,) = publish(directory, 4)
    flip(made)
    assert publish(directory, 4) == [made]
    assert checkpoints.newest(directory, MAKER) == (made, [])


def test_what_is_not_kept_goes_with_what_dead_processes_left(directory: Path) -> None:
    made = publish(directory, 1, 2, 3)
    (directory / ".work-0123").mkdir()
    checkpoints.keep(directory, made[1:])
    assert sorted(directory.iterdir()) == made[1:]


def test_one_that_fails_leaves_the_others_and_nothing_of_its_own(directory: Path) -> None:
    made = publish(directory, 1)

    def fails(work: Path) -> None:
        (work / "half").write_bytes(b"half")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        checkpoints.publish(directory, MAKER, 2, fails)
    assert list(directory.iterdir()) == made


def test_a_full_disk_is_a_storage_error_whatever_the_library_said(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(work: Path) -> None:
        monkeypatch.setattr(store, "_FULL", 2**80)
        raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(StorageError, match="no space left"):
        checkpoints.publish(directory, MAKER, 1, full)


def test_one_that_is_not_on_disk_as_it_was_written_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = durable.seal

    def flipped(work: Path, *arguments: object) -> None:
        seal(work, *arguments)  # type: ignore[arg-type]
        flip(work)

    monkeypatch.setattr(durable, "seal", flipped)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors: sha256"):
        publish(directory, 1)
    assert list(directory.iterdir()) == []


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_checkpoints
points = int(sys.argv[2])
def count(event, arguments):
    global points
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlsym"):
        points -= 1
        if points < 0:
            os.kill(os.getpid(), 9)
directory = Path(sys.argv[1])
sys.addaudithook(count)
made = test_checkpoints.publish(directory, 2)
test_checkpoints.checkpoints.keep(directory, made)
"""


@pytest.mark.usefixtures("fork_server")
def test_a_kill_at_any_step_leaves_the_older_one_or_the_newer_one(directory: Path) -> None:
    program = KILLED.format(tests=str(Path(__file__).parent))
    for points in range(0, 400, 5):
        checkpoints.clear(directory)
        publish(directory, 1)
        ended = forks.run(program, directory, str(points), cwd=REPOSITORY)
        found, passed = checkpoints.newest(directory, MAKER)
        assert found is not None
        assert passed == []
        assert (found / WEIGHTS).read_bytes() == f"weights {checkpoints.step_of(found)}".encode()
        if ended.returncode == 0:
            break
        assert ended.returncode == -9, ended.stderr
    assert ended.returncode == 0
    assert list(directory.iterdir()) == [directory / "step-00000002"]


Stage = Callable[..., StageCheckpoints]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def interruption() -> Interruption:
    return Interruption()


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def progress(tmp_path: Path, clock: Clock, output: io.StringIO) -> Iterator[StageProgress]:
    (tmp_path / "work").mkdir()
    with StageProgress("sft", tmp_path / "work", Console(file=output, soft_wrap=True), clock) as progress:
        yield progress


@pytest.fixture
def stage(directory: Path, progress: StageProgress, interruption: Interruption, clock: Clock) -> Stage:
    def attempt(minutes: float, maker: Maker = MAKER) -> StageCheckpoints:
        return StageCheckpoints(directory, maker, minutes, progress, interruption, clock)

    return attempt


def test_one_is_made_when_it_is_time_and_two_are_kept(stage: Stage, directory: Path, clock: Clock) -> None:
    attempt = stage(10)
    clock.now += 3600  # what was before the steps does not count
    there = []
    with attempt.steps(SIZE):
        for step in range(1, 61):
            clock.now += 60
            attempt.after(step, fill(b"weights"))
            there.append(sorted(path.name for path in directory.iterdir()) if directory.exists() else [])
    assert there[8:10] == [[], ["step-00000010"]]
    assert there[-1] == ["step-00000050", "step-00000060"]


def test_before_it_is_time_nothing_is_written(stage: Stage, directory: Path) -> None:
    attempt = stage(10)
    assert attempt.resume() is None
    with attempt.steps(SIZE):
        for step in range(1, 4):
            attempt.after(step, fill(b"weights"))
    assert not directory.parent.exists()


def test_without_an_interval_every_step_leaves_one(stage: Stage, directory: Path) -> None:
    attempt = stage(0)
    with attempt.steps(SIZE):
        for step in range(1, 4):
            attempt.after(step, fill(b"weights"))
    assert checkpoints.last_step(directory) == 3


def test_the_log_goes_on_from_where_the_checkpoint_was(
    stage: Stage, progress: StageProgress, clock: Clock, tmp_path: Path
) -> None:
    attempt = stage(0)
    clock.now += 5
    progress({"loss": 3.0}, done=1, total=3)
    attempt.after(1, fill(b"weights"))
    progress({"loss": 2.0}, done=2, total=3)
    clock.now += 1000
    assert stage(0).resume() is not None
    clock.now += 2
    progress({"loss": 2.5}, done=2, total=3)
    lines = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "total": 3, "seconds": 5.0, "loss": 3.0},
        {"step": 2, "total": 3, "seconds": 7.0, "loss": 2.5},
    ]
    assert progress.earlier == 5.0


def test_a_stage_is_told_which_are_not_used_and_they_go_with_its_first_own(
    stage: Stage, directory: Path, output: io.StringIO
) -> None:
    attempt = stage(0)
    for step in (1, 2, 3):
        attempt.after(step, fill(b"weights"))
    flip(directory / "step-00000003")
    again = stage(0)
    assert again.resume() == directory / "step-00000002"
    first, second = output.getvalue().splitlines()
    assert first.startswith(f"sft: checkpoint not used: step-00000003: damaged: {WEIGHTS}: sha256 ")
    assert second == "sft: goes on after step 2"
    again.after(3, fill(b"other"))
    assert checkpoints.newest(directory, MAKER) == (directory / "step-00000003", [])
    assert len(list(directory.iterdir())) == 2


def test_without_space_for_checkpoints_no_step_is_taken(
    stage: Stage, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(size: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=size))

    attempt, needed = stage(0), round(1.2 * 3 * 1000)
    free(needed - 1)
    with pytest.raises(StorageError, match="3,600 bytes needed for 3 checkpoints, 3,599 free"), attempt.steps(1000):
        attempt.after(1, fill(b"weights"))
    assert not directory.exists()
    free(needed)
    with attempt.steps(1000):
        attempt.after(1, fill(b"weights"))
    again = stage(0)
    again.resume()
    free(2399)  # one is there already
    with pytest.raises(StorageError, match="2,400 bytes needed for 2 checkpoints"), again.steps(1000):
        pass


def test_a_stage_of_other_settings_begins(stage: Stage, output: io.StringIO) -> None:
    stage(0).after(1, fill(b"weights"))
    assert stage(0, Maker("other", MAKER.environment)).resume() is None
    assert "made from other settings, inputs or data" in output.getvalue()


def take_steps(attempt: StageCheckpoints, signals: dict[int, list[signal.Signals]]) -> list[int]:
    """Eight steps, in some of which signals come; returns those that ended."""
    ended: list[int] = []
    with contextlib.suppress(KeyboardInterrupt), attempt.steps(SIZE):
        for step in range(1, 9):
            for number in signals.get(step, ()):
                os.kill(os.getpid(), number)
            ended.append(step)
            attempt.after(step, fill(b"weights"))
    return ended


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_lets_the_step_end_and_leave_a_checkpoint(
    stage: Stage, directory: Path, interruption: Interruption, number: signal.Signals
) -> None:
    with interruption.watch():
        assert take_steps(stage(10), {3: [number]}) == [1, 2, 3]
    assert checkpoints.last_step(directory) == 3


def test_a_second_signal_stops_at_once(stage: Stage, directory: Path, interruption: Interruption) -> None:
    with interruption.watch():
        assert take_steps(stage(10), {3: [signal.SIGTERM, signal.SIGTERM]}) == [1, 2]
    assert not directory.exists()


def stopped(interruption: Interruption, body: Callable[[], None]) -> int:
    """The exit code of what was stopped."""
    try:
        with interruption.watch():
            body()
    except Interrupted as error:
        return error.exit_code
    return 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_outside_steps_a_signal_stops_at_once(interruption: Interruption, number: signal.Signals, code: int) -> None:
    reached: list[str] = []

    def body() -> None:
        os.kill(os.getpid(), number)
        reached.append("end")

    assert stopped(interruption, body) == code
    assert reached == []


def test_a_signal_after_the_last_checkpoint_stops_before_what_follows(interruption: Interruption, stage: Stage) -> None:
    reached: list[str] = []

    def body() -> None:
        with stage(10).steps(SIZE):
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("end of the steps")
        reached.append("what follows")

    assert stopped(interruption, body) == 143
    assert reached == ["end of the steps"]


def test_an_error_in_a_step_is_what_it_is_though_a_signal_came(interruption: Interruption, stage: Stage) -> None:
    def body() -> None:
        with stage(10).steps(SIZE):
            os.kill(os.getpid(), signal.SIGTERM)
            raise ValueError("in the step")

    with pytest.raises(ValueError, match="in the step"):
        stopped(interruption, body)
