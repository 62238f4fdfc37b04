"""JSON Lines: one object per line."""

from __future__ import annotations

import io
from typing import BinaryIO, cast

from data.findings import BadRow, Findings
from data.sources.files import opened_text
from data.sources.lines import bytes_kept, characters, lines, too_large
from data.sources.record import Located, Records, place
from data.sources.strict_json import parse_object
from pipeline.errors import DataError


def read(path: str, max_chars: int, findings: Findings) -> Records:
    """The records of a `.jsonl` file, which may be compressed; blank lines are passed over.

    Raises:
        DataError: the file cannot be read, is damaged, or is a JSON list.
    """
    name = place(path)
    with opened_text(path, findings) as stream:
        _refuse_list(stream, name)
        for number, (line, skipped) in enumerate(lines(stream, bytes_kept(max_chars)), start=1):
            if skipped:
                yield too_large(skipped, max_chars, f"{name}:{number}")
            elif line.strip():
                yield _located(line, f"{name}:{number}", max_chars)


def _located(line: bytes, origin: str, max_chars: int) -> Located | BadRow:
    if len(line) > max_chars and (length := characters(line.rstrip(b"\r\n"))) > max_chars:
        return too_large(length, max_chars, origin)
    try:
        return Located(origin, parse_object(line.rstrip(b"\r\n"), origin, last=not line.endswith(b"\n")))
    except BadRow as problem:
        return problem


def _refuse_list(stream: BinaryIO, name: str) -> None:
    if cast(io.BufferedReader, stream).peek(1).lstrip().startswith(b"["):
        hint = "name the file .json, or write one object per line"
        raise DataError("begins with a list: this is a JSON array, not JSONL", where=name, hint=hint)
