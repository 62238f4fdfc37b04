"""What the doctor says of a data source."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from data.findings import Findings, Kind
from data.schema import Row


@dataclass(frozen=True)
class Drop:
    """A usable row that is better left out."""

    kind: Kind
    what: str
    """The row it repeats or contradicts, as a place; what the chat template says of it."""


@dataclass
class Diagnosis:
    """What was found in a data source."""

    source: str
    rows: int
    usable: int
    held_out: int
    """Usable rows that are kept from training."""
    kind: str
    """Kind of the rows; empty when none is usable."""
    format: str
    columns: tuple[str, ...]
    """Columns by which the format was recognised."""
    example: Row | None
    """The first usable row."""
    findings: Findings
    figures: dict[str, float]
    """Measured over all usable rows; lengths of texts in characters."""
    scripts: dict[str, int]
    """Script -> rows that are mostly written in it; most frequent first."""
    lengths: dict[str, dict[str, int]]
    """`prompt`, `response`, `whole` -> quantile -> tokens; empty without an encoder."""
    drops: dict[int, Drop] = field(default_factory=dict)
    """Row number -> why it is better left out; malformed rows, which cannot be used at all, are not among them."""

    @property
    def failed(self) -> bool:
        """Whether there is an error, or no row to train on."""
        return not self.usable or bool(self.findings.counts("error"))

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "source": self.source,
            "rows": self.rows,
            "usable": self.usable,
            "held_out": self.held_out,
            "kind": self.kind,
            "format": self.format,
            "failed": self.failed,
            "findings": self.findings.record(),
            "figures": self.figures,
            "scripts": self.scripts,
            "lengths": self.lengths,
            "better_left_out": dict(sorted(Counter(drop.kind.name for drop in self.drops.values()).items())),
        }
