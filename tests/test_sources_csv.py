"""CSV and TSV: what `csv` writes is read back, and what is malformed is named with the line where its record starts."""

from __future__ import annotations

import csv
import gzip
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from data import findings as kinds
from data.findings import BadRow, Findings, Kind
from data.sources import Located, records
from pipeline.config import DataSource
from pipeline.errors import DataError

HEADER = ["prompt", "chosen", "rejected"]
GOOD = [f"Question {number}?,Yes.,No." for number in range(20)]
PARSED = [dict(zip(HEADER, row.split(","), strict=True)) for row in GOOD]


def read(path: Path, content: bytes | str, **settings: Any) -> list[Located | BadRow]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(records(DataSource(source=str(path), **settings), Findings()))


def rows(found: list[Located | BadRow]) -> list[Any]:
    return [each.record for each in found if isinstance(each, Located)]


def problems(found: list[Located | BadRow]) -> list[BadRow]:
    return [each for each in found if isinstance(each, BadRow)]


def table(*lines: str) -> str:
    return "\n".join(("prompt,chosen,rejected", *lines)) + "\n"


BAD: dict[str, tuple[bytes, Kind, str]] = {
    "too few fields": (b"a,b", kinds.RAGGED, "2 fields, the header has 3: a,b"),
    "one field": (b"a", kinds.RAGGED, "1 field, the header has 3"),
    "too many fields": (b'a,b,c,"d"', kinds.RAGGED, "4 fields, the header has 3"),
    "text after a quote": (b'a,"b"c,d', kinds.UNCLOSED_QUOTE, "field 2: text after the closing quote"),
    "invalid UTF-8": (b"a,b\xff,c", kinds.NOT_UTF8, "byte 4: not UTF-8 (0xff)"),
    "invalid UTF-8 in quotes": (b'a,"b\n\xff",c', kinds.NOT_UTF8, "line 9, byte 1: not UTF-8 (0xff)"),
}


@pytest.mark.parametrize("coding", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("line", "kind", "words"), BAD.values(), ids=list(BAD))
def test_a_bad_row_is_named_with_its_line_and_costs_only_itself(
    tmp_path: Path, line: bytes, kind: Kind, words: str, coding: str
) -> None:
    path = tmp_path / f"a.csv{coding}"
    lines = [b"prompt,chosen,rejected", *(row.encode() for row in GOOD[:6]), line, *(row.encode() for row in GOOD[7:])]
    content = b"\n".join(lines) + b"\n"
    packed = {
        "": content,
        ".gz": gzip.compress(content),
        ".zst": bytes(pyarrow.compress(content, "zstd", asbytes=True)),
    }
    found = read(path, packed[coding])
    assert rows(found) == PARSED[:6] + PARSED[7:]
    assert [(each.kind, each.where) for each in problems(found)] == [(kind, f"{path}:8")]
    assert words in problems(found)[0].what


def test_after_a_quote_that_is_never_closed_nothing_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(table(*GOOD[:6], '"a\nb","b,c', *GOOD[7:]))
    found = records(DataSource(source=str(path)), Findings())
    assert rows([next(found) for _ in range(6)]) == PARSED[:6]
    with pytest.raises(DataError, match="field 2: the quote is not closed before the file ends") as caught:
        next(found)
    assert caught.value.where == f"{path}:9"  # the line of the quote, not that of its record
    assert not isinstance(caught.value, BadRow)


@pytest.mark.parametrize("end", ["", "\n", "\n\n\r\n"])
def test_a_quote_that_is_not_closed_in_the_last_line_costs_that_line(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.csv"
    found = read(path, table(*GOOD) + 'a,"b,c' + end)
    assert rows(found) == PARSED
    assert [(each.kind, each.where, each.what) for each in problems(found)] == [
        (kinds.UNCLOSED_QUOTE, f"{path}:22", "field 2: the quote is not closed before the file ends")
    ]


@pytest.mark.parametrize(
    ("torn", "bad_lines"),
    [
        (['a,"b,c', "d,e,f", "g,h,i", 'j,k "l",m'], [8, 9, 10, 11]),
        (['a,"b,c', "d,e,f", "", 'g,"h",i'], [8, 9, 11]),
        (['a,"b,c', 'd,"e', "f,g,h", 'i",j'], [8, 9]),  # the second record of the span ends after it
        (['a,"b', 'c"d,e'], [8, 9]),
        (['a,"b', 'c"d,"e', 'f"g,h'], [8, 9, 10]),  # the second record of the span tears it further
    ],
)
def test_the_lines_that_a_wrong_quote_holds_together_are_no_rows(
    tmp_path: Path, torn: list[str], bad_lines: list[int]
) -> None:
    path = tmp_path / "a.csv"
    found = read(path, table(*GOOD[:6], *torn, *GOOD[6:]))
    assert rows(found) == PARSED
    assert [(each.kind, each.where) for each in problems(found)] == [
        (kinds.UNCLOSED_QUOTE, f"{path}:{line}") for line in bad_lines
    ]


def test_a_quoted_line_break_counts_and_the_record_has_the_line_where_it_starts(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    found = read(path, table('"a\r\n""b"",\n\n",c,d', "", "\r", "e,,", "f,g"))
    assert rows(found) == [
        {"prompt": 'a\r\n"b",\n\n', "chosen": "c", "rejected": "d"},
        {"prompt": "e", "chosen": "", "rejected": ""},
    ]
    assert [each.origin for each in found if isinstance(each, Located)] == [f"{path}:2", f"{path}:8"]
    assert problems(found)[0].where == f"{path}:9"


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_what_the_csv_module_writes_is_read_back(tmp_path: Path, separator: str, suffix: str, ending: str) -> None:
    random_ = random.Random(f"{separator}{suffix}{ending}")
    path = tmp_path / f"a{suffix}"
    for _ in range(40):
        count = random_.randrange(2, 5)
        header = [f"column {number}" for number in range(count)]
        data = [["".join(random_.choices(' a,;\t|"\né😀', k=random_.randrange(9))) for _ in header] for _ in range(9)]
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, delimiter=separator, lineterminator=ending).writerows([header, *data])
        notes = Findings()
        found = list(records(DataSource(source=str(path)), notes))
        assert rows(found) == [dict(zip(header, row, strict=True)) for row in data]
        expected = {".csv": ",", ".tsv": "\t"}[suffix]
        assert notes.counts() == ({} if separator == expected else {"other separator": 1})


def test_a_mark_a_missing_last_line_end_and_bare_quotes_are_taken(tmp_path: Path) -> None:
    found = read(tmp_path / "a.csv", b'\xef\xbb\xbfprompt,chosen\n5" disk,say "hi"')
    assert rows(found) == [{"prompt": '5" disk', "chosen": 'say "hi"'}]


def test_white_space_around_the_names_of_columns_is_not_theirs(tmp_path: Path) -> None:
    found = read(tmp_path / "a.csv", "prompt, chosen ,\trejected \r\n a , b,c \n")
    assert rows(found) == [{"prompt": " a ", "chosen": " b", "rejected": "c "}]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("line", ["sep={}", '"sep={}"', "SEP={}\r"])
def test_a_line_before_the_header_may_name_the_separator(tmp_path: Path, line: str, separator: str) -> None:
    path = tmp_path / "a.csv"
    other = "|" if separator == "," else ","
    header, row = separator.join((f"a{other}b{other}c", "d")), separator.join(("1", "2"))
    found = read(path, "\n".join((line.format(separator), header, row)))
    assert [each.origin for each in found if isinstance(each, Located)] == [f"{path}:3"]
    assert rows(found) == [{f"a{other}b{other}c": "1", "d": "2"}]


def test_other_separators_inside_quoted_names_do_not_count(tmp_path: Path) -> None:
    assert rows(read(tmp_path / "a.csv", '"a;b;c",d\n1,2\n')) == [{"a;b;c": "1", "d": "2"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no row"),
        (b"\n\n", "holds no row"),
        (b"prompt,chosen\n", "holds no row"),
        (b"prompt,prompt\na,b\n", "the header names 'prompt' twice"),
        (b"What is this?" * 8 + b",b\n", "no header"),
        (b'"two\nlines",b\nc,d\n', "no header"),
        (b'"prompt"s,b\nc,d\n', "the header cannot be read"),
        (b'"prompt,b\nc,d\n', "field 1: the quote is not closed before the file ends"),
        (b"prompt,b\rc,d\re,f\r", "its lines end in a carriage return alone"),
        (b"sep=;\rprompt;b\rc;d\r", "its lines end in a carriage return alone"),
        (b"prompt, prompt\na,b\n", "the header names 'prompt' twice"),
        (b"sep=;\n", "holds no row"),
        (b"pr\xffompt,b\nc,d\n", "header: byte 3: not UTF-8 (0xff)"),
        ("prompt,b\nc,d\n".encode("utf-16"), "looks like UTF-16"),
    ],
)
def test_a_file_without_rows_or_header_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.csv"
    with pytest.raises(DataError) as caught:
        read(path, content)
    assert words in caught.value.what
    assert caught.value.where.startswith(str(path))
    assert caught.value.hint


@pytest.mark.parametrize("end", [b"e", b"e,\xc3", b'e,"f'])
def test_a_cut_last_row_is_noticed(tmp_path: Path, end: bytes) -> None:
    found = read(tmp_path / "a.csv", b"prompt,chosen\na,b\n" + end)
    assert rows(found) == [{"prompt": "a", "chosen": "b"}]
    assert problems(found)[0].kind in (kinds.CUT_SHORT, kinds.UNCLOSED_QUOTE)
    assert problems(found)[0].where.endswith(":3")


def test_the_limit_is_on_the_characters_of_a_row_and_exact(tmp_path: Path) -> None:
    content = table("é" * 90 + ',"""",😀', GOOD[0])
    assert len(rows(read(tmp_path / "a.csv", content, max_chars=92))) == 2
    found = read(tmp_path / "a.csv", content, max_chars=91)
    assert [each.what for each in problems(found)] == ["92 characters, limit 91 (max_chars)"]
    assert len(rows(found)) == 1


@pytest.mark.parametrize(
    "field",
    [
        "é" * 10_000_000,
        pytest.param('"' + "é\n" * 5_000_000 + '"', marks=pytest.mark.slow),
        '"' + "é" * 10_000_000 + '\n"',
    ],
)
def test_a_row_of_ten_million_characters_is_passed_over(tmp_path: Path, field: str) -> None:
    path = tmp_path / "a.csv"
    found = read(path, table(*GOOD[:2], f"{field},a,b", *GOOD[2:]))
    assert [(each.kind, each.where) for each in problems(found)] == [(kinds.TOO_LARGE, f"{path}:4")]
    assert problems(found)[0].what.startswith("10,000,0")
    assert rows(found) == PARSED
    last = found[-1]
    assert isinstance(last, Located)
    assert last.origin == f"{path}:{table(*GOOD[:2], f'{field},a,b', *GOOD[2:]).count(chr(10))}"


def test_a_quote_that_swallows_too_much_to_go_back_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with pytest.raises(DataError, match="a quote is not closed") as caught:
        read(path, table(GOOD[0], '"a,b,c', *GOOD * 300), max_chars=1000)
    assert caught.value.where == f"{path}:3"


def test_damaged_text_never_crashes_the_reader(tmp_path: Path) -> None:
    random_ = random.Random(0)
    intact = table(*['"a\n""b""",c,"d,e"'] * 4).encode()
    for _ in range(300):
        damaged = bytearray(intact)
        for _ in range(random_.randrange(1, 4)):
            damaged[random_.randrange(len(table()), len(damaged))] = random_.choice(b'",\n\r\xffa')
        try:
            found = read(tmp_path / "a.csv", bytes(damaged))
        except DataError as error:
            assert "not closed" in error.what  # noqa: PT017
            continue
        assert all(set(row) == set(HEADER) for row in rows(found))
        numbers = [int((each.origin if isinstance(each, Located) else each.where).rsplit(":")[-1]) for each in found]
        assert numbers == sorted(set(numbers))
