"""One process writes to a run directory; the others say so, and no lock outlives its holder."""

from __future__ import annotations

from pathlib import Path

from . import processes


def test_of_eight_at_once_one_runs_and_the_others_are_told(root: Path) -> None:
    assert processes.at_once(root, 8) == {0: 1, 75: 7}
    assert (root / "output").read_text().count("in use by process") == 7


def test_no_lock_is_stale_though_a_child_of_its_killed_holder_lives_on(root: Path) -> None:
    assert not any(processes.stale_after_a_kill(root) for _ in range(20))
