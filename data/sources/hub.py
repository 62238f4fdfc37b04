"""Data sets of the Hugging Face Hub, at the revision that was asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.findings import cut, shown
from data.sources.batches import BATCH_ROWS, located
from data.sources.record import Records, place
from pipeline.config import DataSource
from pipeline.errors import DataError

if TYPE_CHECKING:
    import pyarrow

REFERENCE = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)(:(?P<config>[\w.-]+))?")
READERS = frozenset({"arrow", "cache", "csv", "json", "parquet", "text"})
"""Readers of `datasets` that take rows of plain values; `cache` reads what another has prepared before."""
COMMIT = re.compile(r"[0-9a-f]{40}")


def reference(source: DataSource) -> tuple[str, str, str | None]:
    """Name, revision and configuration of a data set; None is its only or default configuration.

    Raises:
        DataError: the reference is malformed.
    """
    match = REFERENCE.fullmatch(source.name)
    if match is None:
        hint = "write hub:owner/name@revision[:config]; only a full commit is a revision that cannot change"
        raise DataError(f"malformed reference {shown(source.name)}", hint=hint)
    return match["name"], match["revision"], match["config"]


def read(source: DataSource) -> Records:
    """The records of a data set's split.

    Raises:
        DataError: it cannot be loaded, or only at another revision.
    """
    yield from located(_batches(_load(source)), place(source.name), source.max_chars)


def commit(source: DataSource) -> str | None:
    """The commit that a data set's revision stands for now; None when nothing says.

    Raises:
        DataError: it cannot be loaded.
    """
    _, revision, _ = reference(source)
    if COMMIT.fullmatch(revision):
        return revision
    found = {Path(each["filename"]).parent.name for each in _load(source).cache_files}
    (only,) = found if len(found) == 1 else ("",)
    return only if COMMIT.fullmatch(only) else None


def _load(source: DataSource) -> Any:
    import datasets

    name, revision, config = reference(source)
    if Path(name).exists():
        what = f"`{name}` is also a path here, which would be read in its place"
        raise DataError(what, where=source.name, hint="work in another directory, or name the files themselves")
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        _refuse_other_reader(builder, source.name)
        builder.download_and_prepare()
        table = builder.as_dataset(split=source.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        hint = "check owner, name, revision, configuration and split, and whether the network may be used"
        raise DataError(f"cannot be loaded: {cut(str(error))}", where=source.name, hint=hint) from error
    _refuse_other_commit(table, revision, source.name)
    return table


def _batches(table: Any) -> Iterator[pyarrow.RecordBatch]:
    for part in table.with_format("arrow").iter(BATCH_ROWS):
        yield from part.to_batches()


def _refuse_other_reader(builder: Any, where: str) -> None:
    """`datasets` chooses a reader by the files that it finds, and some of its readers do more than read rows."""
    reader = type(builder).__module__.removeprefix("datasets.packaged_modules.").partition(".")[0]
    if reader not in READERS:
        what = f"its files are read by `{cut(reader)}` of datasets, not as {', '.join(sorted(READERS - {'cache'}))}"
        raise DataError(what, where=where, hint="download it and convert it to one of these")


def _refuse_other_commit(table: Any, revision: str, where: str) -> None:
    """Without a network, `datasets` takes the newest copy in its cache, whatever the revision asked for."""
    if not COMMIT.fullmatch(revision):
        return
    for each in table.cache_files:
        commit = Path(each["filename"]).parent.name
        if COMMIT.fullmatch(commit) and commit != revision:
            raise DataError(f"the cache holds revision {commit}", where=where, hint="load it once with a network")
