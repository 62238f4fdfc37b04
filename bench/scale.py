"""Cost per token as the data grows: a fixed number of DPO steps, drawn from 1,000 to 30,000 generated pairs.

Every run is a process of its own with an empty token cache; the sizes take turns. Making the tokens is timed apart.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from bench import processes, shape
from bench.comparison import cache, count
from bench.data import write_pairs
from bench.job import Job

SIZES = (1_000, 3_000, 10_000, 30_000)
TOLERANCE = 0.15
PACKAGES = ("torch", "transformers", "peft")


def once(job: Job) -> None:
    """Make the tokens, then take the steps, which find them."""
    from bench.material import examples, without_weights
    from bench.ours import LastStepTakenError, Steps, stage_context
    from bench.watch import Watch
    from stages import dpo

    model = without_weights(job)
    began = time.perf_counter()
    drawn, _ = examples(job, model)
    prepared = time.perf_counter() - began
    watch = Watch(job)
    steps = Steps(job, watch)
    with suppress(LastStepTakenError):
        dpo.run(stage_context(job, "ours", progress=steps))
    size = job.examples_per_step
    tokens = [sum(tree.length for tree in drawn[start : start + size]) for start in range(0, len(drawn), size)]
    watch.report(steps.losses, prepared=prepared, tokens=tokens)


def make_base(found: str, words: str, stored: str, device: str) -> None:
    """Write a base with random weights."""
    from bench import base

    base.make(Path(found), Path(words), Path(stored), device, pretrained=False)
    processes.report()


def measure(chosen: argparse.Namespace, directory: Path) -> dict[int, list[dict[str, Any]]]:
    """Size -> runs."""
    found: dict[int, list[dict[str, Any]]] = {size: [] for size in chosen.sizes}
    jobs = {size: _job(chosen, directory / str(size)) for size in chosen.sizes}
    for size, job in jobs.items():
        job.directory.mkdir()
        write_pairs(job.directory / "rows.jsonl", size)
    _link_base(chosen, list(jobs.values()))
    for _ in range(chosen.repeats):
        for size, job in jobs.items():
            path = job.write(job.directory / "job.json")
            with tempfile.TemporaryDirectory() as tokens:
                environment = processes.quiet(chosen.threads) | {"BATON_CACHE": tokens}
                said = processes.run("bench.scale", "once", path, **environment).said
            found[size].append(said | _figures(said, chosen.warmup, size))
    return found


def page(
    found: dict[int, list[dict[str, Any]]], chosen: argparse.Namespace, command: str, machine: dict[str, Any]
) -> str:
    """The result in Markdown."""
    costs = {size: median(run["seconds_per_token"] for run in runs) for size, runs in found.items()}
    most = max(costs.values()) / min(costs.values()) - 1
    rows = [
        (
            f"{size:,}",
            processes.spread([1e6 * run["seconds_per_token"] for run in runs], 1),
            f"{costs[size] / costs[min(costs)]:.2f}",
            processes.spread([1e3 * run["prepared_per_pair"] for run in runs], 2),
            processes.spread([run["resident_mib"] for run in runs], 0),
        )
        for size, runs in found.items()
    ]
    headings = ["pairs", "microseconds per token", "of the smallest", "milliseconds per pair to make the tokens"]
    verdict = f"within {TOLERANCE:.0%}" if most <= TOLERANCE else f"not within {TOLERANCE:.0%}"
    return "\n\n".join(
        [
            "# Cost per token from few pairs to many",
            f"The dearest size costs {most:.1%} more for a token than the cheapest: {verdict}.",
            f"DPO of `{chosen.model}` with LoRA, {chosen.batch} pairs a step, {chosen.steps} steps after "
            f"{chosen.warmup} that are dropped, drawn from all pairs; median [least, most] of {chosen.repeats} runs, "
            "each a process of its own, the sizes taking turns. A token is one that the stage computes: a prompt "
            "counts once for both responses. Pairs are made-up words, 60 to 150 in a prompt and 80 to 196 in a "
            "response. Tokens are made once, before the steps, from an empty cache; the time for it includes reading "
            "and examining the rows.",
            processes.table([*headings, "MiB resident"], rows),
            f"    {command}",
            f"{chosen.threads} threads, {chosen.dtype}. {processes.sentence(machine)}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["once"]:
        once(Job.read(Path(given[1])))
        return
    if given[:1] == ["base"]:
        make_base(*given[1:])
        return
    chosen = _parser().parse_args(given)
    with cache(chosen.cache) as bases, tempfile.TemporaryDirectory() as directory:
        chosen.bases = bases
        found = measure(chosen, Path(directory))
    machine = processes.machine(*PACKAGES)
    command = shlex.join(["python", "-m", "bench.scale", *given])
    text = page(found, chosen, command, machine)
    sys.stdout.write(text + "\n")
    record = {"command": command, "options": processes.options(chosen), "machine": machine, "runs": found}
    processes.save("scale", record, text, chosen.output)


def _link_base(chosen: argparse.Namespace, jobs: list[Job]) -> None:
    """One base for all sizes, whose tokenizer is trained on the fewest pairs."""
    found, words = shape.find(chosen.model), jobs[0].directory / "rows.jsonl"
    stored = shape.place(chosen.bases, found, words, pretrained=False)
    if not stored.is_dir():
        environment = processes.quiet(chosen.threads)
        processes.run("bench.scale", "base", found, words, stored, chosen.device, **environment)
    for job in jobs:
        job.base.symlink_to(stored.resolve(), target_is_directory=True)


def _job(chosen: argparse.Namespace, directory: Path) -> Job:
    return Job(
        kind="dpo",
        material=str(directory),
        data=str(directory / "rows.jsonl"),
        steps=chosen.warmup + chosen.steps,
        examples_per_step=chosen.batch,
        max_length=2048,
        learning_rate=1e-4,
        device=chosen.device,
        dtype=chosen.dtype,
    )


def _figures(said: dict[str, Any], warmup: int, size: int) -> dict[str, float]:
    seconds = said["ends"][-1] - said["ends"][warmup - 1]
    return {
        "seconds_per_token": seconds / sum(said["tokens"][warmup:]),
        "prepared_per_pair": said["prepared"] / size,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    option = parser.add_argument
    option("--sizes", type=count, nargs="+", default=list(SIZES), help="numbers of pairs")
    option("--device", choices=("cpu", "cuda"), default="cpu")
    option("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    option("--model", default="llama-14m", help="a name in bench/models, or a file of the same layout")
    option("--repeats", type=count, default=5)
    option("--steps", type=count, default=10)
    option("--warmup", type=count, default=2)
    option("--batch", type=count, default=8)
    option("--threads", type=count, default=len(os.sched_getaffinity(0)))
    option("--cache", type=Path, help="where to keep the base (default: nowhere)")
    option("--output", type=Path, default=processes.RESULTS, help="where to write the results")
    return parser


if __name__ == "__main__":
    main()
