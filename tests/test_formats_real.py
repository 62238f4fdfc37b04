"""Formats on published files: Anthropic's hh-rlhf pairs and GSM8K."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.findings import DIALOGUES_DIFFER, EMPTY_RESPONSE, BadRow, shown
from data.formats import detect, final_answer, hh
from data.read import convert
from data.schema import Conversation, Preference, Prompt
from reward.rules import verdict

DATA = Path(os.environ.get("BATON_DATA", Path(__file__).parents[1] / "../shared/data"))
HH_FILE = DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz"
GSM8K_FILES = [DATA / "gsm8k" / "train.jsonl", DATA / "gsm8k" / "test.jsonl"]
MARKER = "\n\nAssistant:"


def records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        pytest.skip(f"no {path}: set BATON_DATA to the folder with hh-rlhf/ and gsm8k/")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
        yield from (json.loads(line) for line in stream)


def test_real_pairs_split_where_the_last_assistant_turn_begins() -> None:
    reasons: Counter[str] = Counter()
    parsed = 0
    for record in records(HH_FILE):
        prompt, _, chosen = record["chosen"].rpartition(MARKER)
        _, _, rejected = record["rejected"].rpartition(MARKER)
        try:
            row = detect(record, "auto", "f:1").parse(record, "f:1")
        except BadRow as problem:
            reasons[problem.kind.name] += 1
            continue
        parsed += 1
        assert isinstance(row, Preference)
        assert row.responses == (chosen.strip(), rejected.strip())
        assert prompt == record["rejected"].rpartition(MARKER)[0]
        flat = "".join(prompt.replace("\n\nHuman:", "").replace(MARKER, "").split())
        assert "".join("".join(message.content for message in row.prompt).split()) == flat
        assert row.prompt[-1].role == "user"
    assert parsed + reasons.total() == 2312
    assert reasons == {DIALOGUES_DIFFER.name: 5, EMPTY_RESPONSE.name: 4}


def test_real_pairs_that_differ_earlier_are_reported_with_the_first_turn_that_differs() -> None:
    for record in records(HH_FILE):
        ours, theirs = (hh.split(record[name]) or [] for name in ("chosen", "rejected"))
        if ours[:-1] == theirs[:-1]:
            continue
        with pytest.raises(BadRow) as caught:
            detect(record, "hh", "f:1").parse(record, "f:1")
        index = next((i for i in range(min(len(ours), len(theirs)) - 1) if ours[i] != theirs[i]), None)
        if index is None:
            assert caught.value.what.startswith(f"{len(ours)} turns")
        else:
            assert caught.value.what.startswith(f"chosen[{index}]: {ours[index].role} {shown(ours[index].content)}")


def test_gsm8k_is_read_as_conversations_whose_final_answer_is_a_number() -> None:
    count = 0
    for path in GSM8K_FILES:
        for record in records(path):
            row = detect(record, "auto", "f:1").parse(record, "f:1")
            assert isinstance(row, Conversation)
            assert [message.content for message in row.messages] == [record["question"], record["answer"]]
            answer = final_answer(row.messages[-1].content)
            assert answer == record["answer"].split("####")[-1].strip().replace(",", "")
            assert float(answer) == int(answer)
            count += 1
    assert count == 7473 + 1319


def test_every_worked_answer_of_gsm8k_is_judged_right_and_its_neighbour_wrong() -> None:
    for path in GSM8K_FILES:
        for record in records(path):
            row = convert(detect(record, "auto", "f:1").parse(record, "f:1"), "prompt")
            assert isinstance(row, Prompt)
            answer = int(row.facts["answer"])
            for right in (record["answer"], f"That makes ${answer:,}.00."):
                assert verdict("numeric", row.facts, right, row.origin).correct == 1.0
            assert verdict("exact", row.facts, f"{answer}.", row.origin).correct == 1.0
            assert verdict("numeric", row.facts, f"{answer + 1:,}", row.origin).correct == 0.0
