"""PPO: Baton's stage beside PPOTrainer of TRL 1.12, the last release that has one, on prompts of hh-rlhf.

That release is put into a folder of its own by pip, and comes before the installed one in the peer's processes alone;
all else is the environment's. Every run is a process of its own; the sides take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from bench import ppo_page, processes, shape
from bench.comparison import (
    DTYPES,
    MODEL_HELP,
    PACKAGES,
    PAIRS,
    PRECISION_HELP,
    SIDES,
    cache,
    count,
    nested,
    precision,
)
from bench.job import Job

TRL = "1.12.0"
VARIANTS = {
    "ppo": ("lora-bfloat16", "lora-float32", "full-float32"),
    "rloo": ("bfloat16", "float32"),
}
"""The peer's ways, as `bench.ppo_peer` and `bench.rloo_peer` name them."""
FIXED = (
    "policy",
    "reward",
    "data",
    "steps",
    "evaluate_every",
    "evaluate_rows",
    "evaluate_samples",
    "examples_per_step",
    "samples_per_prompt",
    "update_epochs",
    "advantage",
    "max_length",
    "max_new_tokens",
    "tokens_per_batch",
    "missing_eos_penalty",
    "optimizer",
)
"""Settings of Baton's stage that are no choice: the same on both sides, or options of their own."""
OTHER_WORK = "full"
"""A way that trains more than Baton does: tried, but not what Baton is compared with."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = _parser().parse_args(given)
    if not chosen.data.is_file():
        raise SystemExit(f"no {chosen.data}: set BATON_DATA to the folder with hh-rlhf, or give --data")
    _require_groups(chosen)
    _require_free(chosen.set)
    if chosen.quantization != "none" and chosen.only != "ours":
        raise SystemExit(f"--quantization {chosen.quantization}: the peers cannot take such a base, add --only ours")
    chosen.dtype = precision(chosen)
    with cache(chosen.cache) as kept, tempfile.TemporaryDirectory(dir=kept) as directory:
        record = Comparison(chosen, kept, Path(directory)).record()
    record["command"] = processes.command("ppo", given)
    text = ppo_page.write(record)
    sys.stdout.write(text + "\n")
    processes.save(_name(chosen), record, text, chosen.output)


class Comparison:
    """All runs of the comparison, and what they need.

    Args:
        chosen: What the command line says.
        kept: Where bases and the old TRL are, or are put.
        directory: For the material, and for what the runs write.
    """

    def __init__(self, chosen: argparse.Namespace, kept: Path, directory: Path) -> None:
        self._chosen, self._kept, self._directory = chosen, kept, directory
        self._sides = [chosen.only] if chosen.only else list(SIDES)

    def record(self) -> dict[str, Any]:
        """Run everything; returns all that was found."""
        chosen, material = self._chosen, self._material
        tried = self._tried() if "peer" in self._sides else {}
        variant = _fastest(tried)
        runs = {epochs: self._in_turn(epochs, variant) for epochs in chosen.epochs}
        first = next(iter(runs.values()))[self._sides[0]][0]
        return {
            "kind": "ppo",
            "options": processes.options(chosen),
            "machine": processes.machine(*PACKAGES),
            "device": first["device"],
            "trl": TRL if chosen.method == "ppo" else processes.machine("trl")["packages"]["trl"],
            "counts": {"prompts": chosen.responses // chosen.samples, "responses": chosen.responses},
            "sides": self._sides,
            "material": material,
            "tried": tried,
            "variant": variant,
            "runs": runs,
        }

    def _in_turn(self, epochs: int, variant: str) -> dict[str, list[dict[str, Any]]]:
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in self._sides}
        for _ in range(self._chosen.repeats):
            for side in self._sides:
                runs[side].append(self._measured(side, self._job(epochs, self._chosen.steps, variant)))
        return runs

    @cached_property
    def _material(self) -> dict[str, Any]:
        """What the runs are given; made when it is first asked for."""
        model = shape.find(self._chosen.model)
        base = shape.place(self._kept, model, self._chosen.data, pretrained=True)
        longest = self._stored(self._job(1, self._chosen.steps))
        said: dict[str, Any] = processes.fresh(
            self._directory, self._chosen.threads, "bench.ppo_material", longest, model, base, *self._sides
        )
        return said

    @cached_property
    def _peer(self) -> tuple[str, dict[str, str]]:
        """The peer's module, and the environment that it needs."""
        if self._chosen.method == "rloo":
            return "bench.rloo_peer", {}
        packages = [install(self._kept), os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(str(each) for each in packages if each)
        return "bench.ppo_peer", {"PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"}

    def _job(self, epochs: int, steps: int, variant: str = "") -> Job:
        """So many iterations after the warm-up."""
        chosen = self._chosen
        length = chosen.prompt + chosen.new_tokens
        settings = {
            "update_epochs": epochs,
            "max_new_tokens": chosen.new_tokens,
            "tokens_per_batch": chosen.micro_batch * length,
        }
        if chosen.method == "rloo":
            settings |= {"advantage": "rloo", "samples_per_prompt": chosen.samples}
        settings |= nested(chosen.set)
        return Job(
            kind="ppo",
            material=str(self._directory),
            data=str(chosen.data),
            steps=chosen.warmup + steps,
            examples_per_step=chosen.responses // chosen.samples,
            max_length=length,
            learning_rate=chosen.learning_rate,
            device=chosen.device,
            dtype=chosen.dtype,
            quantization=chosen.quantization,
            reward_steps=chosen.reward_steps,
            reward_rows=chosen.reward_rows,
            settings=settings,
            variant=variant,
        )

    def _tried(self) -> dict[str, dict[str, Any]]:
        """Each way of the peer once on a few iterations; nothing is tried where there is one way only."""
        chosen = self._chosen
        variants = [chosen.variant] if chosen.variant else self._variants
        if len(variants) == 1:
            return {variants[0]: {}}
        steps = min(chosen.steps, chosen.tried_steps)
        jobs = {variant: self._job(chosen.epochs[0], steps, variant) for variant in variants}
        return {variant: self._measured("peer", job, fail=False) for variant, job in jobs.items()}

    @property
    def _variants(self) -> list[str]:
        """A base in bfloat16 is no way to train in float32."""
        known = VARIANTS[self._chosen.method]
        return [each for each in known if self._chosen.dtype == "bfloat16" or "bfloat16" not in each]

    def _measured(self, side: str, job: Job, *, fail: bool = True) -> dict[str, Any]:
        """One run, with its figures."""
        module, environment = self._peer if side == "peer" else ("bench.ppo_ours", {})
        said: dict[str, Any] = processes.fresh(
            self._directory, self._chosen.threads, module, self._stored(job), **environment
        )
        if "failed" not in said:
            tokens = self._chosen.responses * self._chosen.new_tokens
            return said | rates(said["ends"], said["phases"], self._chosen.warmup, tokens)
        if fail:
            raise SystemExit(f"the peer did not run: {said['failed']}")
        return said

    def _stored(self, job: Job) -> Path:
        return job.write(self._directory / "job.json")


def rates(ends: Sequence[float], phases: Sequence[Mapping[str, float]], warmup: int, tokens: int) -> dict[str, Any]:
    """Speed over the iterations after the warm-up.

    Args:
        ends: When each iteration ended, in seconds.
        phases: Seconds of each iteration's phases.
        warmup: Iterations to leave out.
        tokens: Tokens that are sampled in an iteration.

    Raises:
        ValueError: No iteration is left, or not each has its phases.
    """
    if not len(ends) == len(phases) > warmup:
        raise ValueError(f"{len(ends)} iterations, of which {warmup} do not count, with phases of {len(phases)}")
    seconds = (ends[-1] - ends[warmup - 1]) / (len(ends) - warmup)
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "timed": list(phases[warmup:])}


def install(directory: Path) -> Path:
    """The folder that holds the release of TRL alone; pip puts it there if it is not."""
    target = directory / f"trl-{TRL}"
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made = Path(scratch) / "packages"
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--retries",
                "1",
                "--target",
                str(made),
            ]
            try:
                subprocess.run([*pip, f"trl=={TRL}"], check=True, stdout=sys.stderr)
            except subprocess.CalledProcessError as error:
                raise SystemExit(f"pip could not fetch trl {TRL}, which the peer needs: see above") from error
            made.rename(target)
    return target


def _fastest(tried: Mapping[str, Mapping[str, Any]]) -> str:
    """The fastest way that does Baton's work; the only one, untried; none where no peer runs."""
    if len(tried) < 2:
        return next(iter(tried), "")
    ran = {name: said for name, said in tried.items() if "failed" not in said and not name.startswith(OTHER_WORK)}
    if not ran:
        raise SystemExit("the peer did not run: " + "; ".join(f"{name}: {said}" for name, said in tried.items()))
    return min(ran, key=lambda name: ran[name]["seconds"])


def _require_free(given: Sequence[str]) -> None:
    """See that what was set is not given by the comparison, and can be part of a file's name."""
    for name, value in nested(given).items():
        if name in FIXED:
            raise SystemExit(f"--set {name}: the comparison gives it; `--help` lists what can be chosen")
        if name == "lora" and not isinstance(value, dict):
            raise SystemExit("--set lora: set one of its parts, as in lora.top_layers=3")
    if found := [each for each in given if "/" in each]:
        raise SystemExit(f"--set {found[0]}: the results' files are called by what is set, and a name has no `/`")


def _name(chosen: argparse.Namespace) -> str:
    """Of the results' files."""
    device = f"-{chosen.device}" if chosen.device != "cpu" else ""
    dtype = f"-{chosen.dtype}" if chosen.dtype != "bfloat16" else ""
    model = f"-{shape.label(chosen.model)}" if chosen.model != "llama-14m" else ""
    quantization = f"-{chosen.quantization}" if chosen.quantization != "none" else ""
    settings = "".join(f"-{each.replace('=', '-')}" for each in chosen.set)
    return chosen.method + device + dtype + model + quantization + settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ppo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    option = parser.add_argument
    ways = ", ".join(way for method in VARIANTS.values() for way in method)
    option("--device", choices=("cpu", "cuda"), default="cpu")
    option("--dtype", choices=DTYPES, default="auto", help=PRECISION_HELP)
    option("--quantization", choices=("none", "4bit", "8bit"), default="none", help="of Baton's base, run alone")
    option("--model", default="llama-14m", help=MODEL_HELP)
    option("--method", choices=VARIANTS, default="ppo", help="ppo, or rloo beside the installed TRL's RLOOTrainer")
    option("--epochs", type=count, nargs="+", default=[1, 4], help="passes over a rollout (default: 1 4)")
    option("--repeats", type=count, default=5, help="of both sides in turn (default: %(default)s)")
    option("--steps", type=count, default=3, help="timed iterations (default: %(default)s)")
    option("--warmup", type=count, default=1, help="iterations before them (default: %(default)s)")
    option("--tried-steps", type=count, default=1, help="timed iterations for each of the peer's ways")
    option("--responses", type=count, default=32, help="of an iteration (default: %(default)s)")
    option("--samples", type=count, default=1, help="responses to each prompt (default: 1; rloo needs more)")
    option("--prompt", type=count, default=128, help="tokens of the longest prompt (default: %(default)s)")
    option("--new-tokens", type=count, default=64, help="of every response (default: %(default)s)")
    option("--micro-batch", type=count, default=8, help="rows that go through the model at once in training")
    option("--reward-steps", type=count, default=40, help="of the reward model's training (default: %(default)s)")
    option("--reward-rows", type=count, default=128, help="held-out pairs that judge it (default: %(default)s)")
    option("--learning-rate", type=float, default=1e-5, help="of the policy, constant (default: %(default)s)")
    option("--threads", type=count, default=len(os.sched_getaffinity(0)), help="(default: all cores)")
    option("--data", type=Path, default=PAIRS, help="preference pairs in any layout (default: hh-rlhf in BATON_DATA)")
    option("--cache", type=Path, help="where to keep bases and the old TRL (default: nowhere)")
    option("--output", type=Path, default=processes.RESULTS, help="where to write the results")
    option("--set", action="append", default=[], metavar="NAME=VALUE", help="a further setting of Baton's stage")
    option("--variant", default="", help=f"the peer's way, instead of the fastest: {ways}")
    option("--only", choices=SIDES, help="run one side")
    return parser


def _require_groups(chosen: argparse.Namespace) -> None:
    if (chosen.samples > 1) != (chosen.method == "rloo"):
        raise SystemExit(f"--samples {chosen.samples}: rloo needs more than one response to a prompt, ppo takes one")
    if chosen.responses % chosen.samples:
        raise SystemExit(f"--samples {chosen.samples} must divide --responses {chosen.responses}")


if __name__ == "__main__":
    main()
