"""The training loop: a generator of step records.

An optimizer step is N examples, split into micro-batches by tokens. The loss is normalised over the whole step,
so results depend neither on the size of micro-batches nor on how examples were packed into them. Between any two steps
a stage may leave a checkpoint, from which it goes on exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data.mixture import Passes, stream
from data.tree import Tree
from pipeline.config import Optimizer, Training
from pipeline.contract import Context
from stages.core import checkpoint, guards, optim
from stages.core.alarms import Alarms
from stages.core.checkpoint import State, joined
from stages.core.trained import Trained


@dataclass(frozen=True)
class Part:
    """One micro-batch's share of a step.

    Attributes:
        loss: Its share of the step's loss: the shares of a step add up to it.
        shares: Its shares of other figures, which add up likewise.
        tokens: Tokens computed.
    """

    loss: Tensor
    shares: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0


Objective = Callable[[Sequence[Tree]], Iterable[Part]]
"""Yields the parts of one step's examples, one forward at a time."""


class Updater(Trained):
    """Turns parts into one optimizer step at a time."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        settings: Optimizer,
        total_steps: int,
        epsilon: float = optim.EPSILON,
    ) -> None:
        super().__init__(named, settings, epsilon)
        self._settings = settings
        self.total = total_steps
        self.taken = 0

    def step(self, parts: Iterable[Part], origins: Sequence[str] = ()) -> dict[str, float]:
        """Accumulate the parts' gradients and take one step.

        Returns:
            `loss`, `gradient_norm` (before clipping), `learning_rate`, `tokens`, and the sums of the parts' shares.

        Raises:
            NumericalError: The loss or the gradient is not finite, and no weight was changed; or a weight is not.
        """
        record = {"loss": 0.0, "tokens": 0.0}
        for part in parts:
            guards.require_finite_loss(part.loss.detach(), self.taken + 1, origins)
            part.loss.backward()
            record["loss"] += part.loss.item()
            record["tokens"] += part.tokens
            for name, share in part.shares.items():
                record[name] = record.get(name, 0.0) + share
        norm = nn.utils.clip_grad_norm_(self._parameters, self._settings.clip_norm)
        guards.require_finite_gradient(norm, self.taken + 1, origins)
        factor = optim.scale(self._settings, self.taken, self.total)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._settings.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.taken += 1
        guards.require_finite_step(self._named, self.taken, origins)
        return record | {"gradient_norm": norm.item(), "learning_rate": self._settings.learning_rate * factor}

    def skip(self, steps: int) -> None:
        """Let the learning rate go on as if so many steps had been taken."""
        self.taken += steps

    def state(self) -> State:
        """Of what is trained, and the number of steps."""
        trained = super().state()
        return State(trained.tensors, {**trained.values, "taken": self.taken})

    def load_state(self, state: State) -> None:
        """Go on where another updater of the same parameters and settings was.

        Raises:
            ArtifactError: The state is of other parameters.
        """
        super().load_state(state)
        self.taken = state.values["taken"]


def train(
    examples: Passes[Tree], objective: Objective, updater: Updater, settings: Training, seed: int
) -> Iterator[dict[str, float]]:
    """Take all steps that the updater has not taken yet, yielding the record of each."""
    for record, _ in _taken(examples, objective, updater, settings, seed):
        yield record


@dataclass(frozen=True)
class Followed:
    """What became of a stage's steps.

    Attributes:
        tokens: Tokens computed in all of them.
        warnings: Alarms that went off.
    """

    tokens: int
    warnings: list[str]


def follow(
    context: Context, examples: Passes[Tree], objective: Objective, named: Iterable[tuple[str, nn.Parameter]]
) -> Followed:
    """Take all steps of a stage, or those after its checkpoint, reporting each and what looks wrong in it."""
    settings = context.settings
    updater, alarms = Updater(named, settings.optimizer, total_steps(len(examples), settings)), Alarms()
    tokens = _resume(context, updater, alarms)
    with context.checkpoints.steps(updater.size):
        for figures, origins in _taken(examples, objective, updater, settings, context.seed):
            tokens += int(figures["tokens"])
            told = len(alarms.warnings)
            seen = alarms.watch(figures, updater.taken, origins)
            record = {**figures, "alarm": ", ".join(seen)} if seen else figures
            context.progress(record, done=updater.taken, total=updater.total)
            for line in alarms.warnings[told:]:
                context.say(line)
            context.checkpoints.after(updater.taken, partial(_save, updater, alarms, tokens))
    return Followed(tokens, alarms.warnings)


def _resume(context: Context, updater: Updater, alarms: Alarms) -> int:
    """Go on from the stage's checkpoint, if there is one; returns the tokens computed until then."""
    directory = context.checkpoints.resume()
    if directory is None:
        return 0
    state = checkpoint.load(directory)
    updater.load_state(state.part("updater"))
    alarms.load_state(state.part("alarms"))
    checkpoint.restore_random_state(state.part("random"), updater.device)
    return int(state.values["tokens"])


def _save(updater: Updater, alarms: Alarms, tokens: int, directory: Path) -> None:
    random = checkpoint.random_state(updater.device)
    parts = {"updater": updater.state(), "alarms": alarms.state(), "random": random}
    checkpoint.save(directory, joined(parts, tokens=tokens))


def _taken(
    examples: Passes[Tree], objective: Objective, updater: Updater, settings: Training, seed: int
) -> Iterator[tuple[dict[str, float], list[str]]]:
    """Every step's record, and where its rows are from."""
    for chosen in _steps(examples, settings, updater.total, seed, updater.taken):
        origins = [tree.origin for tree in chosen]
        yield updater.step(objective(chosen), origins), origins


def total_steps(examples: int, settings: Training) -> int:
    """Optimizer steps that the settings ask for."""
    return settings.steps or math.ceil(_wanted(examples, settings) / settings.examples_per_step)


def _wanted(examples: int, settings: Training) -> int:
    return max(1, round(examples * settings.epochs))


def _steps(examples: Passes[Tree], settings: Training, total: int, seed: int, first: int = 0) -> Iterator[list[Tree]]:
    """The examples of every step from the 0-based `first` on; those before are not looked at."""
    wanted = total * settings.examples_per_step if settings.steps else _wanted(len(examples), settings)
    taken = stream(examples, seed, first * settings.examples_per_step)
    for step in range(first, total):
        size = min(settings.examples_per_step, wanted - step * settings.examples_per_step)
        yield [next(taken) for _ in range(size)]


def seed_everything(seed: int) -> None:
    """Seed torch's generators; Python's is never used without a seed of its own."""
    torch.manual_seed(seed)
