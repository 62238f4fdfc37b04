"""The callback that follows a trainer of TRL: it logs, counts tokens, and stops before a broken step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.contract import Context
from stages.core import guards

RENAMED = {"grad_norm": "gradient_norm"}


class Follower(TrainerCallback):
    """Reports each step of a trainer to its stage.

    Args:
        context: The stage's.
        origins: Where the examples are from, in the order in which the trainer takes them.

    Attributes:
        history: The figures of each step, by TRL's names.
        tokens: Tokens that went through the policy, padding included: in training, sampling and as a reference on the
            same base.
    """

    def __init__(self, context: Context, origins: Sequence[str]) -> None:
        self._context, self._origins = context, origins
        self._counted = 0
        self.history: list[dict[str, float]] = []
        self.tokens = 0

    def count(self, model: nn.Module) -> None:
        """Count what goes through a model from now on, at its embedding."""

        def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self.tokens += inputs[0].numel()

        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_hook(note)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = [each.grad for each in kwargs["model"].parameters() if each.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        guards.require_finite_gradient(norm, state.global_step + 1, self._rows(state.global_step))

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
        guards.require_finite_loss(loss, state.global_step, self._rows(state.global_step - 1))
        figures = {RENAMED.get(name, name): float(value) for name, value in logs.items() if name != "epoch"}
        self.history.append({name: value for name, value in figures.items() if math.isfinite(value)})
        record = {**self.history[-1], "tokens": self.tokens - self._counted}
        self._counted = self.tokens
        self._context.progress(record, done=state.global_step, total=state.max_steps)

    def _rows(self, taken: int) -> Sequence[str]:
        """Where the examples of the step after so many are from."""
        size = self._context.settings.examples_per_step
        return self._origins[taken * size : (taken + 1) * size]
