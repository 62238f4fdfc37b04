"""Reading a stage's data and saying in its manifest what was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from data.read import Loaded, load
from data.schema import Row
from data.tree import Tree, usable
from pipeline.contract import Context
from pipeline.errors import ArtifactError, DataError
from pipeline.manifest import DataCard

HELD_OUT, TRAIN = "held-out", "train"
Item = TypeVar("Item", bound=Row)


@dataclass(frozen=True)
class Rows(Generic[Item]):
    """The rows of a data role, split by prompt, and how they were read."""

    train: Sequence[Item]
    held_out: Sequence[Item]
    loaded: Loaded


def read(context: Context, role: str, kind: type[Item]) -> Rows[Item]:
    """The rows of a data role, which are of the kind its stage asks for."""
    loaded = load(context.data[role], context.settings.DATA[role])
    for reason, count in sorted(loaded.dropped.items()):
        context.say(f"{count} rows of {context.data[role].source} dropped: {reason}")
    return Rows(_all(kind, loaded.train), _all(kind, loaded.held_out), loaded)


def card(
    context: Context,
    role: str,
    rows: Rows[Item],
    used: int,
    split: str = TRAIN,
    dropped: Mapping[str, int] | None = None,
) -> DataCard:
    """The record of what was used from a data role; reasons to drop rows add up from reading and tokenising."""
    reasons = Counter(rows.loaded.dropped) + Counter(dropped or {})
    return DataCard(
        role=role,
        source=context.data[role].source,
        digest=rows.loaded.digest,
        format=rows.loaded.format,
        rows=used,
        split=split,
        dropped=dict(sorted(reasons.items())),
    )


def _all(kind: type[Item], found: Sequence[Row]) -> list[Item]:
    kept: list[Item] = [row for row in found if isinstance(row, kind)]
    assert len(kept) == len(found)
    return kept


@dataclass(frozen=True)
class Examples:
    """The usable rows of a data role as trees, and their record for the manifest."""

    train: list[Tree]
    held_out: list[Tree]
    card: DataCard


def examples(context: Context, role: str, kind: type[Item], tree_of: Callable[[Item, int], Tree | str]) -> Examples:
    """Read a data role and turn its rows into trees.

    Args:
        context: The stage's.
        role: The data role.
        kind: The kind of row.
        tree_of: Makes a tree of a row and its number, or names the reason why it cannot be used.

    Raises:
        DataError: There is nothing to train on.
    """
    found = read(context, role, kind)
    train, dropped = usable(_placed(tree_of, row, number) for number, row in enumerate(found.train))
    held_out, _ = usable(_placed(tree_of, row, number) for number, row in enumerate(found.held_out))
    if not train:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.items()) or "every row is held out"
        raise DataError(
            f"no usable rows for `{role}`: {reasons}",
            where=context.data[role].source,
            hint=f"raise stages.{context.name}.max_length, lower the source's held_out, or check the data",
        )
    return Examples(train, held_out, card(context, role, found, len(train), dropped=dropped))


def _placed(tree_of: Callable[[Item, int], Tree | str], row: Item, number: int) -> Tree | str:
    """The row's tree; what a chat template refuses is the row's fault and says which."""
    try:
        return tree_of(row, number)
    except ArtifactError as error:
        raise DataError(error.what, where=row.origin, hint=error.hint) from error
