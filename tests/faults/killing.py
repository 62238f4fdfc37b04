"""kill -9 and other blows at every system call that changes a file system."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from . import children
from .children import Point
from .material import Case

KILL = "signal=KILL"


def places(case: Case, root: Path) -> list[Point]:
    """Every changing system call of a publish."""
    case.prepare(root / "counted")
    (root / "counted").mkdir(exist_ok=True)
    publish = partial(case.publish, root / "counted", "new")
    return children.points(children.calls(publish, root / "output", root / "calls"))


def blows(case: Case, root: Path, how: str, every: int = 1) -> Iterator[tuple[Point, int]]:
    """Break a publish at every point, or every n-th; require that nothing is there in part and that the next process
    recovers. Yields the point and the exit code."""
    for point in places(case, root)[::every]:
        place = root / "broken"
        place.mkdir()
        children.run(partial(case.prepare, place), root / "output")
        code = children.broken(partial(case.publish, place, "new"), root / "output", point, how)
        try:
            case.require_absent_or_complete(place, done=code == 0)
            assert children.run(partial(case.require_recovery, place), root / "output") == 0
        except Exception as error:
            said = (root / "output").read_text(encoding="utf-8")
            raise AssertionError(f"{case.name}, {how} at {point}: {error}\n{said}") from error
        yield point, code
        shutil.rmtree(place)
