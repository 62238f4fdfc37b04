"""Records from files, directories of `datasets` and the Hub, each with its place.

Nothing here knows formats: a record is what a file holds, strictly read. Whatever the kind of file, memory does not
grow with its size, and what is wrong is named with file and line.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from data.findings import BadRow, Findings
from data.sources import arrow, columns, delimited, hub, json_array, jsonl, parquet, paths, plain_text
from data.sources.digest import fingerprint, stamps, world_part
from data.sources.files import regular
from data.sources.hub import commit
from data.sources.record import Located, Record, Records, place
from pipeline.config import DataSource
from pipeline.errors import DataError

__all__ = ["LOOKED_AT", "Located", "Record", "commit", "fingerprint", "heads", "records", "stamps", "world_part"]

READERS = {
    ".jsonl": jsonl.read,
    ".json": json_array.read,
    ".csv": delimited.read,
    ".tsv": delimited.read,
    ".txt": plain_text.read,
    ".parquet": parquet.read,
}
COMPRESSED = (".gz", ".zst")
UNCOMPRESSED_KINDS = (".parquet", ".arrow")
LOOKED_AT = 16
"""Records at the beginning of a file that tell what it holds: a bad one among them does not stand for the others."""


def records(source: DataSource, findings: Findings) -> Iterator[Located | BadRow]:
    """The records of a data source in its order, at most `source.rows`, with the columns that `source.columns` names.

    Args:
        source: Files, a directory of `datasets` or a `hub:` data set.
        findings: Takes notes on the files.

    Returns:
        Located records; what is wrong with a row that cannot be read takes the row's place.

    Raises:
        DataError: a source is unreadable, damaged or holds no row, or a file lacks a column that is renamed.
    """
    return islice(_renamed(source, findings), source.rows)


def heads(source: DataSource) -> Iterator[list[Located]]:
    """The records at the beginning of each file, when there are several.

    Raises:
        DataError: as `records`.
    """
    files = [] if source.scheme == "hub" else paths.files(source)
    for path in files if len(files) > 1 else []:
        found = islice(_with_names(_of_file(path, source, Findings()), source.columns), LOOKED_AT)
        yield [each for each in found if isinstance(each, Located)]


def _renamed(source: DataSource, findings: Findings) -> Records:
    if source.scheme == "hub":
        parts = [_with_first(source.name, hub.read(source))]
    else:
        parts = [_with_first(path, _of_file(path, source, findings)) for path in paths.files(source)]
    for part in parts:
        yield from _with_names(part, source.columns)


def _with_names(found: Records, names: dict[str, str]) -> Records:
    if not names:
        yield from found
        return
    looked_at = _up_to_fitting(found, names)
    located = [each for each in looked_at if isinstance(each, Located)]
    if located and not columns.fits(located[-1].record, names):
        columns.refuse_wrong_names(located[0], names)
    for each in chain(looked_at, found):
        yield columns.renamed(each, names) if isinstance(each, Located) else each


def _up_to_fitting(found: Records, names: dict[str, str]) -> list[Located | BadRow]:
    """What a file begins with, up to the first record whose columns can be renamed; only so much is looked at."""
    looked_at = []
    for each in islice(found, LOOKED_AT):
        looked_at.append(each)
        if isinstance(each, Located) and columns.fits(each.record, names):
            break
    return looked_at


def _with_first(name: str, found: Records) -> Records:
    """All records of a file, once there is one."""
    first = next(found, None)
    if first is None:
        raise DataError("holds no row", where=place(name), hint="give a file that holds data")
    yield from chain([first], found)


def _of_file(path: str, source: DataSource, findings: Findings) -> Records:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    kind = suffixes[-1] if suffixes else ""
    if kind in COMPRESSED and len(suffixes) > 1 and suffixes[-2] not in UNCOMPRESSED_KINDS:
        kind = suffixes[-2]
    if kind == ".arrow":
        return arrow.read(path, source.max_chars)
    if kind not in READERS:
        regular(path)
        hint = "give .jsonl, .json, .csv, .tsv, .txt (also .gz, .zst), .parquet, a `datasets` directory, hub: or world:"
        raise DataError("not a kind of file that is read", where=place(path), hint=hint)
    return READERS[kind](path, source.max_chars, findings)
