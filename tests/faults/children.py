"""Processes to break: forked ones that run a function, alone or under `strace`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import BatonError

Action = Callable[[], int | None]
"""What a process does; returns its exit code, None for 0."""

MISSING = "" if shutil.which("strace") else "strace is not installed"
"""Why nothing can be traced."""

CHANGES = (
    *("openat", "write", "pwrite64", "ftruncate", "fsync", "fdatasync", "copy_file_range", "sendfile"),
    *("mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "chmod", "fchmodat"),
)
"""System calls that change a file system, an `openat` if it creates or truncates."""

_CALL = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)", re.DOTALL)
_BEGUN, _ENDED = (
    re.compile(r"^(\d+) .*(?= <unfinished \.\.\.>$)", re.DOTALL),
    re.compile(r"^(\d+) +<\.\.\. \w+ resumed>"),
)
_SYNCS = ("fsync", "fdatasync")


@dataclass(frozen=True)
class Call:
    """A system call that was made."""

    name: str
    arguments: str
    result: int

    @property
    def changes(self) -> bool:
        """Whether it changed, or was to make durable, what is on disk."""
        return self.name != "openat" or "O_CREAT" in self.arguments or "O_TRUNC" in self.arguments


@dataclass(frozen=True)
class Point:
    """The n-th call of a name: where a process is broken."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name} {self.number}"


@dataclass(frozen=True)
class Blow:
    """What became of a process that was broken at a point."""

    point: Point
    code: int
    """How it ended."""
    problem: str = ""
    """What was wrong with what it left; empty if nothing was."""


def start(action: Action, output: Path, wait: int | None = None) -> int:
    """Fork a process that runs an action and ends; what it prints goes to a file. Returns its id.

    Args:
        action: What it does.
        output: Where it prints to.
        wait: A descriptor that it reads a byte of before it begins.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # Opened here, so that nothing the process does before it waits is a call that can be broken.
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    child = os.fork()
    if child:
        os.close(descriptor)
        return child
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        if wait is not None:
            os.read(wait, 1)
        code = _code(action)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a process; its exit code, the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(action: Action, output: Path) -> int:
    """The exit code of a process that runs an action."""
    return ended(start(action, output))


def traced(action: Action, output: Path, log: Path, *options: str) -> int:
    """The exit code of a process that runs an action under `strace`."""
    reading, writing = os.pipe()
    child = start(action, output, wait=reading)
    command = ["strace", "-f", "-o", str(log), *options, "-p", str(child)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    with tracer:
        first = tracer.stderr.readline()
        if "attached" not in first:
            os.kill(child, signal.SIGKILL)
        os.write(writing, b".")
        code = ended(child)
        assert "attached" in first, first + tracer.stderr.read()
    os.close(reading)
    os.close(writing)
    return code


def calls(action: Action, output: Path, log: Path) -> list[Call]:
    """The changing system calls of a process that ends well, all of its first thread, whose calls can be numbered."""
    names = ",".join(f"?{name}" for name in CHANGES)
    code = traced(action, output, log, "-s", "10000000", "-y", "-e", "signal=none", "-e", f"trace={names}")
    assert code == 0, output.read_text(encoding="utf-8")
    lines = _whole(log.read_text(encoding="utf-8").splitlines())
    matches = [match for line in lines if (match := _CALL.match(line))]
    found = [(match[1], Call(match[2], match[3], int(match[4]))) for match in matches]
    first = found[0][0]
    assert not [call for thread, call in found if thread != first and call.changes]
    return [call for thread, call in found if thread == first]


def _whole(lines: Iterable[str]) -> Iterator[str]:
    """Lines of which none is cut in two by what another thread did meanwhile."""
    begun: dict[str, str] = {}
    for line in lines:
        if start := _BEGUN.match(line):
            begun[start[1]] = start[0]
        elif end := _ENDED.match(line):
            yield begun.pop(end[1]) + line[end.end() :]
        else:
            yield line


def points(made: Sequence[Call]) -> list[Point]:
    """Every call that changed something, as the number of its name."""
    counts: Counter[str] = Counter()
    found = []
    for call in made:
        counts[call.name] += 1
        if call.changes:
            found.append(Point(call.name, counts[call.name]))
    return found


def broken(action: Action, output: Path, point: Point, how: str) -> int:
    """The exit code of a process to which something happens at a point: `signal=KILL`, `error=EIO`."""
    return traced(action, output, Path(os.devnull), "-e", f"inject={point.name}:{how}:when={point.number}")


def _code(action: Action) -> int:
    try:
        return action() or 0
    except BatonError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
