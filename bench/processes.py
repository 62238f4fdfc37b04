"""Time and memory of a function in a process of its own, and the machine that it ran on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from bench import shape

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measured:
    """One process."""

    seconds: float
    """Wall time from its start to its end, imports included."""
    processor_seconds: float
    """Time that processors spent on it, which other work on the machine changes little."""
    peak_mib: float
    """Most memory it had resident."""
    said: dict[str, Any]
    """What it reported itself."""


def run(module: str, *arguments: str | Path, **environment: str) -> Measured:
    """Run `python -m MODULE ARGUMENTS`, which ends with `report`."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - began
    said = json.loads(done.stdout.splitlines()[-1])
    return Measured(seconds, said.pop("processor_seconds"), said.pop("peak_mib"), said)


def quiet(threads: int) -> dict[str, str]:
    """The environment of a process that is measured: so many threads, no network, and nothing said on the way."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }


def fresh(directory: Path, threads: int, module: str, *arguments: str | Path, **environment: str) -> dict[str, Any]:
    """What a quiet process reports that finds no tokens of another; its caches are in `directory` meanwhile."""
    with tempfile.TemporaryDirectory(prefix="caches-", dir=directory, ignore_cleanup_errors=True) as caches:
        empty = {"HF_DATASETS_CACHE": f"{caches}/datasets", "BATON_CACHE": f"{caches}/baton"}
        return run(module, *arguments, **{**quiet(threads), **empty, **environment}).said


def baton(*arguments: str | Path, **environment: str) -> float:
    """Wall seconds of `baton ARGUMENTS` in a process of its own, imports included."""
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *map(str, arguments)]
    began = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def stage_manifests(output: Path) -> dict[str, dict[str, Any]]:
    """Stage -> manifest, of a finished run, in the order in which the stages began."""
    read = [json.loads(path.read_text(encoding="utf-8")) for path in output.glob("stages/*/manifest.json")]
    return {manifest["stage"]: manifest for manifest in sorted(read, key=lambda manifest: manifest["started"])}


def report(**figures: Any) -> None:
    """Print what the calling process has found, and what it took until now."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    taken = {"processor_seconds": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}
    sys.stdout.write(json.dumps({**figures, **taken}) + "\n")


def resident_mib() -> float:
    """Most memory that the calling process has had resident until now, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status does not say the peak of resident memory")


def machine(*packages: str) -> dict[str, Any]:
    """What figures depend on: processor, cores, memory, and the versions of packages."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
    }


def options(chosen: argparse.Namespace) -> dict[str, str]:
    """What the command line chose, as text; of a path its name alone, and nothing of where bases are kept and results
    are put, since that means nothing elsewhere."""
    named = {key: value for key, value in vars(chosen).items() if key not in ("cache", "output")}
    if "model" in named:
        named["model"] = shape.label(named["model"])
    return {key: value.name if isinstance(value, Path) else str(value) for key, value in named.items()}


def command(name: str, arguments: Sequence[str]) -> str:
    """The command line of a benchmark, without the folders of this machine."""
    return shlex.join(
        ["python", "-m", f"bench.{name}", *(Path(word).name if word[:1] == "/" else word for word in arguments)]
    )


def spread(values: Sequence[float], decimals: int = 1) -> str:
    """The median and the range of repeated measurements."""
    low, middle, high = (f"{value:,.{decimals}f}" for value in (min(values), median(values), max(values)))
    return f"{middle} [{low}, {high}]"


def sentence(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['system']}; "
        f"Python {machine['python']}; {versions}."
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def save(name: str, record: dict[str, Any], text: str, directory: Path = RESULTS) -> None:
    """Write `NAME.json` and `NAME.md`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (directory / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
