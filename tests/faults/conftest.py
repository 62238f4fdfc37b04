"""Where things are broken: in memory, where syncing takes no time; the replay of power cuts shows what it is for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def root() -> Iterator[Path]:
    """An empty directory."""
    directory = Path(tempfile.mkdtemp(prefix="faults-", dir=MEMORY if MEMORY.is_dir() else None))
    yield directory
    shutil.rmtree(directory)
