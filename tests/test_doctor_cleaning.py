"""What `write_cleaned` leaves out, and that nothing is left to leave out after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from test_doctor import examined, on_side, pair, pairs, write

from data.doctor import Cleaned, Diagnosis, write_cleaned
from data.findings import (
    CONTRADICTION,
    CYCLE,
    DUPLICATE_ROW,
    EMPTY_RESPONSE,
    EQUAL_RESPONSES,
    LEAK_EXACT,
    LEAK_NORMALISED,
    WRONG_TYPE,
    Findings,
)
from data.read import scan
from data.schema import Message, Preference
from pipeline.config import DataSource
from pipeline.errors import DataError, StorageError

SHARE = 0.3
EVALUATED = on_side(False, SHARE, (f"question {n} of the suite" for n in range(99)))


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """One row or more of every kind that is left out, among sound ones."""
    spellings = ["What is it?", "what is it", "What is it!", "WHAT IS IT...", "what, is it"]
    leaking = [on_side(False, SHARE, spellings), on_side(True, SHARE, spellings)]
    rows = [
        *pairs(6),
        pair("bad", None, "b"),
        pair("equal", "b", "b"),
        pair("empty", "b", " "),
        {**pairs(1)[0], "id": "again"},
        pair("both", "A", "B"),
        pair("both", "B", "A"),
        *[pair("round", *each) for each in ("AB", "BC", "CA")],
        *[pair(prompt, "a", "b") for prompt in leaking],
        pair(EVALUATED, "a", "b"),
    ]
    path = write(tmp_path / "faulty.jsonl", rows)
    path.write_bytes(path.read_bytes() + b"{broken\n")
    return path


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    return write(tmp_path / "suite.jsonl", [{"prompt": EVALUATED.replace(" ", "  ")}])


def cleaned(path: Path, diagnosis: Diagnosis, destination: Path) -> Cleaned:
    readings = scan(DataSource(source=str(path)), Findings())
    return write_cleaned(readings, diagnosis.drops, destination)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_cleaned_file_has_none_of_the_kinds_that_were_left_out(faulty: Path, suite: Path, tmp_path: Path) -> None:
    before = examined(faulty, suite, held_out=SHARE)
    kinds = (WRONG_TYPE, EQUAL_RESPONSES, EMPTY_RESPONSE, DUPLICATE_ROW, CONTRADICTION, CYCLE)
    leaks = (LEAK_EXACT, LEAK_NORMALISED)
    assert all(before.findings[kind].count for kind in (*kinds, *leaks))
    written = cleaned(faulty, before, tmp_path / "clean.jsonl")
    after = examined(written.path, suite, held_out=SHARE)
    assert not after.findings.counts()
    assert not after.drops
    assert after.rows == after.usable == written.kept
    assert written.kept + written.dropped == before.rows


def test_every_row_that_is_left_out_is_listed_with_its_place_and_reason(faulty: Path, tmp_path: Path) -> None:
    diagnosis = examined(faulty)
    written = cleaned(faulty, diagnosis, tmp_path / "clean.jsonl")
    listed = {entry["where"]: entry for entry in lines(written.dropped_path)}
    assert len(listed) == written.dropped
    assert listed[f"{faulty}:7"] == {
        "where": f"{faulty}:7",
        "reason": WRONG_TYPE.name,
        "what": "chosen: null (expected text or messages)",
    }
    assert listed[f"{faulty}:10"] == {"where": f"{faulty}:10", "reason": DUPLICATE_ROW.name, "what": f"{faulty}:1"}
    assert [listed[f"{faulty}:{line}"]["reason"] for line in (11, 12)] == [CONTRADICTION.name] * 2
    assert [listed[f"{faulty}:{line}"]["reason"] for line in (13, 14, 15)] == [CYCLE.name] * 3
    assert f"{faulty}:19" in listed


def test_rows_that_stay_keep_their_columns_and_their_order(tmp_path: Path) -> None:
    rows = [pair(f"q {n} \u00e9\u4f60", "a", f"b{n}", id=n, nested={"x": [1, None]}) for n in range(5)]
    path = write(tmp_path / "a.jsonl", rows)
    assert lines(cleaned(path, examined(path), tmp_path / "b.jsonl").path) == rows


def test_half_a_character_in_an_unused_column_stays_an_escape(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"prompt": "q", "chosen": "a", "rejected": "b", "note": "\ud800"}' + "\n")
    diagnosis = examined(path)
    written = cleaned(path, diagnosis, tmp_path / "b.jsonl")
    assert written.kept == diagnosis.usable
    assert examined(written.path).usable == diagnosis.usable


@pytest.mark.parametrize("name", ["clean.jsonl", "clean.jsonl.dropped.jsonl"])
@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")], ids=["file", "dangling link"])
def test_nothing_that_exists_is_overwritten(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(2))
    make(tmp_path / name)
    with pytest.raises(StorageError, match="exists already"):
        cleaned(path, examined(path), tmp_path / "clean.jsonl")
    assert {each.name for each in tmp_path.iterdir()} == {"a.jsonl", name}


def test_an_error_halfway_leaves_no_file_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(2))
    readings = list(scan(DataSource(source=str(path)), Findings()))

    def failing() -> Any:
        yield from readings
        raise DataError("cut short", where="a.jsonl:3")

    with pytest.raises(DataError, match="cut short"):
        write_cleaned(failing(), {}, tmp_path / "clean.jsonl")
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(2))
    with pytest.raises(StorageError, match="cannot be written: No such file or directory"):
        cleaned(path, examined(path), tmp_path / "missing" / "clean.jsonl")


def test_generated_rows_need_no_cleaning(tmp_path: Path) -> None:
    readings = scan(DataSource(source="world:prompts", rows=2), Findings())
    with pytest.raises(DataError, match="generated rows need no cleaning"):
        write_cleaned(readings, {}, tmp_path / "clean.jsonl")


def test_numbers_that_are_missing_in_a_column_that_nothing_reads_are_written_as_null(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"Q{each}", "chosen": "a", "rejected": "b", "votes": float("nan")} for each in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = DataSource(source=str(tmp_path / "a.parquet"))
    cleaned = write_cleaned(scan(source, Findings()), {}, tmp_path / "out.jsonl")
    assert (cleaned.kept, cleaned.dropped) == (3, 0)
    assert [json.loads(line)["votes"] for line in cleaned.path.read_text().splitlines()] == [None] * 3


def test_columns_that_json_cannot_hold_are_left_out_and_never_the_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    images: list[Any] = [b"\x89PNG", None, b"\xff"]
    rows = [
        pair(f"Q{n}", "a", "b", image=image, shots=[{"bytes": b"\0", "at": n}], price=Decimal(f"{n}.10"))
        for n, image in enumerate(images)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = DataSource(source=str(tmp_path / "a.parquet"))
    cleaned = write_cleaned(scan(source, Findings()), {}, tmp_path / "out.jsonl")
    assert (cleaned.kept, cleaned.dropped) == (3, 0)
    assert cleaned.columns_left_out == ("image", "shots")
    kept = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    written = lines(cleaned.path)
    assert [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in written] == kept
    assert [row["price"] for row in written] == [0.1, 1.1, 2.1]
    assert not any("shots" in row or row.get("image") for row in written)


@pytest.mark.parametrize("digits", ["0.1", "12.50", "3", "123456789012345678901.5", "0.12345678901234567890"])
def test_a_decimal_is_a_number_where_that_loses_no_digit_and_text_elsewhere(digits: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([pair("Q", "a", "b", price=Decimal(digits))])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = DataSource(source=str(tmp_path / "a.parquet"))
    (row,) = lines(write_cleaned(scan(source, Findings()), {}, tmp_path / "out.jsonl").path)
    assert Decimal(str(row["price"])) == Decimal(digits)
    assert isinstance(row["price"], float) == (len(digits) < 10)


@pytest.mark.parametrize(
    "columns", [{"prompt": "question"}, {"chosen": "rejected", "rejected": "chosen"}], ids=["renamed", "swapped"]
)
def test_the_same_settings_read_the_clean_file(columns: dict[str, str], tmp_path: Path) -> None:
    names = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", **columns}
    rows = [{names[name]: text for name, text in each.items()} for each in [*pairs(3), pair("equal", "b", "b")]]
    source = DataSource(source=str(write(tmp_path / "a.jsonl", rows)), columns=columns)
    again = source.model_copy(update={"source": str(tmp_path / "b.jsonl")})
    write_cleaned([each for each in scan(source, Findings()) if each.row], {}, tmp_path / "b.jsonl", source.columns)
    assert lines(tmp_path / "b.jsonl") == rows[:3]
    assert [each.row.prompt for each in scan(again, Findings()) if isinstance(each.row, Preference)] == [
        (Message("user", row["prompt"]),) for row in pairs(3)
    ]
