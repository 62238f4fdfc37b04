"""What is measured on: a base, a model that was trained from it for a few steps, and an adapter on that."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.batch import Layout
from data.schema import Message
from data.tree import Branch, Tree
from pipeline.config import DpoSettings, Lora
from pipeline.contract import Artifact
from pipeline.manifest import Adaptation, Manifest
from reward.head import ScalarHead
from stages.core import models, preference, scoring
from stages.core.device import Compute
from stages.core.models import LanguageModel
from stages.core.reference import in_each_step
from stages.core.roles import POLICY, Roles, open_base, open_role

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LORA = Lora()
STEPS, PAIRS_A_STEP, RATE = 4, 4, 1e-4
"""Of the light training that the probes must recognise; the rate is the default of the DPO stage."""


@dataclass
class Subject:
    """A base, the model that supervised training made of it, and an adapter and a reward model on that."""

    name: str
    base: Artifact
    tuned: Artifact
    policy: Artifact
    reward: Artifact
    trees: list[Tree]
    layout: Layout


def prepare(name: str, base: Artifact, trees: list[Tree], laid_out: Layout, work: Path, rate: float = RATE) -> Subject:
    """Train a model, and an adapter on it, for a few steps each; the reward model has the adapter and a random head."""
    roles, train = open_role(base, POLICY, LORA, compute("bfloat16")), trees[8:]
    _train(roles, scoring.negative_mean(roles.base, 4096, laid_out), [tree.split()[0] for tree in train], 2 * rate)
    roles.merged(POLICY, base).save(made(work / "tuned"))
    tuned = Artifact(work / "tuned", "model", "tuned", source="tuned")
    roles = open_role(tuned, POLICY, LORA, compute("bfloat16"))
    settings = DpoSettings(policy="p", data="d")
    _train(roles, preference.objective(roles, settings, laid_out, in_each_step(roles)), train, rate)
    roles.save(POLICY, made(work / "policy"))
    torch.manual_seed(1)
    roles.heads[POLICY] = ScalarHead(roles.base.hidden_size)
    nn.init.normal_(roles.heads[POLICY].linear.weight, std=0.02)
    roles.save(POLICY, made(work / "reward"))
    manifest = Manifest.model_construct(
        adaptation=Adaptation(base="tuned", base_source="tuned"), inputs={}, tokenizer=models.record(roles.base)
    )
    policy, reward = (Artifact(work / kind, kind, kind, manifest, kind, tuned) for kind in ("policy", "reward"))
    return Subject(name, base, tuned, replace(policy, kind="adapter"), reward, trees, laid_out)


def _train(roles: Roles, objective: Any, examples: list[Tree], rate: float) -> None:
    optimizer = torch.optim.AdamW([each for _, each in roles.parameters(POLICY)], lr=rate, weight_decay=0.0)
    for step in range(STEPS):
        first = step * PAIRS_A_STEP % len(examples)
        with roles.use(POLICY):
            for part in objective(examples[first : first + PAIRS_A_STEP]):
                part.loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


def compute(precision: str) -> Compute:
    return Compute(torch.device("cpu"), PRECISIONS[precision])


def opened(subject: Subject, precision: str, base: Artifact | None = None) -> Roles:
    """The adapter as the role `policy` on its base, or on another."""
    roles = open_base(base or subject.tuned, compute(precision))
    roles.load(POLICY, subject.policy.directory)
    return roles


def pairs_of(path: Path, language_model: LanguageModel, count: int) -> list[Tree]:
    """The shortest of ten times as many rows with a prompt, a chosen and a rejected response."""
    template, trees = language_model.template, []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines()[: 10 * count]):
        row = json.loads(text)
        branches = tuple(Branch.of(template.response(row[side])) for side in ("chosen", "rejected"))
        prompt = tuple(template.prompt([Message("user", row["prompt"])]))
        trees.append(Tree(prompt, branches, number, origin=f"row {number}"))
    return sorted(trees, key=lambda tree: tree.length)[:count]


def random_pairs(count: int, vocabulary: int) -> list[Tree]:
    chance = random.Random(0)

    def tokens() -> tuple[int, ...]:
        return tuple(chance.randrange(5, vocabulary) for _ in range(chance.randint(4, 20)))

    return [
        Tree(tokens(), (Branch.of(tokens()), Branch.of(tokens())), number, origin=f"row {number}")
        for number in range(count)
    ]
