"""Baton's side of the PPO comparison: the real stage, whose calls of sampling and scoring are followed.

`python -m bench.ppo_ours JOB`. No token ends a response, as on the peer's side: sampling is told of a stop token that
does not exist.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from bench.job import Job
from bench.ours import LastStepTakenError
from bench.ppo_given import Drawn, settings
from bench.ppo_material import stage_context_of
from bench.watch import Phases, Watch, live_parameters
from stages import ppo
from stages.core.rl import sampling
from stages.core.rl.experience import Collector
from stages.core.rl.prompts import EncodedPrompt
from stages.core.rl.sampling import Rollout, Sampler
from stages.core.rollout import Sample

NO_TOKEN = -1
FIGURES = ("reward", "kl", "explained_variance")


class Rounds:
    """Follows the stage from round to round."""

    def __init__(self, job: Job, watch: Watch) -> None:
        self._watch, self._steps = watch, job.steps
        self._length = settings(job).max_new_tokens
        self.phases = Phases(job)
        self.last: dict[str, float] = {}
        self.held: dict[str, int] = {}
        self._drawn = Drawn(job)

    def __call__(self, record: Mapping[str, Any], *, done: int, total: int) -> None:
        """Note a round; after the last, the stage need not go on."""
        self._watch.step()
        self.phases.end("training")
        if done == self._steps:
            self.last = {name: record[name] for name in FIGURES if name in record}
            self.held |= live_parameters()
            raise LastStepTakenError

    def follow(self) -> None:
        """Have the stage tell when its sampling and its scoring end, and let no token end a response."""
        sample, rollout, collect = sampling.sample, Sampler.rollout, Collector.collect

        @wraps(sample)
        def full_length(model: nn.Module, prompts: Sequence[tuple[int, ...]], **options: Any) -> list[Sample]:
            self.held["base_bytes"] = _base_bytes(model)
            return sample(model, prompts, **{**options, "stop_id": NO_TOKEN})

        @wraps(rollout)
        def followed(sampler: Sampler, prompts: Sequence[EncodedPrompt], *options: Any) -> Rollout:
            found = rollout(sampler, prompts, *options)
            if len(options) == 1:  # a look at held-out prompts says how many responses it wants
                self._require(found)
                self.phases.mark("rollout")
            return found

        sampling.sample, Sampler.rollout = full_length, followed
        Collector.collect = self.phases.marking("scoring", collect)

    def _require(self, rollout: Rollout) -> None:
        self._drawn.require_next([each.tokens for each in rollout.prompts])
        if {len(each.tokens) for each in rollout.samples} != {self._length}:
            raise ValueError("a response ended before its full length")


def main() -> None:
    """Run one job."""
    job = Job.read(Path(sys.argv[1]))
    watch = Watch(job)
    rounds = Rounds(job, watch)
    rounds.follow()
    directory = job.directory / "ours"
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(LastStepTakenError):
        ppo.run(stage_context_of(job, directory, progress=rounds))
    watch.report([], phases=rounds.phases.steps, last=rounds.last, **rounds.held)


def _base_bytes(model: nn.Module) -> int:
    """What the model's own weights take, those of adapters apart; each storage once."""
    own = [each for name, each in model.named_parameters() if ".lora_" not in name]
    return sum({each.untyped_storage().data_ptr(): each.nbytes for each in own}.values())


if __name__ == "__main__":
    main()
