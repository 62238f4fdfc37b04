"""CSV and TSV (RFC 4180): a header, and fields that may be quoted and then hold separators and line breaks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from data.findings import CUT_SHORT, NOT_UTF8, OTHER_SEPARATOR, RAGGED, UNCLOSED_QUOTE, BadRow, Findings, cut, shown
from data.sources.csv_text import CsvText, Fields, Flood, Torn
from data.sources.files import opened_text
from data.sources.lines import bytes_kept, too_large
from data.sources.record import Located, Records, place
from data.sources.strict_json import undecodable
from pipeline.errors import DataError

SEPARATORS = (b",", b"\t", b";", b"|")
QUOTED = re.compile(rb'"(?:[^"]++|"")*+"')
SEPARATOR_LINE = re.compile(rb'"?sep=([,\t;|])"?\s*', re.IGNORECASE)
"""What Excel writes before the header."""
LONGEST_NAME = 100
"""Characters; a longer column name is a value, so that the header is missing."""


def read(path: str, max_chars: int, findings: Findings) -> Records:
    """The records of a `.csv` or `.tsv` file, which may be compressed. All values are text; blank lines do not count.

    Raises:
        DataError: the file cannot be read, is damaged, has no usable header, or a quote that is never closed hides
            too much of it.
    """
    name = place(path)
    with opened_text(path, findings) as stream:
        text = CsvText(stream, bytes_kept(max_chars), name)
        text.separator = _separator(text, path, findings)
        header = _header(text, name)
        while found := text.fields():
            yield _located(found, header, f"{name}:{found.line}", max_chars)


def _separator(text: CsvText, path: str, findings: Findings) -> bytes:
    """The separator that a line before the header names, which is passed over; or else the most frequent one of the
    header, and of equally frequent ones, the one that the file's name promises."""
    expected = b"\t" if ".tsv" in [suffix.lower() for suffix in Path(path).suffixes] else b","
    line = text.first_line()
    outside_quotes = QUOTED.sub(b"", line)
    _refuse_other_line_ends(outside_quotes, place(path))
    if named := SEPARATOR_LINE.fullmatch(line):
        text.fields()
        found = named[1]
    else:
        found = max(SEPARATORS, key=lambda each: (outside_quotes.count(each), each == expected))
    if found != expected:
        findings.add(OTHER_SEPARATOR, f"{place(path)}:1", shown(found.decode()))
    return found


def _refuse_other_line_ends(outside_quotes: bytes, name: str) -> None:
    if b"\r" in outside_quotes.rstrip(b"\r\n"):
        what = "its lines end in a carriage return alone"
        raise DataError(what, where=name, hint="save it with line feeds, as CSV of Windows or Unix has them")


def _header(text: CsvText, name: str) -> list[str]:
    """The names of the columns; none of an empty file."""
    found = text.fields()
    if found is None:
        return []
    where = f"{name}:{found.line}"
    if not isinstance(found, Fields):
        raise DataError("the header cannot be read", where=where, hint="write the names of the columns, with commas")
    try:
        header = [each.decode("utf-8").strip() for each in found.values]
    except UnicodeDecodeError as error:
        raise DataError(f"header: {undecodable(error)}", where=where, hint="convert the file to UTF-8") from error
    _refuse_header(header, where)
    return header


def _refuse_header(header: Sequence[str], where: str) -> None:
    hint = "write the names of the columns as the first line, each once"
    for column in header:
        if len(column) > LONGEST_NAME or "\n" in column:
            raise DataError(f"no header: the first line holds {shown(column)}", where=where, hint=hint)
    twice = {column for column in header if header.count(column) > 1}
    if twice:
        raise DataError(f"the header names {shown(min(twice))} twice", where=where, hint=hint)


def _located(found: Fields | Torn | Flood, header: list[str], origin: str, max_chars: int) -> Located | BadRow:
    if isinstance(found, Torn):
        return BadRow(UNCLOSED_QUOTE, found.what, where=origin)
    if isinstance(found, Flood):
        return too_large(found.characters, max_chars, origin)
    if len(found.values) != len(header):
        return _ragged(found, header, origin)
    try:
        values = [each.decode("utf-8") for each in found.values]
    except UnicodeDecodeError:
        return _undecodable(found, origin)
    length = sum(map(len, values))
    if length > max_chars:
        return too_large(length, max_chars, origin)
    return Located(origin, dict(zip(header, values, strict=True)))


def _ragged(found: Fields, header: list[str], origin: str) -> BadRow:
    count = len(found.values)
    if count < len(header) and not found.raw[-1].endswith(b"\n"):
        return BadRow(CUT_SHORT, f"the file ends after field {count} of {len(header)}", where=origin)
    fields = "1 field" if count == 1 else f"{count} fields"
    excerpt = cut(b"".join(found.raw)[:80].decode("utf-8", "replace"))
    return BadRow(RAGGED, f"{fields}, the header has {len(header)}: {excerpt}", where=origin)


def _undecodable(found: Fields, origin: str) -> BadRow:
    for number, line in enumerate(found.raw, start=found.line):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            if not line.endswith(b"\n") and error.reason == "unexpected end of data":
                return BadRow(CUT_SHORT, "the file ends inside a character", where=origin)
            place_in_row = "" if number == found.line else f"line {number}, "
            return BadRow(NOT_UTF8, place_in_row + undecodable(error), where=origin)
    raise AssertionError("fields that cannot be decoded are part of lines that cannot")
