"""Reading a stage's data and saying in its manifest what was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data.read import Loaded, load
from data.tree import Tree
from pipeline.contract import Context
from pipeline.errors import DataError
from pipeline.manifest import DataCard

HELD_OUT, TRAIN = "held-out", "train"


def read(context: Context, role: str) -> Loaded:
    """The rows of a data role, split into training and held-out."""
    loaded = load(context.data[role], context.settings.DATA[role])
    for reason, count in sorted(loaded.dropped.items()):
        context.say(f"{context.name}: {count} rows of {context.data[role].source} dropped: {reason}")
    return loaded


def card(
    context: Context, role: str, loaded: Loaded, rows: int, split: str = TRAIN, dropped: Mapping[str, int] | None = None
) -> DataCard:
    """The record of what was used from a data role; reasons to drop rows add up from reading and from tokenising."""
    reasons = dict(loaded.dropped)
    for reason, count in (dropped or {}).items():
        reasons[reason] = reasons.get(reason, 0) + count
    return DataCard(
        role=role,
        source=context.data[role].source,
        digest=loaded.digest,
        format=loaded.format,
        rows=rows,
        split=split,
        dropped=reasons,
    )


def require(trees: Sequence[Tree], context: Context, role: str, dropped: Mapping[str, int]) -> None:
    """Raise DataError when tokenising left nothing to train on."""
    if not trees:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "the split is empty"
        raise DataError(
            f"no usable rows for `{role}`: {reasons}",
            where=context.data[role].source,
            hint=f"raise stages.{context.name}.max_length or check the data",
        )
