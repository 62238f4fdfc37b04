"""Parquet files and directories of `datasets`: damage is noticed, and rows that cannot be used are named."""

from __future__ import annotations

import datetime
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data import findings as kinds
from data.findings import BadRow, Findings
from data.sources import Located, fingerprint, records
from pipeline.config import DataSource
from pipeline.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": f"Question {number}?", "messages": [{"role": "user", "content": "é" * number}], "score": number / 4}
    for number in range(40)
]


def write_parquet(path: Path, data: Any = ROWS, **options: Any) -> Path:
    rows = data if isinstance(data, pyarrow.Table) else pyarrow.Table.from_pylist(data)
    settings = {"row_group_size": 7, "write_page_checksum": True, "compression": "none", **options}
    pyarrow.parquet.write_table(rows, path, **settings)
    return path


def write_arrow(path: Path, data: Any = ROWS, **options: Any) -> Path:
    rows = data if isinstance(data, pyarrow.Table) else pyarrow.Table.from_pylist(data)
    path.mkdir()
    half = rows.num_rows // 2
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, [rows.slice(0, half), rows.slice(half)], strict=True):
        with pyarrow.ipc.new_stream(str(path / name), part.schema) as stream:
            stream.write_table(part, max_chunksize=7)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return path


def read(path: Path, **settings: Any) -> list[Located | BadRow]:
    return list(records(DataSource(source=str(path), **settings), Findings()))


def rows(found: list[Located | BadRow]) -> list[Any]:
    return [each.record for each in found if isinstance(each, Located)]


def problems(found: list[Located | BadRow]) -> list[BadRow]:
    return [each for each in found if isinstance(each, BadRow)]


WRITERS = pytest.mark.parametrize(("name", "write"), [("a.parquet", write_parquet), ("a", write_arrow)])


@WRITERS
def test_rows_arrive_as_they_were_written(tmp_path: Path, name: str, write: Any) -> None:
    found = read(write(tmp_path / name))
    assert rows(found) == ROWS
    assert not problems(found)


def test_origins_name_the_file_and_the_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    assert [each.origin for each in read(path) if isinstance(each, Located)] == [
        f"{path}:row {number}" for number in range(1, 41)
    ]
    folder = write_arrow(tmp_path / "a")
    found = [each.origin for each in read(folder) if isinstance(each, Located)]
    assert found[19:21] == [f"{folder}/data-00000-of-00002.arrow:row 20", f"{folder}/data-00001-of-00002.arrow:row 1"]


UNUSABLE = [
    (pyarrow.array(["a", "b" * 10**7, None]), kinds.TOO_LARGE, "10,000,001 characters, limit 1,000,000 (max_chars)"),
    (pyarrow.array([["a"], ["b" * 600_000] * 2, None]), kinds.TOO_LARGE, "1,200,001 characters"),
    (pyarrow.array([0, 2**62, None], pyarrow.timestamp("us")), kinds.WRONG_TYPE, "value: "),
    (
        pyarrow.array([b"a", b"b\xff", None]).view(pyarrow.string()),
        kinds.NOT_UTF8,
        "value: byte 2: not UTF-8 (0xff)",
    ),
]


@WRITERS
@pytest.mark.parametrize(("values", "kind", "words"), UNUSABLE, ids=[f"{each[1].name} {each[2]}" for each in UNUSABLE])
def test_a_row_that_cannot_be_used_is_named_and_costs_only_itself(
    tmp_path: Path, name: str, write: Any, values: Any, kind: kinds.Kind, words: str
) -> None:
    table = pyarrow.table({"value": values, "number": ["1", "2", "3"]})
    found = read(write(tmp_path / name, table))
    assert [(each.kind, each.where.split(":")[-1]) for each in problems(found)] == [
        (kind, "row 2" if name.endswith("parquet") else "row 1")
    ]
    assert words in problems(found)[0].what
    assert [row["number"] for row in rows(found)] == ["1", "3"]
    assert rows(found)[1]["value"] is None


def test_values_of_other_types_are_left_to_the_formats(tmp_path: Path) -> None:
    data = [{"a": b"\xff", "b": datetime.date(2020, 1, 1), "c": [[1, None], []], "d": None, "e": True, "f": 2**53}]
    assert rows(read(write_parquet(tmp_path / "a.parquet", data))) == data


def test_every_cut_of_a_parquet_file_is_refused(tmp_path: Path) -> None:
    intact = write_parquet(tmp_path / "a.parquet").read_bytes()
    path = tmp_path / "cut.parquet"
    for size in [*range(0, len(intact), 101), *range(len(intact) - 12, len(intact))]:
        path.write_bytes(intact[:size])
        with pytest.raises(DataError, match="not an intact Parquet file") as caught:
            read(path)
        assert caught.value.where == str(path)


def test_flipped_bits_of_a_parquet_page_never_change_a_row(tmp_path: Path) -> None:
    intact = write_parquet(tmp_path / "a.parquet").read_bytes()
    path = tmp_path / "flipped.parquet"
    random_ = random.Random(0)
    end_of_pages = len(intact) - int.from_bytes(intact[-8:-4], "little") - 8
    refused = 0
    for _ in range(300):
        flipped = bytearray(intact)
        flipped[random_.randrange(4, end_of_pages)] ^= 1 << random_.randrange(8)
        path.write_bytes(flipped)
        try:
            assert rows(read(path)) == ROWS
        except DataError:
            refused += 1
    assert refused > 200


def test_flipped_bits_of_a_parquet_footer_never_lose_a_row(tmp_path: Path) -> None:
    intact = write_parquet(tmp_path / "a.parquet").read_bytes()
    path = tmp_path / "flipped.parquet"
    random_ = random.Random(0)
    refused = 0
    for _ in range(600):
        flipped = bytearray(intact)
        flipped[-random_.randrange(1, int.from_bytes(intact[-8:-4], "little") + 8)] ^= 1 << random_.randrange(8)
        path.write_bytes(flipped)
        try:
            assert len(read(path)) == len(ROWS)
        except DataError:
            refused += 1
    assert refused > 100


def test_parquet_without_checksums_is_read_and_noted(tmp_path: Path) -> None:
    for checksums, expected in ((True, {}), (False, {"no page checksums": 1})):
        for options in ({}, {"use_dictionary": False}, {"compression": "zstd"}, {"data_page_version": "2.0"}):
            path = write_parquet(tmp_path / "a.parquet", write_page_checksum=checksums, **options)
            notes = Findings()
            assert rows(list(records(DataSource(source=str(path)), notes))) == ROWS
            assert notes.counts() == expected


@pytest.mark.parametrize("data", [pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), pyarrow.table({})])
def test_a_table_without_rows_is_refused(tmp_path: Path, data: pyarrow.Table) -> None:
    with pytest.raises(DataError, match="holds no row"):
        read(write_parquet(tmp_path / "a.parquet", data))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    for path in (write_parquet(tmp_path / "a.parquet", table), write_arrow(tmp_path / "a", table)):
        with pytest.raises(DataError, match="two columns are called 'text'"):
            read(path)


def test_text_named_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b'{"a": 1}\n' * 9)
    with pytest.raises(DataError, match="not an intact Parquet file"):
        read(path)


def test_every_cut_of_an_arrow_file_is_refused(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a") / "data-00001-of-00002.arrow"
    intact = path.read_bytes()
    with pyarrow.ipc.open_stream(path) as stream:
        ends = len(list(stream))
    assert ends > 1
    for size in [*range(0, len(intact), 8), len(intact) - 1]:
        path.write_bytes(intact[:size])
        with pytest.raises(DataError, match="not an intact Arrow file") as caught:
            read(path.parent)
        assert caught.value.where == str(path)


def test_damaged_arrow_files_never_crash_the_reader(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a") / "data-00000-of-00002.arrow"
    intact = path.read_bytes()
    random_ = random.Random(0)
    for _ in range(200):
        damaged = bytearray(intact)
        damaged[random_.randrange(len(damaged))] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        try:
            assert all(isinstance(row, dict) for row in rows(read(path.parent)))
        except DataError as error:
            assert str(tmp_path) in error.where  # noqa: PT017


def test_directories_of_datasets_are_read_without_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    train = datasets.Dataset.from_list(ROWS)
    train.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": train, "test": train.shuffle(seed=1).select(range(5))}).save_to_disk(
        tmp_path / "two"
    )
    assert rows(read(tmp_path / "one")) == ROWS
    assert rows(read(tmp_path / "two")) == ROWS
    assert rows(read(tmp_path / "two", split="test")) == list(train.shuffle(seed=1).select(range(5)))
    whole, part = (DataSource(source=str(tmp_path / "two"), split=split) for split in ("train", "test"))
    assert fingerprint(whole) != fingerprint(part)
    with pytest.raises(DataError, match="no split 'dev'") as caught:
        read(tmp_path / "two", split="dev")
    assert "`train`" not in caught.value.what
    assert "train, test" in caught.value.hint


@pytest.mark.parametrize(
    "state",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"_data_files": 5}',
        '{"_data_files": [5]}',
        '{"_data_files": [{"filename": "../b.arrow"}]}',
        '{"_data_files": [{"filename": "/etc/passwd"}]}',
        '{"_data_files": [{"filename": "absent.arrow"}]}',
        '{"_data_files": []}',
        "[" * 100_000,
    ],
)
def test_a_directory_with_a_broken_description_is_refused(tmp_path: Path, state: str) -> None:
    path = write_arrow(tmp_path / "a")
    shutil.copy(path / "data-00000-of-00002.arrow", tmp_path / "b.arrow")
    (path / "state.json").write_text(state)
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.where.startswith(str(path))
    assert caught.value.hint
