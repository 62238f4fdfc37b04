"""Full and read-only disks: real ones, in memory and in a namespace of their own, mounted by `python -m faults.disks`.

For sizes from next to nothing to enough, a stage is published on a disk of that size; then, on a larger one with what
was left, the next process publishes it. On disks that cannot be written a whole run is tried.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from . import children, material, runs

KIB = 1 << 10
LARGE = 64 << 10
"""KiB that are enough for everything."""


def why_not() -> str:
    """Why no disks can be mounted here; empty where they can."""
    if not shutil.which("unshare"):
        return "unshare is not installed"
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"no file system can be mounted: {tried.stderr.strip()}" if tried.returncode else ""


def tried(root: Path, sizes: list[int]) -> dict[str, Any]:
    """What happened on disks of so many KiB, and on those that cannot be written.

    Returns:
        `full`: for every size, the exit code, whether the stage was absent or complete, whether the message had the
        bytes that were free, and the exit code of the next process. `read_only`: exit code and message of a run.
    """
    here = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(here), str(here.parent)])
    command = ["unshare", "-rm", sys.executable, "-m", "faults.disks", str(root), *map(str, sizes)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _full(root: Path, size: int) -> dict[str, Any]:
    place, output = root / "disk", root / f"output-{size}"
    _mount(place, f"size={size}k")
    case = material.CASES[0]
    code = children.run(partial(case.publish, place, "new"), output)
    whole = children.run(partial(_require, case, place, code == 0), output) == 0
    _mount(place, f"remount,size={LARGE}k")
    after = children.run(partial(case.require_recovery, place), output)
    _unmount(place)
    return {"size": size, "code": code, "whole": whole, "after": after, "said": output.read_text(encoding="utf-8")}


def _require(case: material.Case, place: Path, done: bool) -> None:
    case.require_absent_or_complete(place, done=done)


def _read_only(root: Path) -> dict[str, Any]:
    place, output = root / "disk", root / "output-read-only"
    _mount(place, f"size={LARGE}k")
    runs.write_configuration(place)
    _mount(place, "remount,ro")
    code = children.run(partial(runs.run, place), output)
    _unmount(place)
    return {"code": code, "said": output.read_text(encoding="utf-8")}


def _mount(place: Path, options: str) -> None:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], check=True)


def _unmount(place: Path) -> None:
    subprocess.run(["umount", place], check=True)


def main(root: Path, sizes: list[int]) -> None:
    """Try and print as JSON."""
    found = {"full": [_full(root, size) for size in sizes], "read_only": _read_only(root)}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(map(int, sys.argv[2:])))
