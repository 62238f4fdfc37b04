"""What both sides of the PPO comparison are given: settings, prompts in their order, and the reward model.

`bench.ppo_material` writes it; the peers read the settings of Baton's stage and compute with the same figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from bench.job import Job
from bench.rows import read
from pipeline.config import PpoSettings
from reward.head import ScalarHead

LORA: dict[str, Any] = {"rank": 16, "alpha": 32.0}


def settings(job: Job) -> PpoSettings:
    """The settings of Baton's stage; `max_length` is the longest prompt and a whole response.

    The stage looks at held-out prompts before the first step and after the last: it is asked for one step more than is
    taken, and for a look that costs nothing.
    """
    given = {
        "policy": "base",
        "reward": "reward",
        "data": "rows",
        "lora": lora(job),
        "steps": job.steps + 1,
        "evaluate_every": job.steps + 1,
        "evaluate_rows": 1,
        "evaluate_samples": 1,
        "examples_per_step": job.examples_per_step,
        "max_length": job.max_length,
        "missing_eos_penalty": 0.0,
        "optimizer": {"learning_rate": job.learning_rate, "schedule": "constant", "warmup": 0.0},
    }
    return PpoSettings.model_validate({**job.settings, **given})


def lora(job: Job) -> dict[str, Any]:
    """The shape of Baton's adapters, the reward model's among them: only with the same layers have all roles others in
    common."""
    return LORA | job.settings.get("lora", {})


def micro_batch(chosen: PpoSettings, responses: int) -> int:
    """The most responses of full length that fit `tokens_per_batch` and divide a step's."""
    most = max(1, chosen.batch_tokens // chosen.max_length)
    return max(size for size in range(1, responses + 1) if size <= most and responses % size == 0)


def reward_directory(job: Job) -> Path:
    """The reward model as Baton's stage has stored it: an adapter and a head."""
    return job.directory / "reward"


def merged_directory(job: Job) -> Path:
    """The same with its adapter merged, without its head."""
    return job.directory / "reward-merged"


def classifier(job: Job, dtype: torch.dtype) -> Any:
    """The reward model as transformers has one, for policies of a peer; its scores are those of Baton's role."""
    model = AutoModelForSequenceClassification.from_pretrained(merged_directory(job), num_labels=1, dtype=dtype)
    head = ScalarHead.load(reward_directory(job), model.config.hidden_size)
    score = nn.Linear(model.config.hidden_size, 1)
    with torch.no_grad():
        score.weight.copy_(head.linear.weight)
        score.bias.copy_(head.linear.bias - head.mean)
    model.score = score.to(dtype)
    return model


class Drawn:
    """The prompts of every step, in the order in which Baton's stage draws them."""

    def __init__(self, job: Job) -> None:
        self._rows = read(job.directory / "drawn.jsonl")[: job.steps * job.examples_per_step]
        self._size = job.examples_per_step
        self._steps = 0

    @property
    def prompts(self) -> list[list[int]]:
        """All prompts in tokens."""
        return [row["prompt_tokens"] for row in self._rows]

    def require_next(self, prompts: Sequence[Sequence[int]]) -> None:
        """Count a step; several samples of a prompt stand side by side.

        Raises:
            ValueError: Its prompts are others than those that were drawn.
        """
        start = self._steps * self._size
        wanted, found = _once(self.prompts[start : start + self._size]), _once(prompts)
        self._steps += 1
        if wanted != found:
            differing = sum(one != other for one, other in zip(wanted, found, strict=False))
            raise ValueError(f"step {self._steps}: {len(found)} prompts for {len(wanted)}, {differing} of them differ")


def _once(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [prompt for prompt, _ in groupby(list(each) for each in prompts)]
