"""All comparisons that one GPU is needed for, within a limited time.

`python -m bench.gpu --minutes 8 --cache bases --out results` runs SFT, DPO, reward and PPO beside TRL on a model of
half a billion parameters, PPO alone on one of eight billion, in bfloat16 and in 4 bits, and RLOO beside TRL. Each
measurement is the command of another benchmark, in a process group of its own, with a time budget. One that does not
fit the time left is skipped; one that fails or exceeds twice its budget is recorded with its error. `gpu.json` and
`gpu.md` are written after every measurement, and each measurement's own page lies in a folder of its name.

`--device cpu` runs the same measurements at sizes that only show that they run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import page, ppo, ppo_page, processes, shape
from bench.comparison import PACKAGES, PAIRS, cache, count

OVERRUN = 2.0
"""A measurement is stopped when it has taken this many times its budget."""
MODELS = {"cuda": ("llama-0.5b", "llama-8b"), "cpu": ("llama-12m", "llama-12m")}
"""The model of the comparisons, and that of PPO alone."""
SIZES: dict[str, dict[str, str]] = {
    "cuda": {
        "all": "--device cuda --dtype bfloat16 --repeats 1",
        "trainer": "--steps 10 --warmup 3 --batch 16 --learning-steps 0",
        "ppo": "--epochs 1 --steps 3 --warmup 1 --responses 64 --micro-batch 16",
        "large": "--epochs 1 --steps 2 --warmup 1 --responses 32 --micro-batch 8",
    },
    "cpu": {
        "all": "--device cpu --dtype float32 --repeats 1",
        "trainer": "--steps 1 --warmup 1 --batch 2 --length 256 --learning-steps 0",
        "ppo": "--epochs 1 --steps 1 --warmup 1 --responses 4 --micro-batch 4 --new-tokens 8",
        "large": "--epochs 1 --steps 1 --warmup 1 --responses 4 --micro-batch 4 --new-tokens 8",
    },
}
REWARD_MODEL = ("--reward-steps", "4", "--reward-rows", "16")
"""Weights are random: more steps would not make a better one."""
BUDGETS: dict[str, dict[str, float]] = {
    "cuda": {"trainer": 55, "ppo": 85, "large": 110},
    "cpu": {"trainer": 40, "ppo": 50, "large": 40},
}
"""Seconds that a measurement should take, its base included."""
PEER_WAYS = {
    "cuda": {"sft": "bfd-bfloat16", "trainer": "padding-bfloat16", "ppo": "lora-bfloat16", "rloo": "bfloat16"},
    "cpu": {"sft": "padding-float32", "trainer": "padding-float32", "ppo": "lora-float32", "rloo": "float32"},
}
"""The way in which the peer computes: trying all of them would take longer than the measurements."""
ALONE = ("--only", "ours")
ERROR = re.compile(r"^(\w+\.)*\w*(Error|Exception)\b.*", re.MULTILINE)


@dataclass(frozen=True)
class Measurement:
    """One command of another benchmark."""

    name: str
    bench: str
    arguments: tuple[str, ...]
    budget: float
    """Seconds that it should take."""
    note: str = ""

    def alone(self, reason: str) -> Measurement:
        """The same without the peer."""
        return dataclasses.replace(
            self,
            name=f"{self.name}-alone",
            arguments=(*self.arguments, *ALONE),
            budget=self.budget / 2,
            note=f"without the peer: {reason}",
        )


@dataclass(frozen=True)
class Outcome:
    """What came of a measurement."""

    name: str
    state: str
    """`measured`, `failed`, `skipped` or `not begun`."""
    text: str = ""
    """The figures in short, the error, or why it was skipped."""
    command: str = ""
    seconds: float = 0.0


Run = Callable[[Measurement, float], Outcome]
"""Runs a measurement for so many seconds at most."""


def plan(device: str, model: str, large: str, *, old_trl: bool, pace: float = 1.0) -> list[Measurement]:
    """The measurements in the order of their importance.

    Args:
        device: `cuda` or `cpu`, which decides sizes and budgets.
        model: Of the comparisons.
        large: Of PPO alone.
        old_trl: Whether the release of TRL is there whose PPO is compared.
        pace: A factor of all budgets.
    """
    sizes, budgets, ways = SIZES[device], BUDGETS[device], PEER_WAYS[device]

    def measurement(name: str, bench: str, size: str, model: str, *extra: str) -> Measurement:
        arguments = (*sizes["all"].split(), *sizes[size].split(), "--model", model, *extra)
        arguments += REWARD_MODEL if bench == "ppo" else ()
        return Measurement(name, bench, arguments, pace * budgets[size])

    compared = measurement("ppo", "ppo", "ppo", model, "--variant", ways["ppo"])
    if not old_trl:
        compared = compared.alone(f"TRL {ppo.TRL} is not in the cache and could not be fetched")
    return [
        measurement("sft", "sft", "trainer", model, "--variant", ways["sft"]),
        measurement("dpo", "dpo", "trainer", model, "--variant", ways["trainer"]),
        measurement("reward", "reward", "trainer", model, "--variant", ways["trainer"]),
        compared,
        measurement("ppo-large", "ppo", "large", large, *ALONE),
        measurement("ppo-large-4bit", "ppo", "large", large, *ALONE, "--quantization", "4bit"),
        measurement("rloo", "ppo", "ppo", model, "--method", "rloo", "--samples", "4", "--variant", ways["rloo"]),
    ]


def take(
    measurements: Sequence[Measurement],
    seconds: float,
    run: Run,
    save: Callable[[Sequence[Outcome]], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run what fits the time, and save all outcomes after each.

    A comparison that fails is tried again without the peer, after all others.
    """
    deadline = clock() + seconds
    outcomes: list[Outcome] = []
    waiting = deque(measurements)
    while waiting:
        current = waiting.popleft()
        left = deadline - clock()
        if current.budget > left:
            outcome = Outcome(current.name, "skipped", f"takes about {current.budget:.0f} s, {max(left, 0):.0f} s left")
        else:
            outcome = run(current, min(left, OVERRUN * current.budget))
            if outcome.state == "failed" and ALONE[0] not in current.arguments:
                waiting.append(current.alone("the comparison failed"))
        if current.note:
            outcome = dataclasses.replace(outcome, text=f"{outcome.text} ({current.note})")
        outcomes.append(outcome)
        save([*outcomes, *(Outcome(later.name, "not begun") for later in waiting)])
    return outcomes


def run_process(measurement: Measurement, limit: float, common: Sequence[str], out: Path) -> Outcome:
    """Run a benchmark in a process group, which is ended with all its processes after `limit` seconds."""
    folder = out / measurement.name
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [*measurement.arguments, *common]
    command = [sys.executable, "-m", f"bench.{measurement.bench}", *arguments, "--output", str(folder)]
    began = time.monotonic()
    with (folder / "log.txt").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=processes.REPOSITORY, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
        try:
            status = process.wait(limit)
            error = "" if status == 0 else _error(log)
        except subprocess.TimeoutExpired:
            error = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(
        name=measurement.name,
        state="failed" if error else "measured",
        text=error or _figures(folder),
        command=processes.command(measurement.bench, arguments),
        seconds=time.monotonic() - began,
    )


def headline(record: Mapping[str, Any]) -> str:
    """The ratios of a comparison, or the figures of Baton's side alone."""
    if record["kind"] != "ppo":
        runs = record["runs"]
        if len(runs) == 2:
            return page.summary(record).split("**")[1]
        return f"{runs['ours'][0]['tokens_per_second']:,.0f} tokens per second, {_memory(runs['ours'][0])}"
    if len(record["sides"]) == 2:
        return ppo_page.summary(record).split("**")[1]
    run = next(iter(record["runs"].values()))["ours"][0]
    return f"{run['seconds']:.2f} s per iteration, {_memory(run)}"


def write(outcomes: Sequence[Outcome], record: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    rows = [
        (outcome.name, outcome.state, outcome.text, f"{outcome.seconds:.0f}" if outcome.command else "")
        for outcome in outcomes
    ]
    commands = [f"    {outcome.command}" for outcome in outcomes if outcome.command]
    parts = [
        "# gpu: Baton beside TRL within a limited time",
        f"`{record['model']}` beside TRL, `{record['large']}` alone, within {record['minutes']:g} minutes in all. Each "
        "measurement's own page is in the folder of its name; ratios are those of single runs.",
        processes.table(["measurement", "state", "figures", "seconds"], rows),
        "\n".join(["The commands of the measurements:", "", *commands]) if commands else "",
        "To repeat it:",
        f"    {record['command']}",
        processes.sentence(record["machine"]),
    ]
    return "\n\n".join(part for part in parts if part)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what fits the time, and save after each measurement."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    began = time.monotonic()
    options = _parser().parse_args(argv)
    model, large = (
        name or default for name, default in zip((options.model, options.large), MODELS[options.device], strict=True)
    )
    for name in (model, large):
        shape.find(name)
    record = {
        "command": processes.command("gpu", argv),
        "model": shape.label(model),
        "large": shape.label(large),
        "minutes": options.minutes,
        "machine": processes.machine(*PACKAGES),
    }

    def save(outcomes: Sequence[Outcome]) -> None:
        listed = {"measurements": [dataclasses.asdict(outcome) for outcome in outcomes]}
        processes.save("gpu", record | listed, write(outcomes, record), options.out)
        sys.stderr.write(f"{_last(outcomes)}\n")

    with cache(options.cache) as bases:
        common = ["--cache", str(bases.resolve()), "--data", str(options.data.resolve())]
        common += ["--threads", str(options.threads)]
        measurements = plan(options.device, model, large, old_trl=_has_old_trl(bases), pace=options.pace)
        if options.measure:
            measurements = [one for one in measurements if one.name.removesuffix("-alone") in options.measure]
        left = options.minutes * 60 - (time.monotonic() - began)
        out = options.out.resolve()
        outcomes = take(
            measurements, left, lambda measurement, limit: run_process(measurement, limit, common, out), save
        )
    sys.stdout.write(write(outcomes, record) + "\n")


def _has_old_trl(bases: Path) -> bool:
    try:
        ppo.install(bases)
    except SystemExit:
        return False
    return True


def _figures(folder: Path) -> str:
    result = max(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)  # others are of earlier commands
    return headline(json.loads(result.read_text(encoding="utf-8")))


def _memory(run: Mapping[str, Any]) -> str:
    if "device_mib" in run:
        return f"{run['device_mib']:,.0f} MiB on the device"
    return f"{run['resident_mib'] - run['imports_mib']:,.0f} MiB above imports"


def _error(log: Any) -> str:
    """The first error that a log names: those that follow are of processes that waited for the one that failed."""
    log.seek(0)
    text = log.read()
    match = ERROR.search(text)
    lines = text.split("\n") if match is None else [match[0]]
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "ended without a message")


def _last(outcomes: Sequence[Outcome]) -> str:
    latest = [outcome for outcome in outcomes if outcome.state != "not begun"][-1]
    return f"{latest.name}: {latest.state}, {latest.text}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [measurement.name for measurement in plan("cpu", "", "", old_trl=True)]
    option = parser.add_argument
    option("--minutes", type=float, default=8.0, help="for all measurements (default: %(default)s)")
    option("--device", choices=tuple(SIZES), default="cuda", help="the sizes follow from it (default: %(default)s)")
    option("--model", help="of the comparisons (default: llama-0.5b; on the processor llama-12m)")
    option("--large", help="of PPO alone (default: llama-8b; on the processor llama-12m)")
    option("--measure", nargs="+", choices=names, metavar="NAME", help=f"only these: {', '.join(names)}")
    option("--pace", type=float, default=1.0, help="a factor of all time budgets, more on a slow or busy machine")
    option("--threads", type=count, default=len(os.sched_getaffinity(0)), help="(default: all cores)")
    option("--data", type=Path, default=PAIRS, help="preference pairs in any layout (default: hh-rlhf in BATON_DATA)")
    option("--cache", type=Path, help=f"where bases are kept and TRL {ppo.TRL} lies (default: nowhere)")
    option("--out", type=Path, default=processes.RESULTS / "gpu", help="where to write the results")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as on Ctrl-C, what was started is ended
    main()
