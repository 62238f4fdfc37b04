"""kill -9 at random times over a chain that is really trained changes nothing of what it comes to."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import REPOSITORY

KILLS = 1
TRIALS = f"""
import tempfile
from pathlib import Path
from tests.faults import kills
with tempfile.TemporaryDirectory() as root:
    found = list(kills.trials(Path(root), {KILLS}, seed=1))
assert all(trial.alike and trial.whole for trial in found), found
print(sum(len(trial.killed_after) for trial in found))
"""


@pytest.mark.slow
def test_a_chain_that_is_killed_comes_to_the_same_end() -> None:
    """In a process of its own: forking one that has computed with several threads is not safe."""
    done = subprocess.run([sys.executable, "-c", TRIALS], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout == f"{KILLS}\n", done.stderr
