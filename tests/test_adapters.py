"""Adapters: the user's function is run when it is allowed, never before, and blamed when it fails."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from data import adapters
from data.findings import ADAPTER_FAILED, EMPTY_RESPONSE, LEFT_OUT_BY_ADAPTER, MIXED_LAYOUT, WRONG_TYPE, BadRow, Kind
from data.schema import Message, Preference
from pipeline.errors import ConfigError, DataError

GUIDE = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
ADAPTER = """
def adapt(row):
    match row["what"]:
        case "error": return {}["missing"]
        case "exit": raise SystemExit(0)
        case "leave": return None
        case "number": return 5
        case "text": return {"text": "a document"}
        case "unknown": return {"nothing": "known"}
        case "list": return {"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}
        case "empty": return {"prompt": "a", "chosen": "", "rejected": "c"}
        case "change": row["nested"].append(1)
    return {"prompt": "a", "chosen": "b", "rejected": "c"}

sideways = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of its own for each test, on the path but not yet imported or allowed."""
    name = f"adapter_{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}"
    (tmp_path / f"{name}.py").write_text(ADAPTER)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def reference(module: str) -> str:
    """The module's function, allowed."""
    adapters.allow(f"{module}:adapt")
    return f"{module}:adapt"


def test_a_function_gives_rows_of_a_known_layout(reference: str) -> None:
    layout = adapters.find(reference)
    expected = Preference((Message("user", "a"),), ("b", "c"), 0.0, "f:1")
    assert layout.name == reference
    assert layout.parse({"what": "pair"}, "f:1") == expected


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("error", ADAPTER_FAILED, "KeyError: 'missing'"),
        ("exit", ADAPTER_FAILED, "SystemExit: 0"),
        ("leave", LEFT_OUT_BY_ADAPTER, "left out"),
        ("number", WRONG_TYPE, "returned 5 (expected a dict or None)"),
        ("text", MIXED_LAYOUT, "returned the columns text; before, it was `explicit`"),
        ("unknown", MIXED_LAYOUT, "returned the columns nothing"),
        ("list", MIXED_LAYOUT, "chosen: [{"),
        ("empty", EMPTY_RESPONSE, "chosen: ''"),
    ],
)
def test_what_goes_wrong_is_told_with_the_row(reference: str, what: str, kind: Kind, words: str) -> None:
    layout = adapters.find(reference)
    layout.parse({"what": "pair"}, "f:1")
    with pytest.raises(BadRow) as caught:
        layout.parse({"what": what}, "f:7")
    assert (caught.value.where, caught.value.kind.name) == ("f:7", kind.name)
    assert words in caught.value.what
    layout.parse({"what": "pair"}, "f:8")


def test_a_row_left_out_first_does_not_decide_the_layout(reference: str) -> None:
    layout = adapters.find(reference)
    for what in ("leave", "error"):
        with pytest.raises(BadRow):
            layout.parse({"what": what}, "f:1")
    layout.parse({"what": "text"}, "f:2")
    with pytest.raises(BadRow, match="before, it was `text`"):
        layout.parse({"what": "pair"}, "f:3")


def test_a_first_result_in_no_known_layout_is_refused_for_the_source(reference: str) -> None:
    with pytest.raises(DataError, match="no format has the columns 'nothing'") as caught:
        adapters.find(reference).parse({"what": "unknown"}, "f:1")
    assert not isinstance(caught.value, BadRow)
    assert "f:1" in caught.value.where
    assert reference in caught.value.where


def test_the_function_cannot_change_the_record(reference: str) -> None:
    record: dict[str, Any] = {"what": "change", "nested": []}
    adapters.find(reference).parse(record, "f:1")
    assert record == {"what": "change", "nested": []}


def test_the_digest_is_that_of_the_source_file(reference: str, tmp_path: Path) -> None:
    source = tmp_path / f"{reference.partition(':')[0]}.py"
    before = adapters.digest(reference)
    assert before == hashlib.sha256(source.read_bytes()).hexdigest()
    source.write_text(ADAPTER + "# changed\n")
    assert adapters.digest(reference) != before


def test_the_digest_is_that_of_the_module_that_defines_the_function(module: str, tmp_path: Path) -> None:
    front = tmp_path / f"front_{module}.py"
    front.write_text(f"from {module} import adapt\n")
    adapters.allow(f"front_{module}:adapt")
    expected = hashlib.sha256((tmp_path / f"{module}.py").read_bytes()).hexdigest()
    assert adapters.digest(f"front_{module}:adapt") == expected


def test_a_function_that_nobody_allowed_is_refused_before_its_module_is_imported(module: str) -> None:
    adapters.allow(f"{module}:another")
    for use in (adapters.find, adapters.digest):
        with pytest.raises(ConfigError, match="neither installed nor named") as caught:
            use(f"{module}:adapt")
        assert "baton.formats" in caught.value.hint
        assert f"--adapter {module}:adapt" in caught.value.hint
    assert module not in sys.modules


@pytest.mark.parametrize("wrong", ["adapt", "module:", ":adapt", "a.b:c.d", "a..b:c", "a b:c", "a:b:c", "../a:b"])
def test_a_malformed_reference_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="expected module:function"):
        adapters.allow(wrong)
    with pytest.raises(ConfigError, match="expected module:function"):
        adapters.find(wrong)


def test_what_cannot_be_imported_is_refused_with_the_reason(module: str, tmp_path: Path) -> None:
    (tmp_path / f"broken_{module}.py").write_text("raise RuntimeError('no licence')")
    (tmp_path / f"leaving_{module}.py").write_text("import sys\nsys.exit(0)")
    cases = {
        f"{module}:nothing": "`nothing` is missing",
        f"{module}:sideways": "`sideways` is not a function",
        f"absent_{module}:adapt": "ModuleNotFoundError",
        f"broken_{module}:adapt": "RuntimeError: no licence",
        f"leaving_{module}:adapt": "SystemExit: 0",
    }
    for reference, words in cases.items():
        adapters.allow(reference)
        with pytest.raises(ConfigError, match=words):
            adapters.find(reference)


READ = """
import json, sys
from data.findings import Findings
from data.read import scan
from pipeline.config import DataSource
from pipeline.errors import BatonError
try:
    readings = list(scan(DataSource.model_validate_json(sys.argv[1]), Findings()))
except BatonError as error:
    print(json.dumps([error.exit_code, error.render(), "support_pairs" in sys.modules]))
else:
    print(json.dumps([[each.origin, *(each.row.responses if each.row else [each.problem.what])] for each in readings]))
"""


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The worked example of the guide, as a reader would type it."""
    files = dict(re.findall(r"`(support-pairs/[\w.]+)`[^\n]*(?:\n[^\n]+)*\n\n```\w+\n(.*?)```", GUIDE, re.DOTALL))
    assert set(files) == {"support-pairs/support_pairs.py", "support-pairs/pyproject.toml"}
    (tmp_path / "support-pairs").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (rows,) = re.findall(r"as `replies.jsonl`:\n\n```json\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "replies.jsonl").write_text(rows)
    return tmp_path


def read_in_a_process(folder: Path, *path: Path) -> Any:
    (block,) = [each for each in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL) if "support_pairs" in each]
    source = yaml.safe_load(block)["data"]["support"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [REPOSITORY, *path]))}
    command = [sys.executable, "-c", READ, json.dumps(source)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_worked_example_is_installed_and_read_as_the_guide_says(example: Path) -> None:
    installed = example / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(installed)]
    subprocess.run([*install, *options, "./support-pairs"], cwd=example, capture_output=True, check=True)
    assert read_in_a_process(example, installed) == [
        ["replies.jsonl:1", "I am sorry. I will look for it.", "Please wait."],
        ["replies.jsonl:2", "Yes, in your profile.", "No."],
        ["replies.jsonl:3", LEFT_OUT_BY_ADAPTER.name],
    ]


def test_the_worked_example_is_refused_and_not_imported_when_it_is_only_on_the_path(example: Path) -> None:
    code, message, imported = read_in_a_process(example, example / "support-pairs")
    assert code == ConfigError.exit_code
    assert "neither installed nor named on the command line" in message
    assert not imported
