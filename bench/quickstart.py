"""The quickstart against the clock: all stages of `configs/quickstart.yaml`, from nothing.

Every run is a process of its own, writes into a new directory and finds an empty token cache.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import processes
from bench.comparison import count

CONFIG = processes.REPOSITORY / "configs" / "quickstart.yaml"
PACKAGES = ("torch", "transformers", "peft")


def once(config: Path, threads: int, overrides: list[str]) -> dict[str, Any]:
    """Wall seconds of the run, and those of its stages as their manifests have them."""
    with tempfile.TemporaryDirectory() as directory:
        output, cache = Path(directory) / "run", str(Path(directory) / "cache")
        environment = processes.quiet(threads) | {"BATON_CACHE": cache}
        seconds = processes.baton("run", config, f"output={output}", *overrides, **environment)
        manifests = processes.stage_manifests(output)
    return {"seconds": seconds, "stages": {name: each["cost"]["seconds"] for name, each in manifests.items()}}


def page(config: Path, runs: list[dict[str, Any]], command: str, threads: int, machine: dict[str, Any]) -> str:
    """The result in Markdown."""
    rows = [[name, processes.spread([run["stages"][name] for run in runs])] for name in runs[0]["stages"]]
    rows.append(["the whole run", processes.spread([run["seconds"] for run in runs])])
    return "\n\n".join(
        [
            "# The quickstart",
            f"Wall seconds of `baton run {config.name}`: median [least, most] of {len(runs)} runs, each a "
            "process of its own with an empty token cache. Seconds of a stage are those in its manifest; what is left "
            "of the whole is imports, hashing, publishing and the report.",
            processes.table(["", "seconds"], rows),
            f"    {command}",
            f"{threads} threads. {processes.sentence(machine)}",
        ]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quickstart", description=__doc__)
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--threads", type=count, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--config", type=Path, default=CONFIG, help="another configuration")
    parser.add_argument("--output", type=Path, default=processes.RESULTS, help="where to write the results")
    parser.add_argument("overrides", nargs="*", help="settings of the run, as `baton run` takes them")
    chosen = parser.parse_args()
    runs = [once(chosen.config.resolve(), chosen.threads, chosen.overrides) for _ in range(chosen.repeats)]
    machine = processes.machine(*PACKAGES)
    command = shlex.join(["python", "-m", "bench.quickstart", *sys.argv[1:]])
    text = page(chosen.config, runs, command, chosen.threads, machine)
    sys.stdout.write(text + "\n")
    record = {"command": command, "threads": chosen.threads, "machine": machine, "runs": runs}
    processes.save("quickstart", record, text, chosen.output)


if __name__ == "__main__":
    main()
