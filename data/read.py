"""Rows from files, from the Hugging Face Hub and from the embedded world.

Every row knows its place: `file:line` for JSONL, `file:row N` for Parquet, both counted from 1. A malformed
row stops the reading with that place; a well-formed row that nothing can be learnt from is dropped and
counted by reason.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from data.formats import Record, Unusable, cut, detect, shown
from data.schema import Conversation, Message, Preference, Prompt, Row, RowKind, Text
from data.split import is_held_out
from pipeline.config import DataSource
from pipeline.errors import DataError

CHECKED_ROWS = 16
KINDS: dict[type[Row], RowKind] = {
    Text: "text",
    Conversation: "conversation",
    Prompt: "prompt",
    Preference: "preference",
}
SIMPLER: dict[str, tuple[RowKind, ...]] = {
    "text": ("text",),
    "prompt": ("prompt",),
    "conversation": ("conversation", "prompt", "text"),
    "preference": ("preference", "conversation", "prompt", "text"),
}
"""Row kind -> kinds that it can be read as."""

HUB_REFERENCE = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")
COMMIT = re.compile(r"[0-9a-f]{40}")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Loaded:
    """The rows of a data source, all of one kind, split into training and held-out prompts."""

    kind: RowKind
    format: str
    """The format that was recognised or named, for example `hh`; `world` for the embedded world."""
    digest: str
    """What `fingerprint` said before the rows were read."""
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    dropped: dict[str, int]
    """Reason -> rows."""


@dataclass(frozen=True)
class _Located:
    """A row before it is converted, and the format it was read in."""

    row: Row
    format: str


def fingerprint(source: DataSource) -> str:
    """The sha256 that stands for a data source's content, without reading its rows.

    Of a file, its bytes; of a part of the embedded world, the generator's code and arguments; of a Hub
    dataset, the reference and the split.

    Raises:
        DataError: the file is missing, unreadable or not a regular file; the reference is malformed.
    """
    scheme, _, rest = source.source.partition(":")
    if scheme == "world":
        code = Path(__file__).with_name("world.py").read_text(encoding="utf-8")
        return _digest(code, rest, _world_rows(source), source.seed)
    if scheme == "hub":
        name, revision = _hub_reference(source)
        return _digest(name, revision, source.split)
    try:
        with _regular_file(source.source).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        _refuse_unreadable(source.source, error)


def check(source: DataSource, kinds: tuple[str, ...]) -> None:
    """Read the first rows and see that they can serve as one of `kinds`. Hub datasets are checked when they
    are loaded.

    Raises:
        DataError: the file is missing, empty or broken, a column is missing, or the rows are of another kind.
    """
    if source.source.startswith("hub:"):
        _hub_reference(source)
        return
    limited = source.model_copy(update={"rows": min(CHECKED_ROWS, source.rows or CHECKED_ROWS)})
    for located in _rows(limited, Counter()):
        _target(located, kinds)


def load(source: DataSource, kinds: tuple[str, ...]) -> Loaded:
    """Read all rows of a data source as the first of `kinds` that they can serve as.

    Args:
        source: The data source.
        kinds: Kinds of rows the stage takes, in order of preference.

    Raises:
        DataError: a row is malformed, no row is usable, the rows cannot serve as any of `kinds`, or the file
            changed while it was read.
    """
    digest = fingerprint(source)
    dropped: Counter[str] = Counter()
    rows = _rows(source, dropped)
    first = next(rows, None)
    if first is None:
        reasons = "".join(f"; dropped {count}: {reason}" for reason, count in sorted(dropped.items()))
        raise DataError(f"no usable row{reasons}", where=source.source, hint="give a file that holds data")
    kind = _target(first, kinds)
    train: list[Row] = []
    held_out: list[Row] = []
    for located in chain([first], rows):
        # The side is the prompt's, decided before a conversion can hide it in a text.
        side = held_out if is_held_out(located.row, source.held_out) else train
        side.append(convert(located.row, kind, located.format))
    if fingerprint(source) != digest:
        raise DataError("changed while it was read", where=source.source, hint="run again when nothing writes to it")
    return Loaded(kind, first.format, digest, tuple(train), tuple(held_out), dict(sorted(dropped.items())))


def kind_of(row: Row) -> RowKind:
    """The name of a row's kind."""
    return KINDS[type(row)]


def convert(row: Row, kind: RowKind, layout: str = "") -> Row:
    """A row as a simpler kind: preferences keep their best response, a prompt's facts its answer.

    Args:
        row: The row.
        kind: One of `SIMPLER[kind_of(row)]`.
        layout: The format it was read in; `hh` dialogues become text in their own form again.
    """
    if kind == kind_of(row):
        return row
    if isinstance(row, Preference):
        best = Message("assistant", row.responses[0])
        return convert(Conversation((*row.prompt, best), row.origin), kind, layout)
    assert isinstance(row, Conversation)
    if kind == "prompt":
        return Prompt(row.prompt, {"answer": row.messages[-1].content}, row.origin)
    assert kind == "text"
    return Text(_plain(row.messages, layout), row.origin)


def _plain(messages: tuple[Message, ...], layout: str) -> str:
    if layout != "hh":
        return "\n\n".join(f"{message.role}: {message.content}" for message in messages)
    speakers = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{speakers[message.role]}: {message.content}" for message in messages)


def _target(located: _Located, kinds: tuple[str, ...]) -> RowKind:
    """The kind that the rows are read as."""
    kind = kind_of(located.row)
    for each in kinds:
        if each in SIMPLER[kind]:
            return each
    raise DataError(
        f"the rows are of kind `{kind}` (format `{located.format}`); needed: {' or '.join(kinds)}",
        where=located.row.origin,
        hint=f"such rows can be read as {', '.join(SIMPLER[kind])}; give other data",
    )


def _rows(source: DataSource, dropped: Counter[str]) -> Iterator[_Located]:
    """The usable rows of a data source, at most `source.rows` records deep."""
    if source.source.startswith("world:"):
        yield from _world(source)
        return
    records = islice(_records(source), source.rows)
    layout = None
    for origin, record in records:
        layout = layout or detect(record, source.format, origin)
        try:
            yield _Located(layout.parse(record, origin), layout.name)
        except Unusable as reason:
            dropped[str(reason)] += 1


def _records(source: DataSource) -> Iterator[tuple[str, Record]]:
    """Origin and record, in the order of the source.

    Raises:
        DataError: the source is unreadable, broken or holds no record.
    """
    if source.source.startswith("hub:"):
        records = _hub(source)
    elif source.source.endswith((".jsonl", ".jsonl.gz")):
        records = _jsonl(source.source)
    elif source.source.endswith(".parquet"):
        records = _parquet(source.source)
    else:
        raise DataError(
            "not a kind of file that is read",
            where=source.source,
            hint="give a .jsonl, .jsonl.gz or .parquet file, hub:owner/name@revision or world:PART",
        )
    first = next(records, None)
    if first is None:
        raise DataError("holds no row", where=source.source, hint="give a file that holds data")
    return chain([first], records)


def _regular_file(name: str) -> Path:
    """The path, once it is known not to be a directory, a pipe or a device, which could block for ever."""
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        _refuse_unreadable(name, error)
    if not stat.S_ISREG(mode):
        what = "is a directory" if stat.S_ISDIR(mode) else "is not a regular file"
        raise DataError(what, where=name, hint="give one data file")
    return path


def _refuse_unreadable(name: str, error: Exception) -> NoReturn:
    what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {cut(str(error))}"
    raise DataError(
        what,
        where=cut(repr(name)) if "\n" in name or "\0" in name else name,
        hint="paths are relative to the working directory; check the name and the permissions",
    ) from error


def _jsonl(name: str) -> Iterator[tuple[str, Record]]:
    path = _regular_file(name)
    number = 0
    try:
        with _opened(path) as stream:
            for number, line in enumerate(stream, start=1):
                content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
                if content.strip():
                    yield f"{name}:{number}", _json_object(content, f"{name}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"not intact gzip: {cut(str(error))}",
            where=f"{name}:{number + 1}",
            hint="download the file again",
        ) from error
    except OSError as error:
        _refuse_unreadable(name, error)


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _json_object(line: bytes, origin: str) -> Record:
    value = _json_value(line, origin)
    if isinstance(value, dict):
        return value
    hint = "write one object per line, not one list of all rows" if isinstance(value, list) else "write one object"
    raise DataError(f"{shown(value)} (expected an object)", where=origin, hint=hint)


def _json_value(line: bytes, origin: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        coding = "UTF-16" if line.startswith(UTF16_MARKS) else "not UTF-8"
        byte = line[error.start]
        raise DataError(
            f"byte {error.start + 1}: {coding} (0x{byte:02x})", where=origin, hint="convert the file to UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        excerpt = shown(error.doc[max(error.pos - 30, 0) : error.pos + 30])
        raise DataError(
            f"broken JSON at column {error.colno}: {error.msg} near {excerpt}",
            where=origin,
            hint="correct this line; if it is the last one, the file may be cut short",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"JSON that is not taken: {cut(str(error))}", where=origin, hint="correct this line") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _parquet(name: str) -> Iterator[tuple[str, Record]]:
    import pyarrow
    import pyarrow.parquet

    path = _regular_file(name)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{name}:row {number}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"not an intact Parquet file: {shown(str(error))}",
            where=f"{name}:row {number + 1}" if number else name,
            hint="write or download the file again",
        ) from error


def _hub_reference(source: DataSource) -> tuple[str, str]:
    match = HUB_REFERENCE.fullmatch(source.source)
    if match is None:
        raise DataError(
            f"malformed reference {shown(source.source)}",
            hint="write hub:owner/name@revision; only a full commit is a revision that cannot change",
        )
    return match["name"], match["revision"]


def _hub(source: DataSource) -> Iterator[tuple[str, Record]]:
    import datasets

    name, revision = _hub_reference(source)
    try:
        table = datasets.load_dataset(name, revision=revision, split=source.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot be loaded: {shown(str(error))}",
            where=source.source,
            hint="check owner, name, revision and split, and whether the network may be used",
        ) from error
    _refuse_other_commit(table, revision, source.source)
    return ((f"{source.source}:row {number}", record) for number, record in enumerate(table, start=1))


def _refuse_other_commit(table: Any, revision: str, where: str) -> None:
    """Without a network, `datasets` takes the newest copy in its cache, whatever the revision asked for."""
    if not COMMIT.fullmatch(revision):
        return
    for each in table.cache_files:
        commit = Path(each["filename"]).parent.name
        if COMMIT.fullmatch(commit) and commit != revision:
            raise DataError(f"the cache holds revision {commit}", where=where, hint="load it once with a network")


def _world_part(source: DataSource) -> str:
    from data import world

    part = source.source.removeprefix("world:")
    if part not in world.PARTS:
        known = ", ".join(world.PARTS)
        raise DataError(f"no part {shown(part)} of the embedded world", where=source.source, hint=f"one of {known}")
    return part


def _world_rows(source: DataSource) -> int:
    from data import world

    part = _world_part(source)
    return source.rows or world.DEFAULT_ROWS[part]


def _world(source: DataSource) -> Iterator[_Located]:
    from data import world

    part = _world_part(source)
    rows: Iterable[Row] = world.generate(part, _world_rows(source), source.seed)
    for number, row in enumerate(rows, start=1):
        origin = row.origin or f"{source.source}:row {number}"
        yield _Located(replace(row, origin=origin), "world")


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
