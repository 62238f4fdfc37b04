"""Free memory on made-up systems: the machine's, control groups of both versions, and limits of the process."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from pipeline import available

KIB = 1024
MIB = 1024 * KIB


def system(root: Path, files: dict[str, str]) -> Path:
    """Files below a directory that stands for the system's root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {
    "proc/meminfo": "MemTotal:  8000 kB\nMemFree:  1000 kB\nMemAvailable:  6000 kB\n",
    "proc/self/status": "Name:\tpython\nVmSize:\t 3000 kB\nVmRSS:\t 1000 kB\nVmData:\t 2000 kB\n",
}


def group(limit: object, used: int, **statistics: int) -> dict[str, str]:
    """A control group's own files, of version 2."""
    lines = "".join(f"{name} {size}\n" for name, size in statistics.items())
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": lines}


def at(place: str, files: dict[str, str]) -> dict[str, str]:
    return {f"sys/fs/cgroup/{place}{name}": text for name, text in files.items()}


def test_what_the_machine_has_available(tmp_path: Path) -> None:
    assert available.memory(root=system(tmp_path, MACHINE)) == 6000 * KIB
    assert available.resident(tmp_path) == 1000 * KIB


def test_nothing_is_known_without_proc(tmp_path: Path) -> None:
    assert available.memory(root=tmp_path) is None
    assert available.resident(tmp_path) is None
    assert available.memory(10**9, tmp_path) == 10**9


def test_a_limit_is_for_all_of_the_process(tmp_path: Path) -> None:
    system(tmp_path, MACHINE)
    assert available.memory(3000 * KIB, tmp_path) == 2000 * KIB
    assert available.memory(500 * KIB, tmp_path) == 0
    assert available.memory(10**12, tmp_path) == 6000 * KIB


def test_a_control_group_s_file_cache_is_free(tmp_path: Path) -> None:
    own = at("user/job/", group(4 * MIB, 3 * MIB, anon=MIB, active_file=MIB // 2, inactive_file=MIB))
    system(tmp_path, MACHINE | {"proc/self/cgroup": "0::/user/job\n"} | own)
    assert available.memory(root=tmp_path) == 2.5 * MIB


def test_groups_above_limit_too(tmp_path: Path) -> None:
    groups = at("user/job/", group("max", 10)) | at("user/", group(2 * MIB, MIB)) | at("", {"memory.stat": ""})
    system(tmp_path, MACHINE | {"proc/self/cgroup": "0::/user/job\n"} | groups)
    assert available.memory(root=tmp_path) == MIB


def test_in_a_container_the_own_group_is_the_top(tmp_path: Path) -> None:
    system(tmp_path, MACHINE | {"proc/self/cgroup": "0::/not/here\n"} | at("", group(3 * MIB, 2 * MIB)))
    assert available.memory(root=tmp_path) == MIB


def test_groups_of_version_1(tmp_path: Path) -> None:
    files = {
        "memory.limit_in_bytes": str(5 * MIB),
        "memory.usage_in_bytes": str(4 * MIB),
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {MIB}\ntotal_active_file {MIB}\n",
    }
    groups = "12:cpu,cpuacct:/job\n5:memory:/job\n1:name=systemd:/job\n"
    system(tmp_path, MACHINE | {"proc/self/cgroup": groups} | at("memory/job/", files))
    assert available.memory(root=tmp_path) == 3 * MIB
    (tmp_path / "sys/fs/cgroup/memory/job/memory.limit_in_bytes").write_text("9223372036854771712")
    assert available.memory(root=tmp_path) == 6000 * KIB


@pytest.mark.parametrize(
    ("limit", "bytes_left"), [(resource.RLIMIT_AS, 1000 * KIB), (resource.RLIMIT_DATA, 2000 * KIB)]
)
def test_limits_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, bytes_left: int) -> None:
    def limits(asked: int) -> tuple[int, int]:
        return (4000 * KIB if asked == limit else resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    monkeypatch.setattr(resource, "getrlimit", limits)
    assert available.memory(root=system(tmp_path, MACHINE)) == bytes_left


def test_this_very_process() -> None:
    free = available.memory()
    assert free is None or free > 10**6
