"""Lines of bytes, none of which can fill the memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from data.findings import TOO_LARGE, BadRow

SKIPPED_AT_ONCE = 1 << 16
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


def bytes_kept(max_chars: int) -> int:
    """Bytes that are kept of a row of at most `max_chars` characters: UTF-8 takes up to four each, and the rest is
    room for syntax."""
    return 4 * max_chars + 65536


def lines(stream: BinaryIO, limit: int) -> Iterator[tuple[bytes, int]]:
    """Every line with its end, and 0; or nothing, and the number of characters, if it is longer than `limit` bytes."""
    while line := stream.readline(limit):
        if len(line) < limit or line.endswith(b"\n"):
            yield line, 0
        else:
            yield b"", characters(line) + _skipped(stream)


def _skipped(stream: BinaryIO) -> int:
    """Read to the end of the line; the number of its characters."""
    found = 0
    while piece := stream.readline(SKIPPED_AT_ONCE):
        found += characters(piece.removesuffix(b"\n"))
        if piece.endswith(b"\n"):
            break
    return found


def characters(content: bytes) -> int:
    """The number of characters that these bytes are in UTF-8."""
    return len(content.translate(None, CONTINUATION_BYTES))


def too_large(length: int, max_chars: int, origin: str) -> BadRow:
    """The problem of a row of `length` characters."""
    return BadRow(TOO_LARGE, f"{length:,} characters, limit {max_chars:,} (max_chars)", where=origin)
