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
from bench.ppo_given import Drawn
from bench.ppo_material import stage_context_of
from bench.watch import Phases, Watch, live_parameters
from stages import ppo

NO_TOKEN = -1


class Rounds:
    """Follows the stage from round to round."""

    def __init__(self, job: Job, watch: Watch) -> None:
        self._watch = watch
        self.phases = Phases(job)
        self.last: dict[str, float] = {}
        self.held: dict[str, int] = {}
        self._drawn = Drawn(job)

    def __call__(self, record: Mapping[str, Any], *, done: int, total: int) -> None:
        """Note a round; after the last, the stage need not go on."""
        self._watch.step()
        self.phases.end("training")
        if done == total:
            self.last = {name: record[name] for name in ("reward", "kl", "explained_variance") if name in record}
            self.held |= live_parameters()
            raise LastStepTakenError

    def follow(self) -> None:
        """Have the stage tell when its sampling and its scoring end, and let no token end a response."""
        sample, collect = ppo.sample, ppo.collect

        @wraps(sample)
        def full_length(model: nn.Module, prompts: Sequence[tuple[int, ...]], **options: Any) -> Any:
            self._drawn.require_next(prompts)
            samples = sample(model, prompts, **{**options, "stop_id": NO_TOKEN})
            if {len(each.tokens) for each in samples} != {options["max_new_tokens"]}:
                raise ValueError("a response ended before its full length")
            self.held["base_bytes"] = _base_bytes(model)
            return samples

        ppo.sample = self.phases.marking("rollout", full_length)
        ppo.collect = self.phases.marking("scoring", collect)


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
