"""What both sides of the PPO comparison start from.

`python -m bench.ppo_material JOB SHAPE BASE` writes into the job's directory:

base/            a link to BASE, which is made if it is not there
rows.jsonl       prompts in conversational layout, for Baton's stage
drawn.jsonl      the prompts in tokens, in the order in which the stage takes them
reward/          a reward model on the base, trained by Baton's stage on pairs of the same data
reward.json      what its manifest would say
reward-merged/   the base with the reward model's adapter merged into it
"""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench import material, processes
from bench.base import context
from bench.job import Job
from bench.ours import stage_context
from bench.ppo_given import merged_directory, reward_directory, settings
from data.mixture import stream
from data.template import ChatTemplate
from data.tokenizer import load_tokenizer
from pipeline.config import DataSource
from pipeline.contract import Artifact, Context
from pipeline.manifest import Adaptation, Manifest
from stages import reward
from stages.core.device import Compute
from stages.core.rl.prompts import read_prompts
from stages.core.roles import REWARD, open_base

REWARD_TRAINING: dict[str, Any] = {"steps": 40, "examples_per_step": 8, "max_length": 512, "learning_rate": 3e-4}
HELD_OUT_PAIRS = 128


def make(job: Job, shape: Path, stored: Path) -> dict[str, Any]:
    """Write the material; returns counts, and how good the reward model is."""
    material.link_base(job, shape, stored)
    left_out = _write_prompts(job)
    drawn = _drawn(job)
    material.write(job.directory / "drawn.jsonl", ({"prompt_tokens": prompt} for prompt in drawn))
    accuracy = _train_reward(job, shape, stored)
    merged = _merge(job)
    return {
        "left_out": left_out,
        "prompt_tokens": sum(map(len, drawn)) / len(drawn),
        "parameters": sum(each.numel() for each in merged.parameters()),
        "reward_accuracy": accuracy,
    }


def base_artifact(job: Job) -> Artifact:
    """The model that both sides start from, as a stage receives it."""
    return Artifact(job.base, "model", "base", source="base")


def reward_artifact(job: Job) -> Artifact:
    """The reward model, as a stage receives it."""
    said = json.loads((job.directory / "reward.json").read_text(encoding="utf-8"))
    adaptation = Adaptation.model_validate(said["adaptation"])
    manifest = Manifest.model_construct(adaptation=adaptation, inputs={}, tokenizer=said["tokenizer"])
    return Artifact(reward_directory(job), "reward", "reward", manifest, "reward", base_artifact(job))


def stage_context_of(job: Job, directory: Path, **options: Any) -> Context:
    """What Baton's stage is run with: no prompt is held out."""
    source = DataSource(source=str(job.source), held_out=0.0)
    inputs = {"policy": base_artifact(job), "reward": reward_artifact(job)}
    options = {"seed": job.seed, "device": job.device, "dtype": job.dtype, **options}
    return context(settings(job), source, inputs, directory, **options)


def main() -> None:
    """Run one job's preparation."""
    path, shape, stored = map(Path, sys.argv[1:4])
    processes.report(**make(Job.read(path), shape, stored))


def _write_prompts(job: Job) -> int:
    """As many prompts as are drawn, none longer than leaves room for a whole response; returns how many were not
    taken."""
    template, chosen = ChatTemplate(load_tokenizer(job.base)), settings(job)
    wanted, longest = job.steps * job.examples_per_step, chosen.max_length - chosen.max_new_tokens
    taken: list[dict[str, Any]] = []
    left_out = 0
    for row in material.pairs(Path(job.data)):
        if len(taken) == wanted:
            break
        if material.takes_turns(row) and len(template.prompt(row.prompt)) <= longest:
            taken.append({"prompt": material.turns(row)})
        else:
            left_out += 1
    material.write(job.source, taken)
    return left_out


def _drawn(job: Job) -> list[tuple[int, ...]]:
    """The prompts that the stage draws, in its order; it is made sure later that it does."""
    source = DataSource(source=str(job.source), held_out=0.0)
    given = context(settings(job), source, {}, job.directory / "drawing", seed=job.seed)
    passes = read_prompts(given, material.without_weights(job)).passes
    return [each.tokens for each in islice(stream(passes, job.seed), job.steps * job.examples_per_step)]


def _train_reward(job: Job, shape: Path, stored: Path) -> float | None:
    """Train and store the reward model; returns its accuracy on held-out pairs, if there are any."""
    work = job.directory / "reward-material"
    result = str(reward_directory(job))
    training = dataclasses.replace(
        job, kind="reward", material=str(work), settings={}, result=result, **REWARD_TRAINING
    )
    material.link_base(training, shape, stored)
    material.make(training, HELD_OUT_PAIRS)
    found = reward.run(stage_context(training, "reward"))
    assert found.adaptation is not None
    said = {"adaptation": found.adaptation.model_dump(mode="json"), "tokenizer": found.tokenizer}
    (job.directory / "reward.json").write_text(json.dumps(said), encoding="utf-8")
    return found.metrics["pair_accuracy"].value if "pair_accuracy" in found.metrics else None


def _merge(job: Job) -> torch.nn.Module:
    """Store the model that the reward is read from, in the precision of the base."""
    artifact = reward_artifact(job)
    roles = open_base(artifact, Compute(torch.device("cpu"), torch.float32))
    roles.load(REWARD, artifact.directory)
    merged = roles.merged(REWARD, base_artifact(job))
    merged.model.save_pretrained(merged_directory(job))
    return merged.model


if __name__ == "__main__":
    main()
