"""Baton beside a peer: the command line of a comparison, and the runs in turn.

Every run is a process of its own. The sides take turns, `--repeats` times; a ratio is that of two neighbouring runs.
Where the peer has several ways to compute, each is tried once on a few steps, and the fastest that trains on whole rows
is taken. Then each side trains once more for the curves and keeps the result, which is judged on held-out rows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from bench import curves, figures, page, processes, shape
from bench.figures import Passes
from bench.job import Job
from bench.rows import plain_counts, read, shared_counts

SIDES = ("ours", "peer")
DATA = Path(os.environ.get("BATON_DATA", processes.REPOSITORY.parent / "shared" / "data"))
PAIRS = DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
DTYPES = ("auto", "bfloat16", "float32")
PRECISION_HELP = "of both sides' matrix products (default: bfloat16 where the device is faster in it)"
MODEL_HELP = "a name in bench/models, a file of the same layout, a GGUF file, or a model directory"
OF_OTHER_STEPS = ("bfd", "wrapped")
"""Ways of the peer whose steps hold other rows than ours: no way to lay curves over each other."""
MIXES_ROWS = "wrapped"


@dataclass(frozen=True)
class Work:
    """A kind of training that is compared."""

    kind: str
    peer: str
    """The peer's name."""
    variants: tuple[str, ...]
    """The ways in which the peer can compute, as `bench.peer` names them; the first has ours' steps."""
    passes: Passes
    learning_rate: float
    model: str = "llama-14m"
    length: int = 1024
    unit: str = "pairs"
    differences: tuple[str, ...] = ()
    """What was not equal, in sentences."""


def main(work: Work, description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = _parser(work, description).parse_args(given)
    if not chosen.data.is_file():
        raise SystemExit(f"no {chosen.data}: set BATON_DATA to the folder with hh-rlhf, or give --data")
    if "reference" in nested(chosen.set):
        raise SystemExit("--set reference: the peer computes the reference in every step, and so must Baton's stage")
    chosen.dtype = precision(chosen)
    with cache(chosen.cache) as kept, tempfile.TemporaryDirectory(dir=kept) as directory:
        record = Comparison(work, chosen, kept, Path(directory)).record()
    record["command"] = processes.command(work.kind, given)
    text = page.write(work, record)
    name = _name(work, chosen)
    if record["learning"]:
        names = {"ours": "Baton", "peer": work.peer}
        image = curves.draw(chosen.output / f"{name}.svg", record["learning"], names)
        text += f"\n\n![The loss of every step]({image.name})"
    sys.stdout.write(text + "\n")
    processes.save(name, record, text, chosen.output)


class Comparison:
    """All runs of a comparison, and what they need.

    Args:
        work: What is compared.
        chosen: What the command line says.
        kept: Where bases are, or are put.
        directory: For the material, and for what the runs write.
    """

    def __init__(self, work: Work, chosen: argparse.Namespace, kept: Path, directory: Path) -> None:
        self._work, self._chosen, self._kept, self._directory = work, chosen, kept, directory
        self._sides = [chosen.only] if chosen.only else list(SIDES)

    def record(self) -> dict[str, Any]:
        """Run everything; returns all that was found."""
        chosen, material = self._chosen, self._material
        tried = self._tried() if "peer" in self._sides else {}
        variant = _fastest(tried)
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in self._sides}
        for _ in range(chosen.repeats):
            for side in self._sides:
                runs[side].append(self._measured(side, self._job(chosen.steps, variant)))
        learning = {side: self._learned(side) for side in self._sides if chosen.learning_steps}
        return {
            "kind": self._work.kind,
            "options": processes.options(chosen),
            "machine": processes.machine(*PACKAGES),
            "device": runs[self._sides[0]][0]["device"],
            "material": material,
            "tried": tried,
            "variant": variant,
            "runs": runs,
            "learning": learning,
        }

    @cached_property
    def _material(self) -> dict[str, Any]:
        """What the runs are given; made when it is first asked for."""
        chosen, pretrained = self._chosen, self._work.kind != "pretrain"
        model = (shape.find if pretrained else shape.find_untrained)(chosen.model)
        base = shape.place(self._kept, model, chosen.data, pretrained=pretrained)
        longest = self._stored(self._job(max(chosen.steps, chosen.learning_steps - chosen.warmup)))
        return self._process("bench.material", longest, model, base, str(chosen.held_out))

    def _job(self, steps: int, variant: str = "", result: str = "") -> Job:
        """A training of so many steps after the warm-up."""
        chosen = self._chosen
        return Job(
            kind=self._work.kind,
            material=str(self._directory),
            data=str(chosen.data),
            steps=chosen.warmup + steps,
            examples_per_step=chosen.batch,
            max_length=chosen.length,
            learning_rate=chosen.learning_rate,
            device=chosen.device,
            dtype=chosen.dtype,
            settings=nested(chosen.set),
            variant=variant,
            result=result,
        )

    def _tried(self) -> dict[str, dict[str, Any]]:
        """Each way of the peer once on a few steps; nothing is tried where there is one way only."""
        chosen = self._chosen
        variants = [chosen.variant] if chosen.variant else self._variants
        if len(variants) == 1:
            return {variants[0]: {}}
        steps = min(chosen.steps, chosen.tried_steps)
        return {variant: self._measured("peer", self._job(steps, variant), fail=False) for variant in variants}

    @property
    def _variants(self) -> list[str]:
        """A base in bfloat16 is no way to train in float32, where there is no autocast either."""
        words = () if self._chosen.dtype == "bfloat16" else ("bfloat16", "plain")
        return [variant for variant in self._work.variants if not any(word in variant for word in words)]

    def _learned(self, side: str) -> dict[str, Any]:
        """Train for the curves, and judge what came of it."""
        result = self._directory / f"{side}-result"
        variant = next(each for each in self._variants if not each.startswith(OF_OTHER_STEPS))
        job = self._job(self._chosen.learning_steps - self._chosen.warmup, variant, str(result))
        said = self._said(side, job)
        judged = self._process("bench.judge", self._stored(job))
        shutil.rmtree(result)
        return {"losses": said["losses"], "judged": judged, "variant": variant if side == "peer" else ""}

    def _measured(self, side: str, job: Job, *, fail: bool = True) -> dict[str, Any]:
        """One run, with its figures."""
        said = self._said(side, job, fail=fail)
        if "failed" in said:
            return said
        counts = self._counts(said, job) | {key: self._material[key] for key in ("body", "head")}
        return said | figures.rates(self._work.passes, counts, said["ends"], self._chosen.warmup)

    def _counts(self, said: Mapping[str, Any], job: Job) -> dict[str, Any]:
        """Tokens of every step: the peer says what it packed into its steps."""
        rows = read(self._directory / "drawn.jsonl")[: job.steps * job.examples_per_step]
        plain = plain_counts(rows, job.examples_per_step)
        example = sum(plain["tokens"]) / len(rows)
        if "tokens" in said:
            return {"tokens": said["tokens"], "reads": said["reads"], "computed": said["tokens"], "example": example}
        return {**plain, "computed": shared_counts(rows, job.examples_per_step), "example": example}

    def _said(self, side: str, job: Job, *, fail: bool = True) -> dict[str, Any]:
        said = self._process(f"bench.{side}", self._stored(job))
        if fail and "failed" in said:
            raise SystemExit(f"{self._work.peer} did not run: {said['failed']}")
        return said

    def _stored(self, job: Job) -> Path:
        return job.write(self._directory / "job.json")

    def _process(self, module: str, *arguments: str | Path) -> dict[str, Any]:
        return processes.fresh(self._directory, self._chosen.threads, module, *arguments)


def _fastest(tried: Mapping[str, Mapping[str, Any]]) -> str:
    """The fastest way that keeps rows whole and apart; the only one, untried; none where no peer runs."""
    if len(tried) < 2:
        return next(iter(tried), "")
    ran = {name: said for name, said in tried.items() if "failed" not in said and not name.startswith(MIXES_ROWS)}
    if not ran:
        raise SystemExit("the peer did not run: " + "; ".join(f"{name}: {said}" for name, said in tried.items()))
    return max(ran, key=lambda name: ran[name]["tokens_per_second"])


def nested(given: Sequence[str]) -> dict[str, Any]:
    """`a.b=c` as mappings; values are YAML."""
    found: dict[str, Any] = {}
    for each in given:
        place, separator, value = each.partition("=")
        if not separator:
            raise SystemExit(f"--set {each}: give it as `name=value`")
        *outer, name = place.split(".")
        inside = found
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[name] = yaml.safe_load(value)
    return found


def precision(chosen: argparse.Namespace) -> str:
    """The precision that was chosen; `auto` is that of Baton's stages, bfloat16 where the device is faster in it."""
    if chosen.dtype != "auto":
        return str(chosen.dtype)
    said: dict[str, str] = processes.run("bench.precision", chosen.device, **processes.quiet(chosen.threads)).said
    return said["dtype"]


@contextmanager
def cache(kept: Path | None) -> Iterator[Path]:
    """Where bases are kept, or a place for this time only."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def _name(work: Work, chosen: argparse.Namespace) -> str:
    """Of the results' files."""
    device = f"-{chosen.device}" if chosen.device != "cpu" else ""
    dtype = f"-{chosen.dtype}" if chosen.dtype != "bfloat16" else ""
    model = f"-{shape.label(chosen.model)}" if chosen.model != work.model else ""
    return work.kind + device + dtype + model


def count(text: str) -> int:
    """A number of the command line that is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("should be a whole number of at least 1")
    return int(text)


def _parser(work: Work, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{work.kind}", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    option = parser.add_argument
    option("--device", choices=("cpu", "cuda"), default="cpu")
    option("--dtype", choices=DTYPES, default="auto", help=PRECISION_HELP)
    option("--model", default=work.model, help=MODEL_HELP)
    option("--repeats", type=count, default=5, help="of both sides in turn (default: %(default)s)")
    option("--steps", type=count, default=10, help="timed steps (default: %(default)s)")
    option("--warmup", type=count, default=2, help="steps before them (default: %(default)s)")
    option("--tried-steps", type=count, default=4, help="timed steps for each of the peer's ways")
    option("--learning-steps", type=int, default=40, help="steps of the training that is judged; 0 leaves it out")
    option("--batch", type=count, default=8, help="examples of a step (default: %(default)s)")
    option("--length", type=count, default=work.length, help="tokens of the longest example (default: %(default)s)")
    option("--learning-rate", type=float, default=work.learning_rate, help="constant (default: %(default)s)")
    option("--held-out", type=count, default=128, help="held-out rows that are judged (default: %(default)s)")
    option("--threads", type=count, default=len(os.sched_getaffinity(0)), help="(default: all cores)")
    option("--data", type=Path, default=PAIRS, help="preference pairs in any layout (default: hh-rlhf in BATON_DATA)")
    option("--cache", type=Path, help="where to keep bases (default: nowhere)")
    option("--output", type=Path, default=processes.RESULTS, help="where to write the results")
    option("--variant", default="", help=f"the peer's way, instead of the fastest: {', '.join(work.variants)}")
    option("--only", choices=SIDES, help="run one side")
    option("--set", action="append", default=[], metavar="NAME=VALUE", help="a further setting of Baton's stage")
    return parser
