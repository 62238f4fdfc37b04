"""Digests: equal for what is equal, different for what differs."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pipeline import fingerprint


def test_a_file_hashes_like_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(content)
    assert fingerprint.file_sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_the_order_of_keys_does_not_matter_and_everything_else_does() -> None:
    value = {"b": [1, 2.5, None, True], "a": {"é": "x"}}
    assert fingerprint.digest(value) == fingerprint.digest(json.loads(json.dumps(value, sort_keys=True)))
    others = [
        {**value, "a": {}},
        {**value, "b": [2.5, 1, None, True]},
        {**value, "b": [1, 2.5, None, "true"]},
    ]
    assert len({fingerprint.digest(each) for each in [value, *others]}) == 4


def test_not_a_number_has_no_digest() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint.digest({"loss": float("nan")})


def test_content_depends_on_names_and_bytes_and_not_on_order() -> None:
    files = {"a": "1" * 64, "b": "2" * 64}
    assert fingerprint.content(files) == fingerprint.content(dict(reversed(files.items())))
    swapped = {"a": files["b"], "b": files["a"]}
    assert fingerprint.content(files) != fingerprint.content(swapped)
    assert fingerprint.content(files) != fingerprint.content({"a": files["a"]})


def sources(kind: str) -> str:
    """What a new process says."""
    fingerprint._hashed.clear()
    return fingerprint.sources(kind)


def test_sources_change_with_the_modules_a_stage_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = ["stages/dpo.py", "stages/sft.py", "stages/core/losses.py", "data/read.py", "reward/head.py"]
    for module in modules:
        (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / module).write_text("x = 1\n")
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    for module in modules:
        before = sources("dpo")
        (tmp_path / module).write_text("x = 2\n")
        assert (sources("dpo") == before) == (module == "stages/sft.py")


def test_the_table_of_trainers_is_a_source_of_the_stage_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "pipeline" / "trainers.py"
    table.parent.mkdir()
    table.write_text("x = 1\n")
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    before = {kind: sources(kind) for kind in ("trl", "dpo")}
    table.write_text("x = 2\n")
    assert sources("trl") != before["trl"]
    assert sources("dpo") == before["dpo"]


def test_the_environment_is_json_and_stable() -> None:
    environment = fingerprint.environment()
    assert environment == fingerprint.environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["libraries"]["torch"]
    assert environment["cpus"] >= 1


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_what_all_cores_find_is_in_the_order_of_the_items(count: int) -> None:
    assert fingerprint.on_all_cores(str, range(count)) == list(map(str, range(count)))


def test_an_error_on_another_core_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        fingerprint.on_all_cores(lambda item: 1 // item, [1, 0, 1])


INTERRUPTED = """
import os, signal, threading
from pipeline.fingerprint import on_all_cores

def read(item):
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()

on_all_cores(read, range(3))
"""


def test_a_process_that_is_interrupted_does_not_wait_for_files_that_are_being_read() -> None:
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=REPOSITORY, check=False, timeout=60)
    assert ended.returncode == -signal.SIGINT
