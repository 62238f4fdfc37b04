"""The memory that this process may still take on the host: the least of what is available, and what its limits leave.

A control group's usage contains the cache of files, which the kernel gives up when memory is asked for. Limits of all
groups above the process's count too. On systems without `/proc` nothing is known.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 1 << 60
"""Limits from here on are none."""
_VERSION_2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
_LIMITS = {resource.RLIMIT_AS: "VmSize", resource.RLIMIT_DATA: "VmData"}
"""Limit of the process -> what it limits, as `/proc/self/status` calls it."""


def memory(limit: int | None = None, root: Path = Path("/")) -> int | None:
    """Bytes that can still be had; None where nothing is known.

    Args:
        limit: The most that the process shall have in all.
        root: Where `proc` and `sys` are.
    """
    found = [*_on_the_machine(root), *_in_groups(root), *_of_the_process(root)]
    if limit is not None:
        found.append(limit - (resident(root) or 0))
    return max(0, min(found)) if found else None


def resident(root: Path = Path("/")) -> int | None:
    """Bytes that the process has now; None where it is not known."""
    return _table(root / "proc/self/status").get("VmRSS")


def _on_the_machine(root: Path) -> Iterator[int]:
    table = _table(root / "proc/meminfo")
    if "MemAvailable" in table:
        yield table["MemAvailable"]


def _of_the_process(root: Path) -> Iterator[int]:
    table = _table(root / "proc/self/status")
    for limit, name in _LIMITS.items():
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and name in table:
            yield soft - table[name]


def _in_groups(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, names = root / "sys/fs/cgroup", _VERSION_2
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", _VERSION_1
        else:
            continue
        group = top / path.lstrip("/")
        for each in (group, *group.parents):  # in a container, its own group is the top
            if each.is_relative_to(top):
                yield from _left(each, *names)


def _left(group: Path, limit: str, usage: str, reclaimable: tuple[str, ...]) -> Iterator[int]:
    most, used = _number(group / limit), _number(group / usage)
    if most is None or used is None or most >= UNLIMITED:
        return
    statistics = dict(line.split() for line in _lines(group / "memory.stat") if len(line.split()) == 2)
    yield most - max(0, used - sum(int(statistics.get(name, 0)) for name in reclaimable))


def _number(path: Path) -> int | None:
    text = " ".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _table(path: Path) -> dict[str, int]:
    """Name -> bytes, of lines such as `VmRSS: 12 kB`."""
    rows = (line.split(":", 1) for line in _lines(path) if line.endswith("kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in rows}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
