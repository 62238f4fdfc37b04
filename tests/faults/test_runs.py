"""Runs that are killed, signalled or whose disk fails go on to what they would have been."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import children, runs

pytestmark = pytest.mark.skipif(bool(children.MISSING), reason=children.MISSING)
EVERY = 140
"""Of several hundred points; all of them take minutes."""


def ends(root: Path, how: str, first: int = 0) -> set[int]:
    """The exit codes of broken runs with whose remains nothing is wrong."""
    found = list(runs.blows(root, how, EVERY, first))
    assert [blow for blow in found if blow.problem] == []
    assert len(found) >= 4
    return {blow.code for blow in found}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(root: Path) -> None:
    assert ends(root, "signal=KILL") == {-9}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("TERM", 143), ("INT", 130)])
def test_a_signalled_run_ends_in_order_and_goes_on_to_the_same_end(root: Path, name: str, code: int) -> None:
    """From where the lock is held on: before, nobody listens yet."""
    assert ends(root, f"signal={name}", first=40) == {code}


@pytest.mark.slow
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_run_whose_disk_fails_says_so_and_goes_on_to_the_same_end(root: Path, error: str) -> None:
    """What fails and does not matter, as removing what is no longer needed, does not end the run."""
    assert ends(root, f"error={error}") <= {0, 6}


def test_a_clock_that_was_set_back_changes_nothing(root: Path) -> None:
    assert runs.goes_on_from_the_newest(root, "sft", runs.STEPS - 1)
