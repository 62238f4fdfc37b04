"""Names in rows that become part of the names of figures: tasks of prompts, categories of suites."""

from __future__ import annotations

from data.findings import shown
from pipeline.errors import DataError
from pipeline.figures import GAIN, RATIO


def require_plain(name: str, column: str, origin: str) -> None:
    """See that a name cannot be taken for that of a comparison: `accuracy.sums_gain` is the gain in `accuracy.sums`.

    Args:
        name: A task or category.
        column: What it is.
        origin: Where the row is.

    Raises:
        DataError: It ends as comparisons with a parent do.
    """
    if name.endswith((GAIN, RATIO)):
        what = f"{column}: {shown(name)} ends as the names of comparisons with a parent do"
        raise DataError(what, where=origin, hint=f"call it something that ends neither in {GAIN} nor in {RATIO}")
