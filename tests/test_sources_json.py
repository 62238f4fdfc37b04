"""JSON and JSONL, strictly: each fault is named with its line, and every row around it arrives."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from data import findings as kinds
from data.findings import BadRow, Findings, Kind
from data.sources import Located, json_array, records
from pipeline.config import DataSource
from pipeline.errors import DataError

ROWS: list[dict[str, Any]] = [{"prompt": f"Question {number}?", "chosen": "Yes."} for number in range(20)]
GOOD = [json.dumps(row).encode() for row in ROWS]


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, "zstd", asbytes=True))


CODINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def read(path: Path, content: bytes | None = None, **settings: Any) -> list[Located | BadRow]:
    if content is not None:
        path.write_bytes(content)
    return list(records(DataSource(source=str(path), **settings), Findings()))


def rows(found: list[Located | BadRow]) -> list[Any]:
    return [each.record for each in found if isinstance(each, Located)]


def problems(found: list[Located | BadRow]) -> list[BadRow]:
    return [each for each in found if isinstance(each, BadRow)]


BAD: dict[str, tuple[bytes, Kind, str]] = {
    "invalid UTF-8": (b'{"prompt": "\xff"}', kinds.NOT_UTF8, "byte 13: not UTF-8 (0xff)"),
    "encoded surrogate": (b'{"prompt": "\xed\xa0\x80"}', kinds.NOT_UTF8, "byte 13: not UTF-8 (0xed)"),
    "two commas": (b'{"prompt": "a",, "b": 1}', kinds.BROKEN_JSON, "broken JSON at column 16"),
    "raw control character": (b'{"prompt": "a\x01b"}', kinds.BROKEN_JSON, "invalid control character"),
    "single quotes": (b"{'prompt': 1}", kinds.BROKEN_JSON, "broken JSON at column 2"),
    "nothing": (b'{"prompt": }', kinds.BROKEN_JSON, "broken JSON at column 12"),
    "huge integer": (b'{"prompt": 1000000000000000000000000000000}', kinds.HUGE_NUMBER, "1000000000"),
    "2**64": (b'{"prompt": [18446744073709551616]}', kinds.HUGE_NUMBER, "18446744073709551616 does not fit in 64 bits"),
    "many digits": (b'{"prompt": -%s}' % (b"1" * 5000), kinds.HUGE_NUMBER, "..."),
    "NaN": (b'{"prompt": NaN}', kinds.NOT_FINITE, "NaN is not a JSON number"),
    "Infinity": (b'{"prompt": [-Infinity]}', kinds.NOT_FINITE, "-Infinity is not a JSON number"),
    "1e999": (b'{"prompt": 1e999}', kinds.NOT_FINITE, "1e999 is larger than any float"),
    "key twice": (b'{"prompt": "a", "prompt": "a"}', kinds.DUPLICATE_KEY, "duplicate key 'prompt'"),
    "nested key twice": (b'{"a": [{"b": {"c\\u0000": 1, "c\\u0000": 2}}]}', kinds.DUPLICATE_KEY, "'c\\x00'"),
    "escaped key twice": (b'{"a": 1, "\\u0061": 2}', kinds.DUPLICATE_KEY, "'a'"),
    "list": (b'[{"prompt": "a"}]', kinds.NOT_AN_OBJECT, "a list, [{'prompt': 'a'}] (expected an object)"),
    "string": (b'"hello"', kinds.NOT_AN_OBJECT, "a string, 'hello' (expected an object)"),
    "number": (b"5", kinds.NOT_AN_OBJECT, "a number, 5 (expected an object)"),
    "null": (b"null", kinds.NOT_AN_OBJECT, "null, null (expected an object)"),
    "deep lists": (b'{"a": %s1%s}' % (b"[" * 65, b"]" * 65), kinds.BROKEN_JSON, "nested more than 64 levels deep"),
    "very deep lists": (b"[" * 100_000 + b"]" * 100_000, kinds.BROKEN_JSON, "nested more than 64 levels deep"),
    "very deep objects": (b'{"a":' * 9_000 + b"1" + b"}" * 9_000, kinds.BROKEN_JSON, "nested more than 64 levels deep"),
}
FORMS: dict[str, Callable[[list[bytes]], bytes]] = {
    ".jsonl": lambda items: b"".join(item + b"\n" for item in items),
    ".json": lambda items: b"[" + b",\n".join(items) + b"]\n",
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("line", "kind", "words"), BAD.values(), ids=list(BAD))
def test_a_bad_row_is_named_with_its_line_and_costs_only_itself(
    tmp_path: Path, line: bytes, kind: Kind, words: str, form: str, coding: str
) -> None:
    path = tmp_path / f"a{form}{coding}"
    found = read(path, CODINGS[coding](FORMS[form]([*GOOD[:6], line, *GOOD[7:]])))
    assert len(found) == 20
    assert rows(found) == ROWS[:6] + ROWS[7:]
    assert [(each.kind, each.where) for each in problems(found)] == [(kind, f"{path}:7")]
    assert words in problems(found)[0].what
    assert len(problems(found)[0].what) < 250
    assert problems(found)[0].what.isprintable()


@pytest.mark.parametrize("form", FORMS)
def test_legitimate_values_arrive_as_json_has_them(tmp_path: Path, form: str) -> None:
    value = {
        "text": 'a\rb\nc\t"\\/\u0000é😀\u2028',
        "numbers": [0, -0.0, 1.5, 1e300, 2**63, -(2**63), 1e-999],
        "others": [True, False, None, {}, [], {"": ""}],
        "deep": json.loads("[" * 60 + "]" * 60),
    }
    for ascii_only in (True, False):
        content = FORMS[form]([json.dumps(value, ensure_ascii=ascii_only).encode()])
        assert rows(read(tmp_path / f"a{form}", content)) == [value]


@pytest.mark.parametrize("form", FORMS)
def test_key_order_is_kept(tmp_path: Path, form: str) -> None:
    found = rows(read(tmp_path / f"a{form}", FORMS[form]([b'{"z": 1, "a": 2}'])))
    assert list(found[0]) == ["z", "a"]


def test_blank_lines_and_windows_line_ends_keep_the_numbering(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    found = read(path, b"\n\r\n" + GOOD[0] + b"\r\n\n \t\n5\r\n" + GOOD[1])
    assert rows(found) == ROWS[:2]
    assert [each.origin for each in found if isinstance(each, Located)] == [f"{path}:3", f"{path}:7"]
    assert problems(found)[0].where == f"{path}:6"


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_line_without_its_brace_is_broken_in_its_own_last_column(tmp_path: Path, end: bytes) -> None:
    found = read(tmp_path / "a.jsonl", end.join([GOOD[0], b'{"prompt": "a"', GOOD[1], b""]))
    assert rows(found) == ROWS[:2]
    assert [each.what for each in problems(found)] == [
        """broken JSON at column 15: expecting ',' delimiter near '{"prompt": "a"'"""
    ]


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_cut_the_last_row_is_noticed(tmp_path: Path, form: str) -> None:
    last = json.dumps({"a": "é\n😀", "b": [1.5e-3, -2, True, None, False, {"c": "\\"}]}, ensure_ascii=False).encode()
    for cut in range(1, len(last)):
        content = FORMS[form]([*GOOD, last])
        content = content[: content.index(last) + cut]
        found = read(tmp_path / f"a{form}", content)
        assert rows(found) == ROWS
        assert [each.kind for each in problems(found)] == [kinds.CUT_SHORT], last[:cut]
        assert problems(found)[0].where.endswith(":21")


def test_cut_escapes_and_literals_are_noticed(tmp_path: Path) -> None:
    last = rb'{"a": "\u00e9\ud83d\ude00\n", "b": [-1E+5, true, false, null]}'
    for cut in range(1, len(last)):
        found = read(tmp_path / "a.jsonl", GOOD[0] + b"\n" + last[:cut])
        assert [each.kind for each in problems(found)] == [kinds.CUT_SHORT], last[:cut]


def test_a_cut_string_is_called_that_and_a_broken_last_line_is_not_called_cut(tmp_path: Path) -> None:
    assert problems(read(tmp_path / "a.jsonl", GOOD[0] + b'\n{"a": "b'))[0].what == "the file ends inside a string"
    for line in (b'{"a": 1,, "b": 2}', b'{"a": x', b'{"a": 1} 2', b'{"a": "\\x'):
        assert problems(read(tmp_path / "a.jsonl", GOOD[0] + b"\n" + line))[0].kind is kinds.BROKEN_JSON


@pytest.mark.parametrize("form", FORMS)
def test_the_limit_counts_characters_and_is_exact(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a{form}"
    fits = json.dumps({"a": "é😀" * 46}, ensure_ascii=False).encode()
    assert len(fits.decode()) == 101
    found = read(path, FORMS[form]([GOOD[0], fits, GOOD[1]]), max_chars=101)
    assert len(rows(found)) == 3
    found = read(path, max_chars=100)
    assert [each.what for each in problems(found)] == ["101 characters, limit 100 (max_chars)"]
    assert problems(found)[0].where == f"{path}:2"
    assert len(rows(found)) == 2


@pytest.mark.parametrize("ending", [b"\n", b""])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_ten_million_characters_is_not_read_into_memory(tmp_path: Path, form: str, ending: bytes) -> None:
    path = tmp_path / f"a{form}"
    huge = json.dumps({"a": "é" * (10_000_000 - len('{"a": ""}'))}, ensure_ascii=False).encode()
    content = FORMS[form]([*GOOD[:6], huge, *GOOD[7:]] if ending else [*GOOD[:6], huge])
    found = read(path, content if ending else content.rstrip(b"\n"))
    assert [each.what for each in problems(found)] == ["10,000,000 characters, limit 1,000,000 (max_chars)"]
    assert problems(found)[0].where == f"{path}:7"
    assert problems(found)[0].kind is kinds.TOO_LARGE
    assert rows(found) == (ROWS[:6] + ROWS[7:] if ending else ROWS[:6])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("array.jsonl", b" \n[" + GOOD[0] + b"]", "this is a JSON array, not JSONL"),
        ("array.jsonl", b"[" + b" " * 5_000_000 + b"]", "this is a JSON array, not JSONL"),
        ("utf16.jsonl", '{"a": 1}\n'.encode("utf-16"), "looks like UTF-16"),
        ("utf16.jsonl", '{"a": 1}\n'.encode("utf-16-be"), "looks like UTF-16"),
        ("utf16.json", '[{"a": 1}]'.encode("utf-16-le"), "looks like UTF-16"),
        ("gzip.jsonl", gzip.compress(GOOD[0], mtime=0), "holds gzip, not text"),
        ("empty.jsonl", b"", "holds no row"),
        ("white.jsonl", b"\n \n", "holds no row"),
        ("empty.json", b"", "holds no row"),
        ("empty.json", b" [ ] ", "holds no row"),
        ("lines.json", b"\n".join(GOOD), "this is JSONL"),
        ("object.json", json.dumps({"data": ROWS}, indent=1).encode(), "holds one object (expected a list of rows"),
        ("string.json", b'"a"', "not with a list"),
        ("torn.json", b"[" + GOOD[0] + b"\n" + GOOD[1] + b"]", "expected `,` or `]` after a row"),
        ("torn.json", b"[" + GOOD[0] + b",]", "expected a row, found ']'"),
        ("torn.json", b"[," + GOOD[0] + b"]", "expected a row, found"),
        ("torn.json", b"[" + GOOD[0] + b"}]", "expected `,` or `]` after a row"),
        ("after.json", b"[" + GOOD[0] + b"]\n[]", "goes on after the end of the list"),
        ("quote.json", b'[{"a": "b},\n{"a": "c"}]', "invalid control character"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / name, content)
    assert words in caught.value.what
    assert caught.value.where.startswith(str(tmp_path / name))
    assert caught.value.hint


def test_a_list_inside_an_object_is_told_how_to_get_out(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.json", json.dumps({"data": ROWS}).encode())
    assert "jq .data" in caught.value.hint


def test_a_list_that_ends_between_two_rows_is_cut_short(tmp_path: Path) -> None:
    for end in (b"", b",", b", \n"):
        found = read(tmp_path / "a.json", b"[" + GOOD[0] + end)
        assert rows(found) == ROWS[:1]
        assert [(each.kind, each.what) for each in problems(found)] == [
            (kinds.CUT_SHORT, "the file ends inside the list")
        ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("coding", CODINGS)
def test_a_byte_order_mark_is_skipped_and_noted(tmp_path: Path, form: str, coding: str) -> None:
    path = tmp_path / f"a{form}{coding}"
    path.write_bytes(CODINGS[coding](b"\xef\xbb\xbf" + FORMS[form](GOOD)))
    notes = Findings()
    found = list(records(DataSource(source=str(path)), notes))
    assert rows(found) == ROWS
    assert notes.counts() == {"byte order mark": 1}


def random_value(random_: random.Random, depth: int) -> Any:
    letters = 'a"\\[]{},:\n\réß😀\u2028 '
    kind = random_.randrange(9 if depth else 7)
    if kind < 4:
        return "".join(random_.choices(letters, k=random_.randrange(12)))
    if kind < 7:
        return [random_.randrange(-(10**6), 10**6), random_.random(), random_.choice([True, False, None])][kind - 4]
    size = random_.randrange(4)
    if kind == 7:
        return [random_value(random_, depth - 1) for _ in range(size)]
    return {f"{random_value(random_, 0)}{index}": random_value(random_, depth - 1) for index in range(size)}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_the_list_reader_agrees_with_a_reader_of_the_whole(tmp_path: Path, chunk: int) -> None:
    random_ = random.Random(chunk)
    path = tmp_path / "a.json"
    for _ in range(60):
        data = [random_value(random_, 4) for _ in range(random_.randrange(1, 8))]
        text = json.dumps(data, indent=random_.choice([None, 1]), ensure_ascii=random_.random() < 0.5)
        path.write_bytes(text.encode())
        found = list(json_array.read(str(path), 10**6, Findings(), chunk=chunk))
        expected = [value for value in json.loads(path.read_bytes()) if isinstance(value, dict)]
        assert rows(found) == expected
        assert len(found) == len(data)
        assert {each.kind for each in problems(found)} <= {kinds.NOT_AN_OBJECT}


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_origins_are_the_lines_where_elements_begin(tmp_path: Path, chunk: int) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n[\n  {"a": "x"\n  },\n\n  {"a": 2}, {"a": 3},\n{"a": 4}, 5]\n')
    found = list(json_array.read(str(path), 100, Findings(), chunk=chunk))
    origins = [each.origin if isinstance(each, Located) else each.where for each in found]
    assert origins == [f"{path}:{end}" for end in ("3", "6", "6 (row 3)", "7", "7 (row 5)")]


@pytest.mark.parametrize("form", FORMS)
def test_damaged_text_never_crashes_the_reader(tmp_path: Path, form: str) -> None:
    random_ = random.Random(0)
    intact = FORMS[form]([json.dumps({"a": [{"b": 'x"\\é', "c": 1.5}]}, ensure_ascii=False).encode()] * 4)
    path = tmp_path / f"a{form}"
    refused = 0
    for _ in range(400):
        damaged = bytearray(intact)
        for _ in range(random_.randrange(1, 4)):
            damaged[random_.randrange(len(damaged))] = random_.choice(b'"\\[]{},:\n\xff0a ')
        try:
            found = read(path, bytes(damaged))
        except DataError:
            refused += 1
            continue
        assert all(each.where.startswith(f"{path}:") for each in problems(found))
        assert all(isinstance(row, dict) for row in rows(found))
    assert refused < 400
