"""Fixtures: a small run on fake stages, in this process or through the command line."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import fakes
import forks
import pytest
import tiers
import tiny
import typer.main
from filelock import FileLock
from pydantic import BaseModel

from pipeline import manifest as manifests
from pipeline import report, seal

REPOSITORY = Path(__file__).resolve().parent.parent
Baton = Callable[..., subprocess.CompletedProcess[str]]
Shared = Callable[[str, Callable[[Path], object]], Path]


class Fields(BaseModel, extra="allow"):
    """A record of any fields."""


def reseal(path: Path, **changes: Any) -> None:
    """Change fields of a sealed record and seal it again, as its maker could."""
    fields = json.loads(path.read_text()) | changes
    del fields[seal.FIELD]
    path.write_text(seal.sealed(Fields(**fields)))


pytest_plugins = ["pytester"]
pytest_addoption = tiers.add_options


def pytest_configure(config: pytest.Config) -> None:
    """Keep to the tier that was asked for, and let SIGINT act in tests and their processes as in the foreground."""
    config.pluginmanager.register(tiers.Tiers(config))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it for what it starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is imported by now stays: collecting garbage, which libraries do on every other call, need not search it."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is left in the user's cache, and tests share what they make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATON_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def commands_made_once() -> Iterator[None]:
    """Typer makes all commands anew for every call, which takes as long as many a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configuration of a five-stage run, with its data."""
    return fakes.write_world(tmp_path)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Make a directory once for all workers of a session: `shared(NAME, MAKE)`, where `MAKE` fills it.

    Nobody writes to it afterwards, which is checked at the end.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    inventories: dict[Path, dict[Path, tuple[int, int]]] = {}

    def make_once(name: str, make: Callable[[Path], object]) -> Path:
        directory, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
                make(directory)
                done.touch()
        inventories.setdefault(directory, sizes_and_times(directory))
        return directory

    yield make_once
    for directory, inventory in inventories.items():
        assert sizes_and_times(directory) == inventory, f"a test has changed {directory}, which tests share"


def sizes_and_times(directory: Path) -> dict[Path, tuple[int, int]]:
    """Every file with its size and its time of modification."""
    return {path: (found.st_size, found.st_mtime_ns) for path in manifests.walk(directory) if (found := path.lstat())}


@pytest.fixture(scope="session")
def chain(shared: Shared) -> Path:
    """The directory of a finished run of the whole chain, really trained; its configuration is beside it."""
    if tiny.FINISHED in os.environ:
        return Path(os.environ[tiny.FINISHED]).parent / "run"
    return shared("chain", tiny.finish_chain) / "run"


@pytest.fixture(scope="session")
def fork_server() -> None:
    """Programs of `forks` start at once from here on."""
    forks.start_server()


@pytest.fixture
def report_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report, which takes longer to draw than a small stage to train, is one line."""
    monkeypatch.setattr(report, "write", fakes.write_report)


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch, report_of_one_line: None) -> None:
    """Stages in this process are fakes, and the report is one line."""
    modules: dict[str, object] = {}
    fakes.install(modules)  # type: ignore[arg-type]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def baton(tmp_path: Path, fork_server: None) -> Baton:
    """Run `baton ARGUMENTS` on the fake stages in a process of its own."""

    def call(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        known = {**os.environ, "NO_COLOR": "1", **environment}
        return forks.run(fakes.COMMAND, *arguments, cwd=tmp_path, environment=known)

    return call
