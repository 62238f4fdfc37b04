"""After a power cut at any moment a stage or checkpoint is absent or complete, and what was done is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import children, power
from .material import CASES, Case

pytestmark = pytest.mark.skipif(bool(children.MISSING), reason=children.MISSING)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_power_cut_at_any_moment_leaves_it_absent_or_complete(case: Case, root: Path) -> None:
    found = list(power.problems(case, root, recover=False))
    assert len(found) > 100
    assert [each for each in found if each] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_publish_that_synced_nothing_would_be_found_out(case: Case, root: Path) -> None:
    disk, made = power.record(case, root)
    assert power.damaged_without(case, root, disk, made, frozenset(power.syncs(made))) > 0


def test_what_was_not_synced_may_be_there_in_any_part(root: Path) -> None:
    disk = power.Disk(root)
    for line in [
        ("mkdir", f'"{root}/a", 0777', 0),
        ("openat", f'AT_FDCWD, "{root}/a/x", O_WRONLY|O_CREAT, 0666', 3),
        ("write", f'3<{root}/a/x>, "12\\n4", 4', 4),
    ]:
        disk.apply(children.Call(*line))
    found = {frozenset(tree.items()) for tree in disk.states()}
    contents = [b"", bytes(4), b"12", b"12\n4"]
    whole = [{("a", None), ("a/x", content)} for content in contents]
    assert found == {frozenset(each) for each in [set(), {("a", None)}, *whole]}
    disk.apply(children.Call("fsync", f"3<{root}/a/x>", 0))
    contents_found = {dict(tree).get("a/x") for tree in map(dict, disk.states())}
    assert contents_found == {None, b"12\n4"}
