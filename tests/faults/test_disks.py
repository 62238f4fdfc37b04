"""On full and read-only disks nothing is published in part, the message says why, and the next run recovers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from . import children, disks, killing
from .material import CASES, Case

UNMOUNTABLE = disks.why_not()


@pytest.mark.skipif(bool(UNMOUNTABLE), reason=UNMOUNTABLE)
def test_a_disk_that_is_full_or_read_only_is_named_and_nothing_is_there_in_part(root: Path) -> None:
    found = disks.tried(root, [*range(4, 64, 8), disks.LARGE])
    codes = [each["code"] for each in found["full"]]
    assert set(codes) == {0, 6}
    assert codes == sorted(codes, reverse=True)
    for each in found["full"]:
        assert each["whole"], each
        assert each["after"] == 0, each
        if each["code"]:
            assert re.search(r"no space left: [\d,]+ bytes free", each["said"]), each
    assert found["read_only"]["code"] == 6
    assert f"{root}/disk/run: cannot be the run directory: Read-only file system" in found["read_only"]["said"]


@pytest.mark.skipif(bool(children.MISSING), reason=children.MISSING)
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=lambda case: case.name)
def test_a_call_that_fails_leaves_it_absent_or_complete(case: Case, error: str, root: Path) -> None:
    """What fails and does not matter, as removing what is no longer needed, may pass."""
    found = list(killing.blows(case, root, f"error={error}", every=5))
    codes = [blow.code for blow in found]
    assert [blow for blow in found if blow.problem or blow.code not in (0, 6)] == []
    assert codes.count(6) > len(codes) / 2
