"""Plain text: a file is one document."""

from __future__ import annotations

from typing import BinaryIO

from data.findings import CUT_SHORT, NOT_UTF8, NUL, BadRow, Findings, shown
from data.sources.files import opened_text
from data.sources.lines import SKIPPED_AT_ONCE, bytes_kept, characters, too_large
from data.sources.record import Located, Records, place
from data.sources.strict_json import undecodable


def read(path: str, max_chars: int, findings: Findings) -> Records:
    """The one record of a `.txt` file, which may be compressed: its whole content as `text`, line ends as they are.

    It begins at line 1; a problem's place is the line that has it. Of a document that is too long, no more is kept
    than the longest one takes.

    Raises:
        DataError: the file cannot be read or is damaged.
    """
    name = place(path)
    with opened_text(path, findings) as stream:
        content = stream.read(bytes_kept(max_chars))
        length = characters(content) + _characters_left(stream)
    yield _too_long(content, length, name, max_chars) if length > max_chars else _located(content, name)


def _characters_left(stream: BinaryIO) -> int:
    return sum(map(characters, iter(lambda: stream.read(SKIPPED_AT_ONCE), b"")))


def _too_long(content: bytes, length: int, name: str, max_chars: int) -> BadRow:
    line = content.decode("utf-8", "replace").count("\n", 0, max_chars) + 1
    return too_large(length, max_chars, f"{name}:{line}")


def _located(content: bytes, name: str) -> Located | BadRow:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return _undecodable(content, name)
    return _with_nul(text, name) if "\0" in text else Located(f"{name}:1", {"text": text})


def _undecodable(content: bytes, name: str) -> BadRow:
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            if number == len(lines) and error.reason == "unexpected end of data":
                return BadRow(CUT_SHORT, "the file ends inside a character", where=f"{name}:{number}")
            return BadRow(NOT_UTF8, undecodable(error), where=f"{name}:{number}")
    raise AssertionError("a text that cannot be decoded has a line that cannot")


def _with_nul(text: str, name: str) -> BadRow:
    before, _, after = text.partition("\0")
    start = before.rpartition("\n")[2]
    number = before.count("\n") + 1
    line = start + "\0" + after.partition("\n")[0]
    return BadRow(NUL, f"{shown(line)} (NUL at character {len(start) + 1})", where=f"{name}:{number}")
