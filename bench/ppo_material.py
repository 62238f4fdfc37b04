"""What both sides of the PPO comparison start from.

`python -m bench.ppo_material JOB SHAPE BASE SIDE...` writes into the job's directory:

base/            a link to BASE, which is made if it is not there
rows.jsonl       prompts in conversational layout, for Baton's stage
drawn.jsonl      the prompts in tokens, in the order in which the stage takes them
reward/          a reward model on the base, trained by Baton's stage on pairs of the same data
reward.json      what its manifest would say
reward-merged/   the base with the reward model's adapter merged into it, where a peer is to run

Where the base is quantized, as only Baton's side can have it, the policy and the reward model start from an adapter
that Baton's SFT stage has trained:

sft/             the adapter
sft.json         what its manifest would say
"""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from bench import material, processes
from bench.base import context
from bench.job import Job
from bench.ours import stage_context
from bench.ppo_given import lora, merged_directory, settings
from data.mixture import stream
from data.template import ChatTemplate
from data.tokenizer import load_tokenizer
from pipeline.config import DataSource
from pipeline.contract import Artifact, Context, Result
from pipeline.manifest import Adaptation, Manifest
from stages.core.device import Compute
from stages.core.rl.prompts import read_prompts
from stages.core.roles import REWARD, open_base

TRAINING: dict[str, Any] = {"examples_per_step": 8, "learning_rate": 3e-4}
SFT_STEPS = 4


def make(job: Job, shape: Path, stored: Path, *, for_peer: bool) -> dict[str, Any]:
    """Write the material; returns counts, and how good the reward model is."""
    material.link_base(job, shape, stored)
    left_out = _write_prompts(job)
    drawn = _drawn(job)
    material.write(job.directory / "drawn.jsonl", ({"prompt_tokens": prompt} for prompt in drawn))
    if job.quantization != "none":
        settings = {"quantization": job.quantization}
        _train(
            dataclasses.replace(job, kind="sft", steps=SFT_STEPS, settings=settings), shape, stored, base_artifact(job)
        )
    of_reward = dataclasses.replace(job, kind="reward", steps=job.reward_steps, settings={"lora": lora(job)})
    found = _train(of_reward, shape, stored, policy_artifact(job))
    if for_peer:
        _merge(job)
    accuracy = found.metrics.get("pair_accuracy")
    return {
        "left_out": left_out,
        "prompt_tokens": sum(map(len, drawn)) / len(drawn),
        "parameters": sum(each.numel() for each in material.without_weights(job).model.parameters()),
        "reward_accuracy": accuracy.value if accuracy else None,
    }


def base_artifact(job: Job) -> Artifact:
    """The model that both sides start from, as a stage receives it."""
    return Artifact(job.base, "model", "base", source="base")


def policy_artifact(job: Job) -> Artifact:
    """What Baton's stage starts from: the base, or an adapter on it where it is quantized."""
    return base_artifact(job) if job.quantization == "none" else _adapter_artifact(job, "sft", "adapter")


def reward_artifact(job: Job) -> Artifact:
    """The reward model, as a stage receives it."""
    return _adapter_artifact(job, "reward", "reward")


def stage_context_of(job: Job, directory: Path, **options: Any) -> Context:
    """What Baton's stage is run with: no prompt is held out."""
    source = DataSource(source=str(job.source), held_out=0.0)
    inputs = {"policy": policy_artifact(job), "reward": reward_artifact(job)}
    options = {"seed": job.seed, "device": job.device, "dtype": job.dtype, **options}
    return context(settings(job), source, inputs, directory, **options)


def main() -> None:
    """Run one job's preparation."""
    path, shape, stored = map(Path, sys.argv[1:4])
    processes.report(**make(Job.read(path), shape, stored, for_peer="peer" in sys.argv[4:]))


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


def _train(job: Job, shape: Path, stored: Path, policy: Artifact) -> Result:
    """Train an adapter with Baton's stage of the job's kind, and store it and what its manifest would say."""
    result = job.directory / job.kind
    places = {"material": str(job.directory / f"{job.kind}-material"), "result": str(result)}
    training = dataclasses.replace(job, **places, **TRAINING)
    material.link_base(training, shape, stored)
    material.make(training, job.reward_rows)
    context = stage_context(training, job.kind, policy)
    trained: Result = import_module(f"stages.{job.kind}").run(context)
    assert trained.adaptation is not None
    said = {
        "adaptation": trained.adaptation.model_dump(mode="json"),
        "tokenizer": trained.tokenizer,
        "settings": context.settings.model_dump(mode="json", include={"lora"}),
    }
    result.with_suffix(".json").write_text(json.dumps(said), encoding="utf-8")
    return trained


def _adapter_artifact(job: Job, name: str, kind: Literal["adapter", "reward"]) -> Artifact:
    said = json.loads((job.directory / f"{name}.json").read_text(encoding="utf-8"))
    adaptation = Adaptation.model_validate(said["adaptation"])
    manifest = Manifest.model_construct(
        adaptation=adaptation, inputs={}, tokenizer=said["tokenizer"], settings=said["settings"]
    )
    return Artifact(job.directory / name, kind, name, manifest, name, base_artifact(job))


def _merge(job: Job) -> None:
    """Store the model that the reward is read from, in the precision of the base."""
    artifact = reward_artifact(job)
    roles = open_base(artifact, Compute(torch.device("cpu"), torch.float32))
    roles.load(REWARD, artifact.directory)
    merged = roles.merged(REWARD, base_artifact(job))
    merged.model.save_pretrained(merged_directory(job))


if __name__ == "__main__":
    main()
