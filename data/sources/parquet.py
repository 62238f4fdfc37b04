"""Parquet files, their page checksums verified."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from data.findings import NO_CHECKSUMS, Findings, cut
from data.sources.batches import BATCH_ROWS, located, refuse_columns
from data.sources.files import regular, unreadable
from data.sources.record import Records, place
from pipeline.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

BATCH_BYTES = 1 << 24
MAGIC = b"PAR1"
"""What a file begins with; the first page follows."""
CHECKSUM = re.compile(rb"(\x15[\x80-\xff]*[\x00-\x7f]){4}")
"""The start of a page header with a checksum: its first four fields, each an i32 one number higher than the last, in
Thrift's compact protocol (`PageHeader` in parquet.thrift); only the fourth may be absent."""


def read(path: str, max_chars: int, findings: Findings) -> Records:
    """The records of a `.parquet` file.

    Raises:
        DataError: the file cannot be read or is damaged, or two columns have one name.
    """
    import pyarrow
    import pyarrow.parquet

    name = place(path)
    try:
        with (
            regular(path).open("rb") as stream,
            pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True) as file,
        ):
            refuse_columns(file.schema_arrow.names, name)
            if not _has_checksums(stream):
                findings.add(NO_CHECKSUMS, name)
            yield from located(_batches(file), name, max_chars)
    except (pyarrow.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from error
        what = f"not an intact Parquet file: {cut(str(error))}"
        raise DataError(what, where=name, hint="write or download the file again") from error


def _batches(file: pyarrow.parquet.ParquetFile) -> Iterator[pyarrow.RecordBatch]:
    """Batches that hold about as many bytes whatever the size of the rows."""
    found = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        rows = BATCH_BYTES * metadata.num_rows // max(metadata.total_byte_size, 1)
        for batch in file.iter_batches(batch_size=min(max(rows, 1), BATCH_ROWS), row_groups=[group]):
            found += batch.num_rows
            yield batch
    if found != file.metadata.num_rows:
        raise OSError(f"it should have {file.metadata.num_rows:,} rows, and {found:,} are there")


def _has_checksums(stream: BinaryIO) -> bool:
    """Whether the file's first page has a checksum; writers give all pages one, or none."""
    stream.seek(len(MAGIC))
    return CHECKSUM.match(stream.read(32)) is not None
