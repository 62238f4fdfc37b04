"""A figure as the report's tables show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A metric of one model: its value, and where there is one its gain over the parent."""

    label: str
    value: str = ""
    interval: str = ""
    gain: str = ""
    gain_interval: str = ""
    direction: str = "level"
    remark: str = ""
