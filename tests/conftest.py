"""Fixtures: a small run on fake stages, in this process or through the command line."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import fakes
import pytest
import tiny
import typer.main
from pydantic import BaseModel

from pipeline import cli, report, seal

REPOSITORY = Path(__file__).resolve().parent.parent
Baton = Callable[..., subprocess.CompletedProcess[str]]


class Fields(BaseModel, extra="allow"):
    """A record of any fields."""


def reseal(path: Path, **changes: Any) -> None:
    """Change fields of a sealed record and seal it again, as its maker could."""
    fields = json.loads(path.read_text()) | changes
    del fields[seal.FIELD]
    path.write_text(seal.sealed(Fields(**fields)))


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
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of the whole chain, really trained; not to be changed."""
    root = tmp_path_factory.mktemp("finished")
    assert cli.execute(cli.app, ["run", str(tiny.write_chain(root))]) == 0
    return root / "run"


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages in this process are fakes, and the report, which takes longer than they do, is one line."""
    modules: dict[str, object] = {}
    fakes.install(modules)  # type: ignore[arg-type]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(report, "write", fakes.write_report)


@pytest.fixture
def baton(tmp_path: Path) -> Baton:
    """Run `baton ARGUMENTS` on the fake stages in a process of its own."""

    def call(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, REPOSITORY / "tests" / "fakes.py", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1", **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return call
