"""Reading a stage's data and saying in its manifest what was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from data.read import Loaded, load
from data.schema import Row
from data.tree import Tree
from pipeline.contract import Context
from pipeline.errors import DataError
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
        context.say(f"{context.name}: {count} rows of {context.data[role].source} dropped: {reason}")
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


def require(trees: Sequence[Tree], context: Context, role: str, dropped: Mapping[str, int]) -> None:
    """Raise DataError when tokenising left nothing to train on."""
    if not trees:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "the split is empty"
        raise DataError(
            f"no usable rows for `{role}`: {reasons}",
            where=context.data[role].source,
            hint=f"raise stages.{context.name}.max_length or check the data",
        )
