"""The rounds that reinforcement learning, rejection sampling and online DPO have in common.

Each round samples responses to prompts, has them scored, and lets the stage's learner learn from them. Before the first
update a preflight measures what must hold; after each round alarms watch the figures; now and then the policy answers
held-out prompts, and the one that did best is handed on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from data.batch import Layout
from data.mixture import stream
from data.tree import Tree
from pipeline.config import Rounds
from pipeline.contract import Context, Result
from pipeline.errors import ServerError
from pipeline.manifest import Metric
from reward.rules import require_facts
from stages.core import checkpoint, device, loop, memory, optim
from stages.core.checkpoint import State, joined
from stages.core.layout import choose_layout
from stages.core.memory import Fitted
from stages.core.models import decoder_layers, record
from stages.core.rl import health, preflight
from stages.core.rl.experience import Collector, Experience, score
from stages.core.rl.health import Health, Raised
from stages.core.rl.opening import open_roles
from stages.core.rl.preflight import Check
from stages.core.rl.prompts import EncodedPrompt, Prompts, echoes, read_prompts
from stages.core.rl.rewards import Rewards, Scale
from stages.core.rl.sampling import Rollout, Sampler
from stages.core.rl.selection import Selection
from stages.core.rl.trunk import Trunk
from stages.core.roles import POLICY, REFERENCE, REWARD, VALUE, Roles, adaptation
from stages.core.scoring import record_probes

LAST_ROUNDS = 10
NOTHING_SHARED = (
    "a role adapts lower layers, as a reward model without `lora.top_layers` does, or the architecture cannot be cut, "
    "and every role computes all layers"
)
LOOKS_FILE = "looks.json"
LOOK = -1
"""The number of no round: its seed is that of the looks."""


class Learner(Protocol):
    """How a stage learns from a rollout.

    Attributes:
        minibatches: Into how many groups of prompts a rollout is divided.
    """

    minibatches: int

    def begin(self, experiences: Sequence[Experience], scale: Scale, of_rules: float) -> None:
        """Take in the scale of the rewards and the mean of the rules' part of them, before anything is made of the
        first rollout."""

    def prepare(self, experiences: Sequence[Experience]) -> None:
        """Take in a whole rollout's scores, before anything is learnt from it."""

    def checks(self, experiences: Sequence[Experience]) -> Iterator[Check]:
        """The learner's own part of the preflight."""

    def learn(
        self, rollout: Rollout, groups: Sequence[Sequence[Experience]], number: int, order: random.Random
    ) -> dict[str, float]:
        """Update the policy; returns figures, `tokens` that were computed among them."""

    @property
    def size(self) -> int:
        """About as many bytes as its state has after a round."""

    def state(self) -> State:
        """All that learning changes."""

    def load_state(self, state: State) -> None:
        """Go on from such a state."""


LearnerOf = Callable[[Any, Roles, Layout, Trunk], Learner]
"""Makes a stage's learner of its settings on opened roles, which it may add its own to."""


def train(context: Context, learner_of: LearnerOf) -> Result:
    """Take all rounds and store the policy that did best on held-out prompts; its adapter is the result.

    Writes `looks.json`: reward, score and divergence on held-out prompts at each look.

    Raises:
        DataError: There is no prompt, or a rule misses what it needs.
        ArtifactError: The policy or the reward model is damaged, or they sit on different bases.
        NumericalError: The preflight failed, or a loss or gradient is not finite.
    """
    compute = device.for_stage(context)
    optim.require_support(context.settings.optimizer, compute.device)
    fitted = memory.fit(context, compute)
    context, settings = fitted.context, fitted.context.settings
    loop.seed_everything(context.seed)
    roles = open_roles(context.inputs["policy"], context.inputs.get("reward"), settings, compute)
    prompts = read_prompts(context, roles.base)
    training = Training(fitted, roles, prompts, learner_of)
    for _ in training.rounds():
        pass
    if training.selection.idle:
        training.warn(training.selection.idle)
    training.selection.restore()
    roles.save(POLICY, context.directory)
    looks = [look.record for look in training.selection.looks]
    (context.directory / LOOKS_FILE).write_text(json.dumps(looks, indent=1) + "\n")
    with roles.use(POLICY):
        record_probes(context.directory, echoes(prompts.first), roles.base)
    return Result(
        kind="adapter",
        metrics=training.selection.metrics | _metrics(training.last),
        data=prompts.cards,
        adaptation=adaptation(context.inputs["policy"], reference=context.inputs["policy"]),
        tokenizer=record(roles.base),
        tokens=training.tokens,
        compute=roles.base.compute.record,
        expected_memory=fitted.expected,
        warnings=training.warnings,
    )


class Training:
    """Rounds of sampling and learning.

    Attributes:
        selection: What was seen on held-out prompts.
        last: Figures of the last rounds.
        tokens: Tokens computed so far.
        warnings: What the manifest has to say.
    """

    def __init__(self, fitted: Fitted, roles: Roles, prompts: Prompts, learner_of: LearnerOf) -> None:
        self._fitted, context = fitted, fitted.context
        settings: Rounds = context.settings
        self._context, self._settings, self._roles, self._prompts = context, settings, roles, prompts
        examples = echoes(prompts.first, branches=2)
        with roles.use(REFERENCE):
            layout, warnings = choose_layout(roles.base, examples, context.say)
        self.warnings = [*roles.warnings, *warnings]
        trunk = Trunk.of(roles.base, examples, layout)
        top = settings.lora.top_layers
        if top and top < len(decoder_layers(roles.base.model)) and not trunk.depth:
            self.warnings.append(f"lora.top_layers={top} saves nothing: {NOTHING_SHARED}")
        self._learner = learner_of(settings, roles, layout, trunk)
        self._sampler, self._rewards = Sampler(roles, settings), Rewards(roles, settings)
        self._collector = Collector(roles, settings, self._rewards, layout, trunk)
        self._scale, self._health = Scale(), Health(settings)
        self._done, self._over = 0, False
        self.last: list[dict[str, float]] = []
        self.tokens = 0
        self._looked_at = prompts.looked_at(settings.evaluate_rows, context.seed)
        for each in self._looked_at:
            require_facts({settings.gold, *(rule.rule for rule in settings.rules)}, each.row)
        if not prompts.held_out:
            self.warnings.append("no prompt is held out: the policy is chosen by its score on training prompts")
        self.selection = Selection(roles, self._answers, self._rewards, self._collector, settings)

    def warn(self, warning: str) -> None:
        """Tell the user, and let the manifest say so."""
        self._context.say(f"warning: {warning}")
        self.warnings.append(warning)

    def rounds(self) -> Iterator[dict[str, float]]:
        """Take all rounds, or those after a checkpoint, telling the record of each, and yield their figures; an alarm
        may end them early."""
        settings, context = self._settings, self._context
        self._resume()
        taken = stream(self._prompts.passes, context.seed, self._done * settings.examples_per_step)
        with context.checkpoints.steps(self._learner.size + self.selection.size):
            while self._done < settings.steps and not self._over:
                chosen = [next(taken) for _ in range(settings.examples_per_step)]
                figures = self._round(self._done, *self._sampled(chosen))
                self._done += 1
                raised = self._health.watch(figures)
                last = self._done == settings.steps or any(each.name in settings.stop_on for each in raised)
                if self._done % settings.evaluate_every == 0 or last or self.selection.is_due(figures["kl"]):
                    figures |= self._look(figures["kl"])
                    raised += self._health.set_off("over_optimisation", self.selection.over_optimised)
                self.tokens += int(figures["tokens"])
                self.last = [*self.last[-LAST_ROUNDS + 1 :], figures]
                context.progress(figures, done=self._done, total=settings.steps)
                yield figures
                self._over = self._ends(raised)
                context.checkpoints.after(self._done, self._save)

    def _sampled(self, prompts: Sequence[EncodedPrompt]) -> tuple[Rollout, list[float]]:
        """Responses to the prompts of a round, and what the rules say of each."""
        rollout = self._sampler.rollout(prompts, self._seed(self._done))
        try:
            return rollout, self._rewards.of_rules(rollout)
        except ServerError:
            self._context.checkpoints.rescue(self._done, self._save)
            raise

    def _round(self, number: int, rollout: Rollout, of_rules: Sequence[float]) -> dict[str, float]:
        groups = [
            self._collector.collect(rollout, part, of_rules)
            for part in _split(rollout.trees(), self._learner.minibatches)
        ]
        experiences = [each for group in groups for each in group]
        if number == 0:
            self._scale = Scale.of(torch.cat([each.rewards for each in experiences]), self._settings)
            self._learner.begin(experiences, self._scale, sum(of_rules) / len(of_rules))
            self._look()
        score(experiences, self._settings, self._scale)
        self._learner.prepare(experiences)
        if number == 0:
            self._examine(experiences)
        figures = health.figures(experiences, rollout, self._settings)
        learnt = self._learner.learn(rollout, groups, number, random.Random(f"{self._context.seed} order {number}"))
        scored = self._scoring_roles * sum(each.batch.token_count for each in experiences)
        return figures | learnt | {"tokens": scored + learnt["tokens"]}

    def _look(self, kl: float = 0.0) -> dict[str, float]:
        """See how the policy does on held-out prompts, after a round of such divergence."""
        figures = self.selection.look(self._done, self._scale, kl)
        self.tokens += self._scoring_roles * int(figures.pop("tokens"))
        return figures

    def _examine(self, experiences: list[Experience]) -> None:
        """The preflight, a line for each check."""
        general = preflight.checks(self._roles, experiences, self._settings, self.selection.looks[0])
        for check in (*self._learner.checks(experiences), *general, *self._fits(experiences)):
            self._context.say(f"preflight {check}")
            preflight.require(check, f"stages.{self._context.name}")

    def _fits(self, experiences: list[Experience]) -> Iterator[Check]:
        """Whether a round fits into memory, where the shape of the model is known."""
        if self._fitted.task:
            yield preflight.fits(self._fitted.task, experiences, memory.free(self._roles.base.compute.device))

    def _answers(self) -> Rollout:
        """Responses to the held-out prompts, or to the first training prompts where none is held out."""
        return self._sampler.rollout(self._looked_at, self._seed(LOOK), self._settings.evaluate_samples)

    def _ends(self, raised: Sequence[Raised]) -> bool:
        """Tell of alarms; whether one of them ends the training."""
        ends = [alarm.name for alarm in raised if alarm.name in self._settings.stop_on]
        for alarm in raised:
            line = f"alarm after round {self._done}: {alarm}" + ("; training ends here" if alarm.name in ends else "")
            self._context.say(line)
            self.warnings.append(line)
        return bool(ends)

    def _resume(self) -> None:
        """Go on from the stage's checkpoint, if there is one."""
        directory = self._context.checkpoints.resume()
        if directory is None:
            return
        state = checkpoint.load(directory)
        self._learner.load_state(state.part("learner"))
        self.selection.load_state(state.part("selection"))
        self._health.load_state(state.part("health"))
        checkpoint.restore_random_state(state.part("random"), self._roles.base.compute.device)
        self._scale = Scale(**state.values["scale"])
        self._done, self._over, self.tokens = (state.values[name] for name in ("done", "over", "tokens"))
        self.last, self.warnings = state.values["last"], state.values["warnings"]

    def _save(self, directory: Path) -> None:
        parts = {
            "learner": self._learner.state(),
            "selection": self.selection.state(),
            "health": self._health.state(),
            "random": checkpoint.random_state(self._roles.base.compute.device),
        }
        values = {"done": self._done, "over": self._over, "tokens": self.tokens, "last": self.last}
        state = joined(parts, **values, warnings=self.warnings, scale=asdict(self._scale))
        checkpoint.save(directory, state)

    @property
    def _scoring_roles(self) -> int:
        """Roles that compute every token of a rollout before the updates."""
        return 2 + sum(self._roles.has(role) for role in (REWARD, VALUE))

    def _seed(self, number: int) -> int:
        """Seed of a round's sampling."""
        return random.Random(f"{self._context.seed} round {number}").getrandbits(32)


def _split(trees: Sequence[Tree], parts: int) -> list[Sequence[Tree]]:
    size = len(trees) // parts
    return [trees[start : start + size] for start in range(0, len(trees), size)]


def _metrics(history: Sequence[dict[str, float]]) -> dict[str, Metric]:
    """Means over the last rounds."""
    last = history[-LAST_ROUNDS:]
    names = ("reward", "kl", "entropy", "ended", "length", "clip_fraction", "explained_variance")
    found = {name: [each[name] for each in last if name in each] for name in names}
    return {name: Metric(value=sum(each) / len(each), n=len(each)) for name, each in found.items() if each}
