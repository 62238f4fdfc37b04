"""From a source to tokens on disk: a store for each side, and the record of how they were made."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.document_store import DocumentWriter, encoded
from data.findings import TEMPLATE_REFUSES, BadRow
from data.intake import Intake
from data.schema import Text
from data.tree import Tree
from data.tree_store import TreeWriter
from pipeline.errors import ArtifactError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN, HELD_OUT = "train", "held-out"
"""Sides, and the names of their directories."""


def write_trees(intake: Intake, directory: Path, tree_of: Callable[[Any, int], Tree | str]) -> dict[str, Any]:
    """Write the trees of a source into `directory`.

    Args:
        intake: The source.
        directory: Where the two stores go.
        tree_of: Makes a tree of a row and its number, or names the reason why it cannot be used.

    Returns:
        The record; it counts what cannot be used of the training rows.

    Raises:
        DataError: The source cannot be read, or the chat template refuses rows that may not be skipped.
    """
    dropped: Counter[str] = Counter()
    cut = 0
    with TreeWriter(directory / TRAIN) as train, TreeWriter(directory / HELD_OUT) as held_out:
        written = {True: 0, False: 0}
        for placed in intake:
            try:
                tree = tree_of(placed.row, written[placed.held_out])
            except ArtifactError as error:
                intake.refuse(BadRow(TEMPLATE_REFUSES, error.what, where=placed.row.origin, hint=error.hint))
                continue
            if isinstance(tree, Tree):
                (held_out if placed.held_out else train).append(tree)
                written[placed.held_out] += 1
                cut += bool(tree.cut) and not placed.held_out
            elif not placed.held_out:
                dropped[tree] += 1
    return record(intake, dropped, cut)


def write_documents(intake: Intake, directory: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Write the documents of a source into `directory`, encoded batch by batch.

    Raises:
        DataError: The source cannot be read.
        ArtifactError: The tokenizer has no end token.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ArtifactError("the tokenizer has no end token, which closes every document", hint="set its eos_token")
    read: deque[tuple[bool, str]] = deque()

    def texts() -> Iterator[str]:
        for placed in intake:
            assert isinstance(placed.row, Text)
            read.append((placed.held_out, placed.row.origin))
            yield placed.row.text

    with DocumentWriter(directory / TRAIN, end) as train, DocumentWriter(directory / HELD_OUT, end) as kept:
        for ids in encoded(tokenizer, texts()):
            held_out, origin = read.popleft()
            (kept if held_out else train).append(ids, origin)
    return record(intake)


def record(intake: Intake, dropped: Mapping[str, int] | None = None, cut: int = 0) -> dict[str, Any]:
    """What a finished reading says in a data card; reasons from reading and from tokenising add up."""
    return {
        "digest": intake.digest,
        "format": intake.format,
        "dropped": dict(sorted((intake.dropped + Counter(dropped or {})).items())),
        "cut": cut,
        "prepared": intake.prepared,
        "diagnosis": intake.record,
    }
