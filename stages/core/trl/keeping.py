"""The callback that keeps checkpoints of a trainer of TRL, and what it takes to go on from one exactly.

A trainer's own checkpoints are pickles, which Baton neither writes nor reads. They are not needed either: rows and
their order are the stage's, so that a trainer that goes on is a new one which is given the rows that are left, and,
when it begins its first step, the trained weights, the optimizer's memory and the random states of the one that was
stopped. Not earlier: what a trainer makes of its policy beforehand, as its reference, it makes of the policy's start.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.config import TrlSettings
from pipeline.contract import Checkpoints, Context, NoCheckpoints
from stages.core import checkpoint
from stages.core.checkpoint import State, joined
from stages.core.trained import Trained
from stages.core.trl.following import Follower


class Keeper(TrainerCallback):
    """Leaves checkpoints between steps, and takes up the one that the stage goes on from.

    Args:
        context: The stage's.
        follower: What has counted the steps; its callbacks come before these.
    """

    def __init__(self, context: Context, follower: Follower) -> None:
        self._follower = follower
        self._checkpoints: Checkpoints = context.checkpoints
        self._trained: Trained
        self._found: State | None = None
        obstacle = _obstacle(context.settings)
        if obstacle:
            self._checkpoints = NoCheckpoints()
            context.say(f"keeps no checkpoint, and begins anew if it is stopped: {obstacle}")
        directory = self._checkpoints.resume()
        if directory is not None:
            self._found = checkpoint.load(directory)
            follower.load_state(self._found.part("follower"))

    def steps(self, trained: Trained) -> AbstractContextManager[None]:
        """Goes around the steps in which so much is trained."""
        self._trained = trained
        return self._checkpoints.steps(trained.size)

    def take_up(self, trained: Trained) -> None:
        """Go on from the checkpoint, if there is one."""
        if self._found is None:
            return
        trained.load_state(self._found.part("trained"))
        checkpoint.restore_random_state(self._found.part("random"), trained.device)
        self._found = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.take_up(self._trained)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:  # no step comes before the summary at the end
            self._checkpoints.after(self._follower.taken, self._save)

    def _save(self, directory: Path) -> None:
        random = checkpoint.random_state(self._trained.device)
        parts = {"trained": self._trained.state(), "follower": self._follower.state(), "random": random}
        checkpoint.save(directory, joined(parts))


def _obstacle(settings: TrlSettings) -> str | None:
    """What a trainer keeps over steps besides what is trained, so that another one could not go on from there."""
    given = settings.arguments
    per_step = settings.examples_per_step // settings.examples_per_batch
    if settings.trainer == "A2PO":
        return "A2PO samples what its prompts are worth before the first step"
    if given.get("sync_ref_model"):
        return "with sync_ref_model the reference moves"
    if given.get("use_adaptive_entropy"):
        return "with use_adaptive_entropy the bonus follows the entropy of the steps before"
    if given.get("num_iterations", 1) != 1 or per_step % (given.get("steps_per_generation") or per_step):
        return "responses are used in more steps than one"
    return None
