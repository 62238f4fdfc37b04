"""The guide to data says what the code does: its rows are read, its settings are valid, its messages are real."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from pydantic import TypeAdapter

from data.findings import BadRow
from data.formats import FORMATS, detect
from data.formats.messages import SHAREGPT
from data.read import kind_of
from pipeline.config import Data, DataSource

GUIDE = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
TABLE: list[tuple[str, str, str]] = re.findall(r"^\| `(\w+)` \| (\w+) \| `(\{.*\})` \|$", GUIDE, re.MULTILINE)
SETTINGS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)]


def test_the_table_lists_every_format_in_order() -> None:
    assert [(name, kind) for name, kind, _ in TABLE] == [(each.name, each.kind) for each in FORMATS]


@pytest.mark.parametrize(("name", "kind", "row"), TABLE)
def test_each_row_of_the_table_is_recognised_as_what_it_is_called(name: str, kind: str, row: str) -> None:
    record = json.loads(row)
    layout = detect(record, "auto", "f:1")
    assert layout.name == name
    assert kind_of(layout.parse(record, "f:1")) == kind


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_settings_are_valid(settings: dict[str, Any]) -> None:
    for source in settings["data"].values():
        DataSource.model_validate(source)
    for stage in settings.get("stages", {}).values():
        TypeAdapter(Data).validate_python(stage["data"])


def test_the_error_message_is_the_one_that_is_printed() -> None:
    layout = detect({"prompt": "a", "chosen": "b", "rejected": "c"}, "auto", "support/pairs.jsonl:1")
    with pytest.raises(BadRow) as caught:
        layout.parse({"prompt": "a", "chosen": None, "rejected": "c"}, "support/pairs.jsonl:7")
    assert f"\n{caught.value.where}: {caught.value.what}\n" in GUIDE


def test_the_roles_of_sharegpt_are_those_that_are_read() -> None:
    (line,) = re.findall(r"^\* `sharegpt` takes (.*?)\. ", GUIDE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", line)) == set(SHAREGPT.roles)
