"""The guide to rewards says what the code does: its examples get the rewards it says, its server runs."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from pydantic import TypeAdapter

from data.schema import Message, Prompt
from pipeline.rules import RULES, Rule
from reward import client, server
from reward.mixture import RuleMixture

GUIDE = (REPOSITORY / "docs" / "rewards.md").read_text(encoding="utf-8")
TABLE: list[tuple[str, str, str, str]] = re.findall(
    r"^\| `(\{.*?\})` \| `(\{.*?\})` \| `(\".*?\")` \| (\S+) \|$", GUIDE, re.MULTILINE
)
SETTINGS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)]
REQUEST, ANSWER = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL))
(PROGRAM,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


def mixture(rules: list[dict[str, Any]]) -> RuleMixture:
    return RuleMixture(TypeAdapter(list[Rule]).validate_python(rules))


def test_the_table_shows_every_rule_but_the_server() -> None:
    assert {yaml.safe_load(rule)["rule"] for rule, *_ in TABLE} == RULES.keys() - {"server"}
    assert len(TABLE) == GUIDE.count("| `{rule: ")


@pytest.mark.parametrize(("rule", "facts", "response", "reward"), TABLE)
def test_each_example_gets_the_reward_that_stands_beside_it(rule: str, facts: str, response: str, reward: str) -> None:
    prompt = Prompt((Message("user", "?"),), json.loads(facts))
    (found,) = mixture([yaml.safe_load(rule)]).scores([prompt], [json.loads(response)])
    assert found == pytest.approx(float(reward))


def test_the_settings_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "token")
    inline = [yaml.safe_load(rule) for rule in re.findall(r" `(\{rule: .*?\})` takes", GUIDE)]
    assert len(inline) == 1
    for rules in [*(each["rules"] for each in SETTINGS), inline]:
        mixture(rules)


def test_the_statuses_waits_and_sizes_are_those_of_the_client() -> None:
    listed = re.search(r"answered ([\d, or]+) is repeated", GUIDE.replace("\n", " "))
    assert listed is not None
    assert {int(status) for status in re.findall(r"\d+", listed[1])} == client.BUSY
    assert f"after {client.FIRST_WAIT}, 1, 2, ... seconds, at most {client.LONGEST_WAIT:.0f}" in GUIDE
    assert f"An answer may have {server.ANSWER_BYTES:,} bytes and {server.REWARD_BYTES} for each row" in GUIDE


def test_the_server_of_the_guide_answers_the_request_of_the_guide(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(PROGRAM, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(tmp_path / "server.py"), str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            (rule,) = SETTINGS[-1]["rules"]
            rule |= {"url": f"http://localhost:{port}/", "hosts": [f"localhost:{port}"], "retries": 8}
            prompts = [
                Prompt(tuple(Message(**turn) for turn in row["prompt"]), row["facts"]) for row in REQUEST["rows"]
            ]
            responses = [row["response"] for row in REQUEST["rows"]]
            assert mixture([rule]).scores(prompts, responses) == ANSWER["rewards"]
        finally:
            process.terminate()
