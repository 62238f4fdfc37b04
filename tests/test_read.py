"""From records to rows: one layout for a source, a reading for every row, simpler kinds, and a digest of all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from data.findings import THUMBS_DOWN, BadRow, Findings
from data.read import check, convert, fingerprint, scan
from data.schema import Conversation, Message, Preference, Prompt, Rated, Text
from pipeline.config import DataSource
from pipeline.errors import DataError
from pipeline.fingerprint import file_sha256

ROWS: list[dict[str, Any]] = [
    {"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": "No."} for number in range(40)
]
BAD = {"prompt": "a", "chosen": None, "rejected": "b"}
PROMPT = (Message("user", "Where is Ann?"),)


def source(path: Path, rows: list[dict[str, Any]]) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(source=str(path))


def test_every_row_gives_a_reading_with_its_place_and_its_row_or_problem(tmp_path: Path) -> None:
    found = list(scan(source(tmp_path / "a.jsonl", [*ROWS[:2], BAD, *ROWS[2:]]), Findings()))
    assert [reading.number for reading in found] == list(range(1, 42))
    assert [reading.origin for reading in found] == [f"{tmp_path}/a.jsonl:{number}" for number in range(1, 42)]
    assert [reading.number for reading in found if reading.problem] == [3]
    assert all((reading.row is None) != (reading.problem is None) for reading in found)
    assert all(reading.record is not None and reading.layout == "explicit" for reading in found)


def test_a_line_that_is_no_record_is_a_reading_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{broken\n" + json.dumps(ROWS[1]) + "\n")
    good, broken, after = scan(DataSource(source=str(path)), Findings())
    assert broken.problem is not None
    assert (broken.origin, broken.record, broken.row) == (f"{path}:2", None, None)
    assert good.row
    assert after.row


def test_no_more_rows_are_read_than_asked_for(tmp_path: Path) -> None:
    assert len(list(scan(source(tmp_path / "a.jsonl", ROWS).model_copy(update={"rows": 5}), Findings()))) == 5


def test_only_the_first_rows_are_checked(tmp_path: Path) -> None:
    check(source(tmp_path / "late.jsonl", [*ROWS, BAD]), ("preference",))
    early = source(tmp_path / "early.jsonl", [ROWS[0], BAD])
    with pytest.raises(DataError, match=r"early\.jsonl:2: chosen: null"):
        check(early, ("preference",))
    check(early.model_copy(update={"on_bad_row": "skip"}), ("preference",))


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        ({"text": "a"}, ("conversation",)),
        ({"prompt": "a"}, ("text", "conversation")),
        ({"prompt": "a", "completion": "b"}, ("preference",)),
        ({"prompt": "a", "completion": "b", "label": True}, ("preference",)),
    ],
)
def test_rows_that_cannot_serve_say_what_they_are_and_what_is_needed(
    tmp_path: Path, row: dict[str, Any], kinds: tuple[str, ...]
) -> None:
    with pytest.raises(DataError, match=f"needed: {' or '.join(kinds)}") as raised:
        check(source(tmp_path / "a.jsonl", [row]), kinds)
    assert raised.value.where == f"{tmp_path}/a.jsonl:1"
    assert "can be read as" in raised.value.hint


def test_hh_dialogues_become_text_in_their_own_form() -> None:
    spoken = (*PROMPT, Message("assistant", "In Rome."))
    assert convert(Conversation(spoken), "text", "hh") == Text("\n\nHuman: Where is Ann?\n\nAssistant: In Rome.")
    assert convert(Conversation(spoken), "text") == Text("user: Where is Ann?\n\nassistant: In Rome.")


def test_a_worked_answer_read_as_a_prompt_keeps_the_result_for_the_judge() -> None:
    worked = Conversation((*PROMPT, Message("assistant", "9,000 + 18 is 9,018.\n#### 9,018")))
    assert convert(worked, "prompt") == Prompt(PROMPT, {"answer": "9018"})
    plain = Conversation((*PROMPT, Message("assistant", "In Rome.")))
    assert convert(plain, "prompt") == Prompt(PROMPT, {"answer": "In Rome."})


def test_a_bad_response_is_a_prompt_but_nothing_to_imitate() -> None:
    good, bad = (Rated(PROMPT, "In Rome.", good, "f:1") for good in (True, False))
    spoken = (*PROMPT, Message("assistant", "In Rome."))
    assert convert(good, "conversation") == Conversation(spoken, "f:1")
    assert convert(good, "prompt") == Prompt(PROMPT, {"answer": "In Rome."}, "f:1")
    assert convert(bad, "prompt") == Prompt(PROMPT, {}, "f:1")
    for kind in ("conversation", "text"):
        with pytest.raises(BadRow) as raised:
            convert(bad, kind)  # type: ignore[arg-type]
        assert (raised.value.kind, raised.value.where) == (THUMBS_DOWN, "f:1")


def test_a_preference_keeps_its_best_response() -> None:
    row = Preference(PROMPT, ("In Rome.", "Why?"), origin="f:1")
    assert convert(row, "preference") is row
    assert convert(row, "conversation") == Conversation((*PROMPT, Message("assistant", "In Rome.")), "f:1")


def test_a_file_s_fingerprint_is_that_of_its_bytes_and_of_what_it_is_read_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data import adapters

    plain = source(tmp_path / "a.jsonl", [{"text": "Words."}])
    other = source(tmp_path / "b.jsonl", ROWS)
    known = {"other": other}
    assert fingerprint(plain, known) == file_sha256(tmp_path / "a.jsonl")
    cleaned = plain.model_copy(update={"prepare": {"decontaminate": ["other"]}})
    cleaned = DataSource.model_validate(cleaned.model_dump(warnings=False))
    before = fingerprint(cleaned, known)
    assert before != fingerprint(plain, known)
    fewer = {"other": other.model_copy(update={"rows": 3})}
    assert fingerprint(cleaned, fewer) != before

    code = tmp_path / "my_rows.py"
    code.write_text("def read(row):\n    return row\n")
    monkeypatch.syspath_prepend(tmp_path)
    adapters.allow("my_rows:read")
    adapted = plain.model_copy(update={"format": "my_rows:read"})
    first = fingerprint(adapted, known)
    code.write_text("def read(row):\n    return None\n")
    assert fingerprint(adapted, known) != first != fingerprint(plain, known)


def test_checking_and_fingerprinting_import_no_heavy_library(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from data.read import check, fingerprint\n"
        "from pipeline.config import DataSource\n"
        "for name in sys.argv[1:]:\n"
        "    it = DataSource(source=name)\n"
        "    fingerprint(it, {}), check(it, ('preference',))\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))\n"
    )
    names = [source(tmp_path / "a.jsonl", ROWS).name, "world:preferences", "hub:a/b@main"]
    command = [sys.executable, "-c", script, *names]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
