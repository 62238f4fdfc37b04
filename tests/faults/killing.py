"""kill -9 and other blows at every system call that changes a file system."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.errors import BatonError

from . import children
from .children import Blow, Point
from .material import Case

KILL = "signal=KILL"


def places(case: Case, root: Path) -> list[Point]:
    """Every changing system call of a publish."""
    (root / "counted").mkdir()
    children.run(partial(case.prepare, root / "counted"), root / "output")
    publish = partial(case.publish, root / "counted", "new")
    return children.points(children.calls(publish, root / "output", root / "calls"))


def blows(case: Case, root: Path, how: str, every: int = 1) -> Iterator[Blow]:
    """Break a publish at every point, or every n-th; nothing may be there in part, the next process must recover."""
    for point in places(case, root)[::every]:
        place, output = root / "broken", root / "output"
        place.mkdir()
        output.unlink()
        children.run(partial(case.prepare, place), output)
        code = children.broken(partial(case.publish, place, "new"), output, point, how)
        problem = ""
        try:
            case.require_absent_or_complete(place, done=code == 0)
            if children.run(partial(case.require_recovery, place), output) != 0:
                problem = output.read_text(encoding="utf-8")
        except (AssertionError, BatonError) as error:
            problem = str(error)
        yield Blow(point, code, problem)
        shutil.rmtree(place)
