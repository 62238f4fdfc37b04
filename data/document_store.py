"""The tokens of documents on disk, each document closed by the end token, with the places where they end.

tokens.u4      the documents, end to end
ends.i8        where each document ends in `tokens.u4`
origins.utf8   where each document is from, end to end
origins.i8     where each of these ends in `origins.utf8`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from data.arrays import PLACE, TOKEN, ArrayWriter, mapped
from data.content import ContentEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS, ENDS, ORIGINS, ORIGIN_ENDS = "tokens.u4", "ends.i8", "origins.utf8", "origins.i8"
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1000, 1_000_000
"""A batch ends with the document that reaches either: enough for every core, and little beside the tokenizer."""


class DocumentWriter:
    """Writes a `DocumentStore` into a directory, which it creates; a context manager that closes the files.

    Args:
        directory: Where to write.
        end: Id of the end token, which closes every document.
    """

    def __init__(self, directory: Path, end: int) -> None:
        directory.mkdir(parents=True)
        self._end = end
        self._files = ExitStack()
        self._tokens = self._files.enter_context(ArrayWriter(directory / TOKENS, TOKEN))
        self._ends = self._files.enter_context(ArrayWriter(directory / ENDS, PLACE))
        self._origins = self._files.enter_context(ArrayWriter(directory / ORIGINS, "u1"))
        self._origin_ends = self._files.enter_context(ArrayWriter(directory / ORIGIN_ENDS, PLACE))
        self._named = 0
        self.tokens = 0
        """Tokens written, end tokens included."""

    def append(self, ids: Sequence[int], origin: str = "") -> None:
        """Write a document, given as token ids without the end token, and where it is from."""
        self._tokens.append([*ids, self._end])
        self.tokens += len(ids) + 1
        self._ends.append(self.tokens)
        name = origin.encode("utf-8", "surrogatepass")  # a file's name need not be UTF-8
        self._origins.append(np.frombuffer(name, "u1"))
        self._named += len(name)
        self._origin_ends.append(self._named)

    def extend(self, documents: Iterable[Sequence[int]]) -> None:
        """Write documents of unknown origin."""
        for ids in documents:
            self.append(ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()


class DocumentStore:
    """The documents in a directory; tokens are read from disk when they are asked for."""

    def __init__(self, directory: Path) -> None:
        self._tokens = mapped(directory / TOKENS, TOKEN)
        self._ends = mapped(directory / ENDS, PLACE)
        self._origins = mapped(directory / ORIGINS, "u1")
        self._origin_ends = mapped(directory / ORIGIN_ENDS, PLACE)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, document: int) -> NDArray[Any]:
        """The tokens of a document, its end token included."""
        stop = int(self._ends[document])
        return self._tokens[stop - int(self.lengths[document]) : stop]

    def origin(self, document: int) -> str:
        """Where a document is from."""
        start = int(self._origin_ends[document - 1]) if document else 0
        stop = int(self._origin_ends[document])
        return self._origins[start:stop].tobytes().decode("utf-8", "surrogatepass")

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, end token included."""
        return np.diff(self._ends, prepend=0)

    @property
    def tokens(self) -> int:
        """Tokens of all documents, end tokens included."""
        return len(self._tokens)


def encoded(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[Sequence[int]]:
    """The token ids of each text, in order and without an end token; control tokens written in a text stay text.

    Only one batch of texts is held at a time.

    Raises:
        ArtifactError: The tokenizer has no serialised state, or takes plain text for control tokens.
    """
    encoder = ContentEncoder(tokenizer, opening=True)
    for batch in batched(texts):
        yield from encoder.encode_batch(batch)


def batched(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in batches that keep all cores busy and are small in memory."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


__all__ = ["DocumentStore", "DocumentWriter", "batched", "encoded"]
