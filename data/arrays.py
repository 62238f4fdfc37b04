"""Arrays on disk: written piece by piece, and memory-mapped to be read.

A file holds the items of one array and nothing else, little-endian; of which type they are is the reader's to know.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

TOKEN = np.dtype("<u4")
PLACE = np.dtype("<i8")
"""Where something ends in another array."""


class ArrayWriter:
    """A new file that items are appended to; a context manager that closes it."""

    def __init__(self, path: Path, kind: DTypeLike) -> None:
        self._kind = np.dtype(kind)
        self._stream = path.open("xb")

    def append(self, items: ArrayLike) -> None:
        """Append an array's items, or one item.

        Raises:
            OverflowError: A Python integer that the type does not hold.
        """
        self._stream.write(np.asarray(items, self._kind).tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def mapped(path: Path, kind: DTypeLike) -> NDArray[Any]:
    """A file's items: read from disk as they are looked at, and never written.

    Raises:
        ValueError: The file's size is no multiple of an item's.
    """
    if not path.stat().st_size:
        return np.empty(0, kind)  # there is no map of nothing
    return np.memmap(path, kind, mode="r").view(np.ndarray)


__all__ = ["PLACE", "TOKEN", "ArrayWriter", "mapped"]
