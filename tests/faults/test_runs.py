"""Runs that are killed, signalled or whose disk fails go on to what they would have been."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import children, runs

pytestmark = pytest.mark.skipif(bool(children.MISSING), reason=children.MISSING)
EVERY = 97
"""Of several hundred points; all of them take minutes."""


def test_a_killed_run_goes_on_to_the_same_end(root: Path) -> None:
    assert {code for _, code in runs.blows(root, "signal=KILL", EVERY)} == {-9}


@pytest.mark.parametrize(("name", "code"), [("TERM", 143), ("INT", 130)])
def test_a_signalled_run_ends_in_order_and_goes_on_to_the_same_end(root: Path, name: str, code: int) -> None:
    """At the first point, before the lock is held, nobody listens yet."""
    assert {found for _, found in runs.blows(root, f"signal={name}", EVERY, first=60)} == {code}


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_run_whose_disk_fails_says_so_and_goes_on_to_the_same_end(root: Path, error: str) -> None:
    """What fails and does not matter, as removing what is no longer needed, does not end the run."""
    assert {code for _, code in runs.blows(root, f"error={error}", EVERY)} <= {0, 6}
