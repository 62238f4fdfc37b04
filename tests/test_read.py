"""From records to rows: one layout for a source, a reading for every row, simpler kinds, and a digest of all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from data.findings import MISSING_COLUMN, MIXED_LAYOUT, THUMBS_DOWN, WRONG_TYPE, BadRow, Findings, Kind
from data.read import check, convert, fingerprint, scan
from data.schema import Conversation, Message, Preference, Prompt, Rated, Text
from pipeline.config import DataSource
from pipeline.errors import DataError
from pipeline.fingerprint import file_sha256

ROWS: list[dict[str, Any]] = [
    {"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": "No."} for number in range(40)
]
BAD = {"prompt": "a", "chosen": None, "rejected": "b"}
DIALOGUES: list[dict[str, Any]] = [
    {
        name: [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": text}]
        for name, text in (("chosen", "Hello."), ("rejected", "What?"))
    }
]
RATED: list[dict[str, Any]] = [{"prompt": "a", "completion": "b", "label": 1}]
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


@pytest.mark.parametrize(
    ("first", "rows", "kind", "words"),
    [
        ({"error": "timeout"}, ROWS, MISSING_COLUMN, "no column `chosen` among error"),
        ({"prompt": "a", "chosen": "b"}, ROWS, MISSING_COLUMN, "no column `rejected`"),
        ({"chosen": None, "rejected": None}, DIALOGUES, WRONG_TYPE, "chosen: null (expected a list of messages)"),
        ({"chosen": "a", "rejected": "b"}, DIALOGUES, MIXED_LAYOUT, "chosen: 'a' (text; a list in other rows)"),
        ({"prompt": "a", "response": "b"}, [{"prompt": "c"}], MIXED_LAYOUT, "no format fits it; the rows after it"),
        ({"prompt": "a", "completion": "b", "label": None}, RATED, WRONG_TYPE, "label: null"),
    ],
)
def test_a_bad_first_row_is_a_reading_with_a_problem_and_does_not_decide(
    tmp_path: Path, first: dict[str, Any], rows: list[dict[str, Any]], kind: Kind, words: str
) -> None:
    path = tmp_path / "a.jsonl"
    for count in (1, 15):
        found = list(scan(source(path, [first] * count + rows), Findings()))
        assert [reading.number for reading in found if reading.problem] == list(range(1, count + 1))
        assert all(reading.row for reading in found[count:])
        for number, reading in enumerate(found[:count], start=1):
            assert reading.problem is not None
            assert (reading.problem.kind, reading.problem.where) == (kind, f"{path}:{number}")
            assert words in reading.problem.what
            assert reading.record == first


def test_unreadable_lines_before_and_among_bad_first_rows_keep_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good, bad = json.dumps(ROWS[0]), json.dumps({"error": "timeout"})
    path.write_text("\n".join(["5"] * 20 + [bad, "{", bad, good, "[]", good]) + "\n")
    found = list(scan(DataSource(source=str(path)), Findings()))
    assert [reading.origin for reading in found] == [f"{path}:{number}" for number in range(1, 27)]
    assert [reading.number for reading in found if reading.row] == [24, 26]
    assert [reading.layout for reading in found] == [""] * 20 + ["explicit"] * 6


def test_a_source_whose_first_records_have_no_layout_is_refused_at_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(DataError, match="no format has the columns 'error'") as caught:
        list(scan(source(path, [{"error": "timeout"}, *[{"fault": 1}] * 15, *ROWS]), Findings()))
    assert caught.value.where == f"{path}:1"
    assert not isinstance(caught.value, BadRow)


def test_a_first_row_that_leaves_a_choice_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="several formats"):
        list(scan(source(tmp_path / "a.jsonl", [{"text": "a", "prompt": "b"}, *ROWS]), Findings()))


def test_rows_are_read_no_further_than_the_one_that_decides(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,chosen,rejected\na,b,c\nd,"e,f\ng,h,i\n')
    found = scan(DataSource(source=str(path)), Findings())
    assert next(found).origin == f"{path}:2"
    with pytest.raises(DataError, match="not closed"):
        next(found)


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        ({"prompt": "a", "completion": "b"}, "`chosen`, `completion`, `rejected`"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1}, "`margin`"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "d", "text": "e"}, "`system`, `text`"),
    ],
)
def test_files_of_several_layouts_are_refused_before_a_row_is_read(
    tmp_path: Path, other: dict[str, Any], differing: str
) -> None:
    source(tmp_path / "a.jsonl", ROWS)
    source(tmp_path / "b.jsonl", [{"error": "timeout"}, *ROWS])
    source(tmp_path / "c.jsonl", [{"error": "timeout"}, other])
    with pytest.raises(DataError, match=f"{differing} only in one of them") as caught:
        next(scan(DataSource(source=f"{tmp_path}/*.jsonl"), Findings()))
    assert caught.value.where == f"{tmp_path}/c.jsonl:2"
    assert f"{tmp_path}/a.jsonl:1" in caught.value.what


def test_files_may_differ_in_columns_that_no_format_reads(tmp_path: Path) -> None:
    source(tmp_path / "a.jsonl", ROWS)
    source(tmp_path / "b.jsonl", [{"error": "timeout"}, *({**row, "id": 1, "annotator": "Bo"} for row in ROWS)])
    found = list(scan(DataSource(source=f"{tmp_path}/*.jsonl"), Findings()))
    assert sum(reading.row is not None for reading in found) == 80
    assert [reading.number for reading in found if reading.problem] == [41]


def test_files_agree_in_the_columns_that_are_renamed(tmp_path: Path) -> None:
    renamed = [{"q": row["prompt"], "chosen": "Yes.", "rejected": "No."} for row in ROWS]
    source(tmp_path / "a.jsonl", renamed)
    source(tmp_path / "b.jsonl", ROWS)
    with pytest.raises(DataError, match="no column 'q', which `columns` calls `prompt`") as caught:
        next(scan(DataSource(source=f"{tmp_path}/*.jsonl", columns={"prompt": "q"}), Findings()))
    assert caught.value.where == f"{tmp_path}/b.jsonl:1"
    source(tmp_path / "b.jsonl", renamed)
    assert all(
        reading.row for reading in scan(DataSource(source=f"{tmp_path}/*.jsonl", columns={"prompt": "q"}), Findings())
    )


def test_bad_answers_are_never_imitated_however_the_label_is_written(tmp_path: Path) -> None:
    for good, bad in ((1, 0), (1.0, 0.0), ("1", "0"), (True, False)):
        rows = [{"prompt": "a", "completion": "b", "label": label} for label in (None, bad, good, "bad")]
        found = list(scan(source(tmp_path / "a.jsonl", rows), Findings()))
        assert [reading.row and reading.row.good for reading in found] == [None, False, True, None]  # type: ignore[union-attr]
        assert [reading.problem and reading.problem.kind for reading in found] == [WRONG_TYPE, None, None, WRONG_TYPE]


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


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ({"prompt": "A?", "completion": "B."}, {"prompt": "A?", "completion": "No.", "label": False}),
        ({"prompt": "A?", "responses": ["b", "w"]}, {"prompt": "A?", "responses": ["w", "b"], "scores": [1, 5]}),
        (
            {"prompt": "A?", "chosen": "b", "rejected": "w"},
            {"prompt": "A?", "chosen": "w", "rejected": "b", "score_chosen": 1, "score_rejected": 5},
        ),
    ],
)
def test_columns_that_mean_another_layout_are_not_passed_over_in_later_rows(
    tmp_path: Path, first: dict[str, Any], later: dict[str, Any]
) -> None:
    missing = {**later, **dict.fromkeys(later.keys() - first.keys())}
    asked = source(tmp_path / "a.jsonl", [first, later, missing])
    good, other, empty = scan(asked, Findings())
    assert good.row
    assert empty.row or empty.problem  # nothing is said by a column without a value
    assert other.problem is not None
    assert other.problem.kind is MIXED_LAYOUT
    named = asked.model_copy(update={"format": good.layout})
    assert list(scan(named, Findings()))[1].row is not None


def test_a_dialogue_that_lost_its_first_line_breaks_is_still_one(tmp_path: Path) -> None:
    texts = [
        {"chosen": f"Human: Where?\n\nAssistant: {answer}", "rejected": "\n\nHuman: Where?\n\nAssistant: No."}
        for answer in "ab"
    ]
    for reading in scan(source(tmp_path / "a.jsonl", texts), Findings()):
        assert reading.layout == "hh"
        assert isinstance(reading.row, Preference)
        assert reading.row.prompt == (Message("user", "Where?"),)
    plain = source(tmp_path / "b.jsonl", [{"prompt": "Human: an essay", "completion": "Us."}])
    (reading,) = scan(plain, Findings())
    assert isinstance(reading.row, Conversation)
    assert reading.row.messages[0] == Message("user", "Human: an essay")
