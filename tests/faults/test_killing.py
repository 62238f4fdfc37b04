"""kill -9 at every changing system call of a publish leaves it absent or complete, and the next process recovers."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import children, killing
from .material import CASES, Case

pytestmark = pytest.mark.skipif(bool(children.MISSING), reason=children.MISSING)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kill_at_any_system_call_leaves_it_absent_or_complete(case: Case, root: Path) -> None:
    killed = list(killing.blows(case, root, killing.KILL))
    assert {code for _, code in killed} == {-9}
    assert len(killed) >= 30
    assert {"openat", "write", "fsync", "chmod"} < {point.name for point, _ in killed}
