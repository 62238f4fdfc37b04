"""The callback that follows a trainer of TRL: it logs, counts tokens and steps, and stops before a broken step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.contract import Context
from stages.core import guards
from stages.core.alarms import Alarms
from stages.core.checkpoint import State, joined
from stages.core.trl.results import LAST_STEPS

RENAMED = {"grad_norm": "gradient_norm"}
RUNNING = "num_tokens"
"""A figure that adds up over a trainer's steps."""


class Follower(TrainerCallback):
    """Reports each step of a trainer to its stage.

    Args:
        context: The stage's.
        origins: Where the examples are from, in the order in which the stage takes them.
        total: Steps of the stage.

    Attributes:
        taken: Steps of this trainer and of those that were stopped before it.
        history: The figures of the last steps, by TRL's names.
        tokens: Tokens that went through the policy, padding included: in training, sampling and as a reference on the
            same base.
        alarms: What watches the steps of trainers that do not sample.
    """

    def __init__(self, context: Context, origins: Sequence[str], total: int) -> None:
        self._context, self._origins, self._total = context, origins, total
        self._counted = 0
        self._earlier = 0.0
        self.taken = 0
        self.history: list[dict[str, float]] = []
        self.tokens = 0
        self.alarms = Alarms()

    def count(self, model: nn.Module) -> None:
        """Count what goes through a model from now on, at its embedding."""

        def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self.tokens += inputs[0].numel()

        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_hook(note)

    def state(self) -> State:
        """What was counted and logged so far."""
        return joined({"alarms": self.alarms.state()}, taken=self.taken, tokens=self.tokens, history=self.history)

    def load_state(self, state: State) -> None:
        """Go on from such a state."""
        self.taken, self.history = state.values["taken"], list(state.values["history"])
        self.tokens = self._counted = state.values["tokens"]
        self._earlier = self.history[-1].get(RUNNING, 0.0)
        self.alarms.load_state(state.part("alarms"))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = [each.grad for each in kwargs["model"].parameters() if each.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        guards.require_finite_gradient(norm, self.taken + 1, self._rows(self.taken))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:  # the summary at the end
            return
        loss = torch.tensor(float(logs["loss"]))
        guards.require_finite_loss(loss, self.taken + 1, self._rows(self.taken))
        self.taken += 1
        figures = {RENAMED.get(name, name): float(value) for name, value in logs.items() if name != "epoch"}
        if RUNNING in figures:
            figures[RUNNING] += self._earlier
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        self.history = [*self.history[1 - LAST_STEPS :], finite]
        told = len(self.alarms.warnings)
        seen = self._watch(finite)
        record = {**finite, "tokens": self.tokens - self._counted, **({"alarm": ", ".join(seen)} if seen else {})}
        self._counted = self.tokens
        self._context.progress(record, done=self.taken, total=self._total)
        for line in self.alarms.warnings[told:]:
            self._context.say(line)

    def _watch(self, figures: Mapping[str, float]) -> Mapping[str, str]:
        """What looks wrong in a step; losses of samples, and steps without a norm, say nothing of it."""
        if self._context.settings.method.samples or "gradient_norm" not in figures:
            return {}
        return self.alarms.watch(figures, self.taken, self._rows(self.taken - 1))

    def _rows(self, taken: int) -> Sequence[str]:
        """Where the examples of the step after so many are from."""
        size = self._context.settings.examples_per_step
        return self._origins[taken * size : (taken + 1) * size]
