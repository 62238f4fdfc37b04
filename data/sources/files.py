"""Opening data files without being blocked by a pipe, cheated by damage or flooded by a compressed nothing."""

from __future__ import annotations

import gzip
import io
import stat
import unicodedata
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, cast

from data.findings import BYTE_ORDER_MARK, Findings, cut
from data.sources.record import place
from pipeline.errors import DataError

LARGEST_RATIO = 100
SUSPICIOUS_SIZE = 10**9
"""Bytes. Content that is larger than this and than `LARGEST_RATIO` times its compressed form is not data."""
BUFFER = 1 << 18
MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
DISGUISES = {
    b"\x1f\x8b": "gzip; end its name in .gz",
    b"\x28\xb5\x2f\xfd": "zstd; end its name in .zst",
    b"PAR1": "Parquet; end its name in .parquet",
}
"""First bytes of a file -> what it is, though its name says text."""


class Readable(Protocol):
    """What content is read from."""

    def readinto(self, buffer: Any, /) -> int | None:
        """Fill a buffer; 0 at the end."""

    def close(self) -> None:
        """Give back what is held."""


def regular(path: str) -> Path:
    """The path, once it is known not to be a directory, a pipe or a device, which could block for ever.

    Raises:
        DataError: it is one of those, is missing or may not be looked at.
    """
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if stat.S_ISDIR(mode):
        hint = "give a data file, a glob such as `folder/*.jsonl`, or a directory written by `datasets`"
        raise DataError("is a directory", where=place(path), hint=hint)
    if not stat.S_ISREG(mode):
        raise DataError("is not a regular file", where=place(path), hint="give a data file")
    return Path(path)


def unreadable(path: str, error: Exception) -> DataError:
    """What to tell a user whose file cannot be opened or read."""
    if isinstance(error, FileNotFoundError):
        dangling = Path(path).is_symlink()
        what = "no such file: the link leads nowhere" if dangling else "no such file"
        return DataError(what, where=place(path), hint=_other_spelling(path))
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    hint = "check the name and the permissions"
    return DataError(f"cannot be read: {cut(reason)}", where=place(path), hint=hint)


def _other_spelling(path: str) -> str:
    """The remedy for a missing file; one may be there whose name only looks the same."""
    wanted = unicodedata.normalize("NFC", Path(path).name)
    try:
        names = [each.name for each in Path(path).parent.iterdir()]
    except OSError:
        names = []
    for name in names:
        if unicodedata.normalize("NFC", name) == wanted and name != Path(path).name:
            return f"the name is there in another Unicode form: {cut(ascii(name))}"
    return "paths are relative to the working directory; check the name"


def opened(path: str) -> BinaryIO:
    """The content of a regular file, that of a `.gz` or `.zst` file expanded as it is read.

    Raises:
        DataError: here or on a later read: the file cannot be read, is damaged or expands without end.
    """
    name = regular(path)
    try:
        compressed = name.open("rb", buffering=0)
    except OSError as error:
        raise unreadable(path, error) from error
    return io.BufferedReader(_Content(path, compressed), BUFFER)


def opened_text(path: str, findings: Findings) -> BinaryIO:
    """Like `opened`, past a byte order mark.

    Raises:
        DataError: also when the content is UTF-16, or a kind of file that holds no text.
    """
    stream = opened(path)
    try:
        head = cast(io.BufferedReader, stream).peek(4)[:4]
        _refuse_other_content(head, path)
        if head.startswith(MARK):
            stream.read(len(MARK))
            findings.add(BYTE_ORDER_MARK, place(path))
    except DataError:
        stream.close()
        raise
    return stream


def _refuse_other_content(head: bytes, path: str) -> None:
    if head.startswith(UTF16_MARKS) or b"\0" in head[:2]:
        raise DataError("looks like UTF-16", where=place(path), hint="convert to UTF-8")
    for start, what in DISGUISES.items():
        if head.startswith(start):
            raise DataError(f"holds {what.partition(';')[0]}, not text", where=place(path), hint=f"it is {what}")


class _Content(io.RawIOBase):
    """The bytes of a file, expanded where its name says that they are compressed."""

    def __init__(self, path: str, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._coding = Path(path).suffix.lower()
        self._stream = _expanded(file, self._coding)
        self._compressed = self._coding in (".gz", ".zst")
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        try:
            count = self._stream.readinto(buffer) or 0
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise self._damaged(error) from error
        except OSError as error:
            if error.errno is None:  # pyarrow's way to say that zstd is damaged
                raise self._damaged(error) from error
            raise unreadable(self._path, error) from error
        self._size += count
        if self._compressed:
            self._refuse_flood()
        return count

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()

    def _damaged(self, error: Exception) -> DataError:
        what = f"not intact {self._coding}: {cut(str(error))} (after {self._size:,} bytes of content)"
        return DataError(what, where=place(self._path), hint="download or write the file again")

    def _refuse_flood(self) -> None:
        if self._size > max(SUSPICIOUS_SIZE, LARGEST_RATIO * self._file.tell()):
            what = f"expands to more than {LARGEST_RATIO} times its size and {SUSPICIOUS_SIZE:,} bytes"
            raise DataError(what, where=place(self._path), hint="no data does; expand it yourself if you trust it")


def _expanded(file: IO[bytes], coding: str) -> Readable:
    if coding == ".gz":
        return cast(Readable, gzip.GzipFile(fileobj=file, mode="rb"))
    if coding == ".zst":
        import pyarrow  # which, unlike other readers of zstd, reports a stream that is cut short

        return cast(Readable, pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))
    return cast(Readable, file)
