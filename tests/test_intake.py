"""What a stage takes in: every usable row once and on its side, every other one counted, all malformed ones named."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.intake import Intake
from data.read import kind_of
from data.schema import Conversation, Message, Preference, Prompt, Row, Text
from data.split import is_held_out
from pipeline.config import DataSource
from pipeline.errors import DataError

DATA = Path(os.environ.get("BATON_DATA", Path(__file__).parents[1] / "../shared/data"))
ROWS = [{"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": "No."} for number in range(40)]
PREFERENCE = ("preference",)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def taken(intake: Intake) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows."""
    placed = list(intake)
    return [each.row for each in placed if not each.held_out], [each.row for each in placed if each.held_out]


def test_every_row_arrives_once_on_the_side_of_its_prompt(tmp_path: Path) -> None:
    intake = Intake(DataSource(source=write(tmp_path / "a.jsonl", ROWS), held_out=0.5), PREFERENCE)
    train, held_out = taken(intake)
    assert train
    assert held_out
    assert not any(is_held_out(row, 0.5) for row in train)
    assert all(is_held_out(row, 0.5) for row in held_out)
    origins = Counter(row.origin for row in (*train, *held_out))
    assert origins == Counter(f"{tmp_path}/a.jsonl:{number + 1}" for number in range(40))
    assert (intake.format, intake.dropped) == ("explicit", {})


def test_a_prompt_falls_on_one_side_whatever_the_kind_it_is_read_as(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", ROWS)
    sides = {
        kind: {row.origin for row in taken(Intake(DataSource(source=name, held_out=0.3), (kind,)))[1]}
        for kind in ("preference", "conversation", "prompt", "text")
    }
    assert len(set(map(frozenset, sides.values()))) == 1
    assert sides["text"]


def test_rows_that_nothing_can_be_learnt_from_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        *ROWS,
        {"prompt": "a", "chosen": "", "rejected": "b"},
    ]
    intake = Intake(DataSource(source=write(tmp_path / "a.jsonl", rows)), PREFERENCE)
    assert sum(map(len, taken(intake))) == len(ROWS)
    assert intake.dropped == {"empty response": 1, "equal responses": 1}
    assert intake.record["findings"]["equal responses"]["examples"][0]["where"] == f"{tmp_path}/a.jsonl:1"


def test_no_usable_row_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3)
    with pytest.raises(DataError, match="no usable row; 3 x equal responses"):
        taken(Intake(DataSource(source=name), PREFERENCE))


def test_rows_that_all_fail_to_convert_are_no_usable_row(tmp_path: Path) -> None:
    rated = [{"prompt": f"Question {number}?", "completion": "No.", "label": False} for number in range(3)]
    with pytest.raises(DataError, match="no usable row; 3 x thumbs down"):
        taken(Intake(DataSource(source=write(tmp_path / "a.jsonl", rated)), ("conversation",)))


BAD = [{"prompt": "a", "chosen": None, "rejected": "b"}, {"prompt": "a", "chosen": 5, "rejected": "b"}]


def test_malformed_rows_are_read_to_the_end_and_named_in_one_error(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [*ROWS[:3], BAD[0], *ROWS[3:6], BAD[1], *ROWS[6:]])
    with pytest.raises(DataError) as raised:
        taken(Intake(DataSource(source=name), PREFERENCE))
    first, second, count, remedy = str(raised.value).splitlines()
    assert first == f"{name}:4: chosen: null (expected text or messages)"
    assert second == f"  {name}:8: chosen: 5 (expected text or messages)"
    assert count == "  2 of 42 rows rejected"
    assert "`on_bad_row: skip`" in remedy


def test_many_malformed_rows_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", ROWS[:1] + BAD * 20)
    with pytest.raises(DataError) as raised:
        taken(Intake(DataSource(source=name), PREFERENCE))
    assert str(raised.value).count(f"{name}:") == 10
    assert "40 of 41 rows rejected" in str(raised.value)


def test_skipped_rows_are_counted_by_reason(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [*ROWS, *BAD])
    intake = Intake(DataSource(source=name, on_bad_row="skip"), PREFERENCE)
    assert sum(map(len, taken(intake))) == len(ROWS)
    assert intake.dropped == {"wrong type": 2}


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", ROWS)
    rows = iter(Intake(DataSource(source=name), PREFERENCE))
    next(rows)
    write(tmp_path / "a.jsonl", [*ROWS[:-1], {"prompt": "Another?", "chosen": "Yes.", "rejected": "No."}])
    with pytest.raises(DataError, match="changed while it was read"):
        list(rows)


PROMPT = (Message("user", "Question 0?"),)
SPOKEN = (*PROMPT, Message("assistant", "Yes."))


@pytest.mark.parametrize(
    "row",
    [
        Preference(PROMPT, ("Yes.", "No.")),
        Conversation(SPOKEN),
        Prompt(PROMPT, {"answer": "Yes."}),
        Text("user: Question 0?\n\nassistant: Yes."),
    ],
)
def test_preferences_are_read_as_every_simpler_kind(tmp_path: Path, row: Row) -> None:
    name = write(tmp_path / "a.jsonl", ROWS)
    train, _ = taken(Intake(DataSource(source=name, held_out=0.0), (kind_of(row),)))
    assert len(train) == len(ROWS)
    assert vars(train[0]) | {"origin": ""} == vars(row)


def test_thumbs_up_are_imitated_and_thumbs_down_are_counted(tmp_path: Path) -> None:
    rated = [{"prompt": f"Question {number}?", "completion": "Yes.", "label": number % 4 > 0} for number in range(20)]
    name = write(tmp_path / "a.jsonl", rated)
    conversations = Intake(DataSource(source=name), ("conversation",))
    assert sum(map(len, taken(conversations))) == 15
    assert conversations.dropped == {"thumbs down": 5}
    prompts = Intake(DataSource(source=name), ("prompt",))
    assert sum(map(len, taken(prompts))) == 20
    with pytest.raises(DataError, match="the rows are of kind `rated`"):
        taken(Intake(DataSource(source=name), PREFERENCE))


def test_preferences_without_a_prompt_are_compared_but_not_imitated(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [*ROWS, {"prompt": "", "chosen": "Yes.", "rejected": "No."}])
    assert sum(map(len, taken(Intake(DataSource(source=name), PREFERENCE)))) == 41
    conversations = Intake(DataSource(source=name), ("conversation",))
    assert sum(map(len, taken(conversations))) == 40
    assert conversations.dropped == {"empty prompt": 1}


def test_the_first_kind_that_the_rows_can_serve_as_wins(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", ROWS)
    kinds = ("prompt", "conversation", "preference")
    train, _ = taken(Intake(DataSource(source=name), kinds))
    assert {kind_of(row) for row in train} == {"prompt"}
    train, _ = taken(Intake(DataSource(source=name), tuple(reversed(kinds))))
    assert {kind_of(row) for row in train} == {"preference"}


def test_several_files_are_one_source_and_are_split_alike(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"part-{number}.jsonl", ROWS[number * 10 : number * 10 + 10])
    whole = taken(Intake(DataSource(source=write(tmp_path / "whole.jsonl", ROWS), held_out=0.3), PREFERENCE))
    parts = taken(Intake(DataSource(source=f"{tmp_path}/part-*.jsonl", held_out=0.3), PREFERENCE))
    for one, several in zip(whole, parts, strict=True):
        assert [row.prompt for row in one] == [row.prompt for row in several]  # type: ignore[union-attr]
    assert parts[0][-1].origin.startswith(f"{tmp_path}/part-3.jsonl:")


def documents(count: int, seed: int = 0) -> list[dict[str, str]]:
    return [{"text": " ".join(f"word{seed + number * 20 + place}" for place in range(20))} for number in range(count)]


def test_text_is_prepared_and_every_step_is_counted(tmp_path: Path) -> None:
    texts = documents(30)
    rows = [*texts, texts[0], {"text": "cafe\u0301 \u200b" + texts[1]["text"]}, {"text": "short"}]
    source = DataSource(source=write(tmp_path / "a.jsonl", rows), prepare={"min_words": 5})
    intake = Intake(source, ("text",))
    train, held_out = taken(intake)
    assert len(train) + len(held_out) == 31
    assert "café " + texts[1]["text"] in {row.text for row in (*train, *held_out) if isinstance(row, Text)}
    assert intake.prepared["documents"] == 33
    assert intake.prepared["kept"] == 31
    assert sum(intake.dropped.values()) == 2


def test_documents_that_share_words_with_held_out_rows_are_left_out(tmp_path: Path) -> None:
    questions = [{"prompt": " ".join(f"q{number}w{place}" for place in range(15))} for number in range(30)]
    prompts = DataSource(source=write(tmp_path / "prompts.jsonl", questions), held_out=0.3)
    kept, lost = (side[0].prompt[0].content for side in taken(Intake(prompts, ("prompt",))))  # type: ignore[union-attr]
    texts = [*documents(10), {"text": f"Before {kept} after."}, {"text": f"Before {lost} after."}]
    corpus = DataSource(
        source=write(tmp_path / "text.jsonl", texts), prepare={"decontaminate": ["prompts"]}, held_out=0.3
    )
    rows = [row.text for side in taken(Intake(corpus, ("text",), {"prompts": prompts})) for row in side]  # type: ignore[union-attr]
    assert f"Before {kept} after." in rows
    assert f"Before {lost} after." not in rows
    assert len(rows) == 11


def test_preparation_of_other_rows_than_text_is_refused(tmp_path: Path) -> None:
    source = DataSource(source=write(tmp_path / "a.jsonl", ROWS), prepare={})
    with pytest.raises(DataError, match="`prepare` is for text"):
        taken(Intake(source, PREFERENCE))


def test_a_prompt_of_the_evaluation_among_the_training_rows_is_an_error(tmp_path: Path) -> None:
    """Both sides fall by the same hash, so only different shares can let one through."""
    source = DataSource(source=write(tmp_path / "a.jsonl", ROWS), held_out=0.1)
    other = DataSource(source=write(tmp_path / "b.jsonl", [{"prompt": row["prompt"]} for row in ROWS]), held_out=0.9)
    with pytest.raises(DataError, match="prompt on both sides"):
        taken(Intake(source, PREFERENCE, {"other": other}, ["other"]))
    same = other.model_copy(update={"held_out": 0.1})
    assert sum(map(len, taken(Intake(source, PREFERENCE, {"other": same}, ["other"])))) == 40


@pytest.mark.parametrize(
    ("name", "kind", "total", "dropped"),
    [
        ("hh-rlhf/harmless-base-test.jsonl.gz", "preference", 2303, 9),
        ("hh-rlhf/harmless-base-test.jsonl.gz", "prompt", 2303, 9),
        ("gsm8k/train.jsonl", "conversation", 7473, 0),
        ("gsm8k/test.jsonl", "prompt", 1319, 0),
    ],
)
def test_real_files_are_read_whole(name: str, kind: str, total: int, dropped: int) -> None:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {path}: set BATON_DATA to the folder with {name}")
    intake = Intake(DataSource(source=str(path)), (kind,))
    train, held_out = taken(intake)
    assert {kind_of(row) for row in train} == {kind}
    assert len(train) + len(held_out) == total
    assert sum(intake.dropped.values()) == dropped
    prompts = [{row.prompt for row in side} for side in (train, held_out)]  # type: ignore[union-attr]
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize("part", ["corpus", "demonstrations", "preferences", "prompts"])
def test_the_world_is_one_more_source(part: str) -> None:
    kinds = {"corpus": "text", "demonstrations": "conversation", "preferences": "preference", "prompts": "prompt"}
    intake = Intake(DataSource(source=f"world:{part}", rows=50), (kinds[part],))
    train, held_out = taken(intake)
    assert intake.format == "world"
    assert len(train) + len(held_out) == 50
    assert all(row.origin for row in train)
