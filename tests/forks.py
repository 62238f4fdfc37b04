"""Python programs in processes of their own, without each waiting for torch.

One process a worker imports the libraries once and forks for every program (`multiprocessing`'s fork server). A
program gets arguments, environment, directory and streams of its own and leaves with an exit code or by a signal.
What a library reads from the environment when it is imported, the seed of hashes and numpy's generator are the
server's. Whatever depends on these, asks what a program imports or how it is started, needs `subprocess` instead.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Self

COMMAND = "from pipeline.cli import main; main()"
"""`baton`, as its script calls it."""
STAGES = ["stages.evaluate", "stages.sft", "stages.dpo", "stages.ppo"]
IMPORTED = ["pipeline.cli", "pipeline.report", "peft", "trl", *STAGES, "_pytest.config", "_pytest.python"]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(IMPORTED)


class Process:
    """A program that runs, as `python -c PROGRAM ARGUMENTS` would; what it prints goes to files.

    Attributes:
        pid: The process's number.
        args: The arguments.
    """

    def __init__(
        self,
        program: str,
        *arguments: str | Path,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
        given: bytes = b"",
        terminal: str | None = None,
    ) -> None:
        """Start a program.

        Args:
            program: Its text.
            arguments: What it finds in `sys.argv[1:]`.
            cwd: Its directory.
            environment: Its environment; by default this process's.
            given: What it reads from standard input.
            terminal: The path of a terminal for its three streams, instead of files.
        """
        self.args = list(map(str, arguments))
        self._files = tempfile.TemporaryDirectory(prefix="process-")
        folder = Path(self._files.name)
        self._streams = (folder / "in", folder / "out", folder / "err")
        for stream, content in zip(self._streams, (given, b"", b""), strict=True):
            stream.write_bytes(content)
        places = [terminal] * 3 if terminal else list(map(str, self._streams))
        known = dict(os.environ if environment is None else environment)
        self._process = _SERVER.Process(target=_run, args=(program, self.args, str(cwd), known, places))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def out(self) -> str:
        """What was written to standard output until now."""
        return self._streams[1].read_text("utf-8", errors="replace")

    @property
    def err(self) -> str:
        """What was written to standard error until now."""
        return self._streams[2].read_text("utf-8", errors="replace")

    @property
    def runs(self) -> bool:
        return self._process.is_alive()

    def waits_for(self, line: str, seconds: float = 120) -> None:
        """Wait until it has written a line that begins so."""
        deadline = time.monotonic() + seconds
        while not any(each.startswith(line) for each in self.out.splitlines()):
            assert self.runs, self.err
            assert time.monotonic() < deadline, self.out
            time.sleep(0.01)

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def ends(self, seconds: float = 120) -> CompletedProcess[str]:
        """Wait for its end; what it printed, and its exit code, which a signal makes negative."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still running after {seconds} s: {self.out}{self.err}"
        return CompletedProcess(self.args, self._process.exitcode, self.out, self.err)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._files.cleanup()


def run(
    program: str,
    *arguments: str | Path,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    given: bytes = b"",
    seconds: float = 120,
) -> CompletedProcess[str]:
    """Run a program to its end."""
    with Process(program, *arguments, cwd=cwd, environment=environment, given=given) as process:
        return process.ends(seconds)


def start_server() -> None:
    """Have the libraries imported, which takes some seconds, before anybody waits for a program."""
    run("", cwd=Path.cwd())


def _run(program: str, arguments: list[str], cwd: str, environment: dict[str, str], places: list[str]) -> None:
    """What the forked process does."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    _open_streams(places)
    sys.argv = ["-c", *arguments]
    sys.path[:0] = ["", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        # The text of a test's own program, as `python -c` would take it; nothing that was read from a file.
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    finally:  # in the order of an interpreter that ends
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def _open_streams(places: list[str]) -> None:
    """Standard streams as a new interpreter has them."""
    for number, place in enumerate(places):
        flags = os.O_RDWR if number else os.O_RDONLY
        opened = os.open(place, flags | os.O_NOCTTY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1 if os.isatty(1) else -1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
