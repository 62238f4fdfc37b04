"""kill -9 at every changing system call of a publish leaves it absent or complete, and the next process recovers."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import children, killing
from .material import CASES, Case

pytestmark = pytest.mark.skipif(bool(children.MISSING), reason=children.MISSING)


EVERY = {"a stage that replaces another": 1}
"""Of the other cases, every third point."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kill_at_any_system_call_leaves_it_absent_or_complete(case: Case, root: Path) -> None:
    killed = list(killing.blows(case, root, killing.KILL, EVERY.get(case.name, 3)))
    assert [blow for blow in killed if blow.problem or blow.code != -9] == []
    assert len(killed) >= 12
    assert {"openat", "fsync", "chmod"} & {blow.point.name for blow in killed}
