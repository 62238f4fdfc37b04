"""When a running stage leaves a checkpoint, and where it goes on: the runner's side of `contract.Checkpoints`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline import checkpoints, store
from pipeline.checkpoints import Maker
from pipeline.interruption import Interruption
from pipeline.progress import FILE_NAME, StageProgress

KEPT = 2
"""Should the newest be damaged, there is another."""
MARGIN = 1.2
"""Of the space that must be free to that of the checkpoints."""


class StageCheckpoints:
    """The checkpoints of one attempt at a stage.

    A checkpoint also holds what was logged until then, so that the log of a stage that went on is that of one which
    never stopped.

    Args:
        directory: Where the stage's checkpoints are.
        maker: The stage as it runs now.
        minutes: At least so long between two checkpoints; 0 makes one after every step.
        progress: The stage's.
        interruption: Where signals arrive.
        clock: Seconds; for tests.
    """

    def __init__(
        self,
        directory: Path,
        maker: Maker,
        minutes: float,
        progress: StageProgress,
        interruption: Interruption,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._maker = maker
        self._seconds = 60 * minutes
        self._progress = progress
        self._interruption = interruption
        self._clock = clock
        self._last = clock()
        self._kept: list[Path] = []
        self._tokens: int | None = None

    def resume(self) -> Path | None:
        """The newest checkpoint that is intact and this stage's own; others are named with what is wrong with them."""
        found, passed = checkpoints.newest(self._directory, self._maker)
        for reason in passed:
            self._progress.say(f"checkpoint not used: {reason}")
        if found is None:
            return None
        self._progress.say(f"goes on after step {checkpoints.step_of(found)}")
        self._progress.take_up(found / FILE_NAME)
        self._kept = [found]
        return found

    @contextlib.contextmanager
    def steps(self, size: int) -> Iterator[None]:
        """The time between checkpoints counts from here.

        Raises:
            StorageError: There is no space for those that are kept and one that is being written.
        """
        missing = KEPT + 1 - len(self._kept)
        store.require_space(self._directory, round(MARGIN * missing * size), f"for {missing} checkpoints")
        self._last = self._clock()
        with self._interruption.step_by_step():
            yield

    def after(self, step: int, write: Callable[[Path], None]) -> None:
        """Make a checkpoint if it is time, or if a signal came; then the stage stops here."""
        if not self._interruption.came and self._clock() - self._last < self._seconds:
            return
        self._make(step, write)
        if self._interruption.came:
            self._progress.say(f"stopped after step {step}, with a checkpoint")
        self._interruption.stop_if_it_came()

    def tokens_per_batch(self) -> int | None:
        """As far as the records tell; nothing is hashed."""
        return checkpoints.tokens_per_batch(self._directory, self._maker)

    def made_with(self, tokens_per_batch: int) -> None:
        """For the records of the checkpoints to come."""
        self._tokens = tokens_per_batch

    def rescue(self, step: int, write: Callable[[Path], None]) -> None:
        """Make a checkpoint, unless that of this step is there; what keeps it from being made hides no other error."""
        if step == 0 or (self._kept and checkpoints.step_of(self._kept[-1]) == step):
            return
        try:
            self._make(step, write)
        except Exception as error:
            self._progress.say(f"no checkpoint of step {step}: {error}")
        else:
            self._progress.say(f"stopped after step {step}, with a checkpoint")

    def _make(self, step: int, write: Callable[[Path], None]) -> None:
        def fill(work: Path) -> None:
            write(work)
            self._progress.copy_to(work / FILE_NAME)

        made = checkpoints.publish(self._directory, self._maker, step, fill, self._tokens)
        self._kept = [*self._kept[-(KEPT - 1) :], made]
        checkpoints.keep(self._directory, self._kept)
        self._last = self._clock()
