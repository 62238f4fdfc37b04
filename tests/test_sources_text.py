"""Plain text: a file is one document, read whole or refused with the line that is wrong."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from data import findings as kinds
from data.findings import BadRow, Findings, Kind
from data.intake import Intake
from data.read import scan
from data.schema import Text
from data.sources import Located, records
from pipeline.config import DataSource
from pipeline.errors import DataError

CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: bytes(pyarrow.compress(content, "zstd", asbytes=True)),
}


def read(path: Path | str, content: bytes | None = None, **settings: Any) -> list[Located | BadRow]:
    if content is not None:
        Path(path).write_bytes(content)
    return list(records(DataSource(source=str(path), **settings), Findings()))


def document(path: Path, content: bytes, **settings: Any) -> str:
    (found,) = read(path, content, **settings)
    assert isinstance(found, Located)
    assert found.origin == f"{path}:1"
    return str(found.record["text"])


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(
    "text", ["One.\n\nTwo.\n", "no end of line", "\r\n one\r\ntwo\r", "é𝄞\u2028\x85", '{"text": 1}']
)
def test_a_file_is_one_document_character_by_character(tmp_path: Path, text: str, coding: str) -> None:
    assert document(tmp_path / f"a.txt{coding}", CODINGS[coding](text.encode())) == text


def test_a_byte_order_mark_is_noted_and_no_part_of_the_document(tmp_path: Path) -> None:
    path, notes = tmp_path / "a.txt", Findings()
    path.write_bytes(b"\xef\xbb\xbfOne.")
    (found,) = records(DataSource(source=str(path)), notes)
    assert isinstance(found, Located)
    assert found.record == {"text": "One."}
    assert notes.counts() == {"byte order mark": 1}


BAD: dict[str, tuple[bytes, Kind, int, str]] = {
    "byte": (b"One\ntwo\nth\xffree\n", kinds.NOT_UTF8, 3, "byte 3: not UTF-8 (0xff)"),
    "encoded surrogate": (b"\xed\xa0\x80", kinds.NOT_UTF8, 1, "byte 1: not UTF-8 (0xed)"),
    "character cut by a line end": (b"One \xc3\ntwo", kinds.NOT_UTF8, 1, "byte 5: not UTF-8 (0xc3)"),
    "character cut by the end": (b"One\ntw\xf0\x9d", kinds.CUT_SHORT, 2, "the file ends inside a character"),
    "NUL": ("One\né\0wo\nthree".encode(), kinds.NUL, 2, r"'é\x00wo' (NUL at character 2)"),
    "NUL at the end": (b"One\n\n\0", kinds.NUL, 3, r"'\x00' (NUL at character 1)"),
    "two NULs": (b"One\n\0\n\0", kinds.NUL, 2, r"'\x00' (NUL at character 1)"),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("name", BAD)
def test_a_fault_is_named_with_its_line(tmp_path: Path, name: str, coding: str) -> None:
    content, kind, line, what = BAD[name]
    path = tmp_path / f"a.txt{coding}"
    (found,) = read(path, CODINGS[coding](content))
    assert isinstance(found, BadRow)
    assert (found.kind, found.where, found.what) == (kind, f"{path}:{line}", what)


@pytest.mark.parametrize(
    "content", ["a\nb\n".encode("utf-16"), "a\nb\n".encode("utf-16-le"), gzip.compress(b"a", mtime=0)]
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"looks like UTF-16|holds gzip, not text"):
        read(tmp_path / "a.txt", content)


@pytest.mark.parametrize("letter", ["x", "é", "𝄞"])
def test_a_document_may_have_as_many_characters_as_the_limit_says(tmp_path: Path, letter: str) -> None:
    path = tmp_path / "a.txt"
    lines = [letter * 9] * 10
    text = "\n".join(lines) + "\n"
    assert document(path, text.encode(), max_chars=100) == text
    (found,) = read(path, (text + letter).encode(), max_chars=100)
    assert isinstance(found, BadRow)
    assert (found.kind, found.where) == (kinds.TOO_LARGE, f"{path}:11")
    assert found.what == "101 characters, limit 100 (max_chars)"
    (found,) = read(path, text.encode(), max_chars=25)
    assert isinstance(found, BadRow)
    assert found.where == f"{path}:3"


@pytest.mark.parametrize("coding", ["", ".gz"])
def test_a_document_without_end_is_counted_and_does_not_fill_the_memory(tmp_path: Path, coding: str) -> None:
    path = tmp_path / f"a.txt{coding}"
    content = "xé\n".encode() * 5_000_000
    path.write_bytes(gzip.compress(content, 1) if coding else content)
    tracemalloc.start()
    (found,) = read(path, max_chars=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(found, BadRow)
    assert found.what == "15,000,000 characters, limit 1,000 (max_chars)"
    assert found.where == f"{path}:334"
    assert peak < 2_000_000


def test_every_cut_of_a_compressed_document_is_refused(tmp_path: Path) -> None:
    for coding in (".gz", ".zst"):
        intact = CODINGS[coding](b"One.\nTwo.\n" * 20)
        for size in range(1, len(intact)):
            with pytest.raises(DataError, match="not intact"):
                read(tmp_path / f"a.txt{coding}", intact[:size])


def test_a_glob_of_files_is_a_corpus_of_one_document_each(tmp_path: Path) -> None:
    for name, content in {"b.txt": b"Two.", "a.txt.gz": gzip.compress(b"One."), "c.txt": b" \n", "d.txt": b""}.items():
        (tmp_path / name).write_bytes(content)
    readings = list(scan(DataSource(source=f"{tmp_path}/*.txt*"), Findings()))
    assert [each.row for each in readings if each.row] == [
        Text("One.", f"{tmp_path}/a.txt.gz:1"),
        Text("Two.", f"{tmp_path}/b.txt:1"),
    ]
    empty = [(each.problem.kind, each.problem.where) for each in readings if each.problem]
    assert empty == [(kinds.EMPTY_TEXT, f"{tmp_path}/c.txt:1"), (kinds.EMPTY_TEXT, f"{tmp_path}/d.txt:1")]


def test_a_document_is_a_row_of_text_among_others_of_its_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.")
    (tmp_path / "b.jsonl").write_text('{"text": "Two."}\n')
    source = DataSource(source=[f"{tmp_path}/a.txt", f"{tmp_path}/b.jsonl"], held_out=0)
    intake = Intake(source, ("text",))
    assert [placed.row for placed in intake] == [
        Text("One.", f"{tmp_path}/a.txt:1"),
        Text("Two.", f"{tmp_path}/b.jsonl:1"),
    ]
    assert intake.format == "text"
    with pytest.raises(DataError, match="kind `text`"):
        list(Intake(source, ("preference",)))


def test_nothing_but_empty_documents_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match="no usable row; 1 x empty text"):
        list(Intake(DataSource(source=str(tmp_path / "a.txt")), ("text",)))
