"""Mirrors of `metrics.jsonl` in trackers: TensorBoard, Weights & Biases, MLflow, Trackio.

The file is what happened; a tracker is sent a copy of its records, and only of those that it does not hold yet: a stage
that goes on from a checkpoint hands over the records before it first, and no step is there twice. A tracker works in a
thread of its own and can neither hold a stage up nor stop it. What it is told of a stage is what the manifest will
say: names, the key and settings, which hold no secrets; how it signs in is its own business.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from pipeline.errors import ConfigError
from pipeline.terminal import printable

PATIENCE = 30.0
"""Seconds that a tracker has at the end of a stage for what it was sent."""
LEFT_OUT = ("step", "total")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Tracked:
    """A stage, as trackers know it."""

    run: str
    """Name of the run: that of its directory."""
    root: Path
    """The run directory."""
    stage: str
    kind: str
    key: str
    """The hard key: an attempt with the same key goes on where another was stopped."""
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Tells attempts with different settings apart."""
        return f"{self.stage}-{self.key[:8]}"


class Tracker(Protocol):
    """Where records are mirrored."""

    def open(self, tracked: Tracked) -> int:
        """Begin or go on; returns the last step that is there, 0 when there is none."""

    def log(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        """One step."""

    def close(self) -> None:
        """All is sent."""


class TensorBoard:
    """Event files in `RUN/tensorboard/STAGE-KEY`, written anew by each attempt from the file's first record."""

    def open(self, tracked: Tracked) -> int:
        from tensorboard.summary import Writer

        directory = tracked.root / "tensorboard" / tracked.name
        shutil.rmtree(directory, ignore_errors=True)
        self._writer: Any = Writer(str(directory))
        self._begun = time.time()
        return 0

    def log(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step, wall_time=self._begun + seconds)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases whose id is made of the key, so that an attempt that goes on is the same run."""

    def open(self, tracked: Tracked) -> int:
        import wandb

        # Neither the terminal, the command line nor the repository is sent, as by default they would be.
        quiet = wandb.Settings(console="off", disable_code=True, disable_git=True, x_disable_meta=True)
        self._run: Any = wandb.init(
            project=tracked.run,
            id=tracked.key[:32],
            name=tracked.name,
            job_type=tracked.kind,
            config=dict(tracked.settings),
            dir=str(tracked.root),
            resume="allow",
            reinit="create_new",
            settings=quiet,
        )
        return max(0, int(self._run.step) - 1)  # `step` is the next one

    def log(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of the experiment that is called like Baton's run, on the server that `MLFLOW_TRACKING_URI` names."""

    TAG = "baton.key"

    def open(self, tracked: Tracked) -> int:
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient()
        known = self._client.get_experiment_by_name(tracked.run)
        experiment = known.experiment_id if known else self._client.create_experiment(tracked.run)
        found = self._client.search_runs([experiment], filter_string=f"tags.`{self.TAG}` = '{tracked.key}'")
        if found:
            self._run = found[0].info.run_id
            history = self._client.get_metric_history(self._run, "seconds")
            return max((each.step for each in history), default=0)
        tags = {self.TAG: tracked.key, "baton.kind": tracked.kind}
        self._run = self._client.create_run(experiment, run_name=tracked.name, tags=tags).info.run_id
        return 0

    def log(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in figures.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackio:
    """A run in Trackio's local database, written anew by each attempt from the file's first record."""

    def open(self, tracked: Tracked) -> int:
        import trackio

        try:
            before = [each for each in trackio.Api().runs(tracked.run) if each.name == tracked.name]
        except ValueError:  # there is no such project yet
            before = []
        for each in before:
            each.delete()
        self._run: Any = trackio.init(
            project=tracked.run,
            name=tracked.name,
            config=dict(tracked.settings),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return 0

    def log(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}
"""Name, which is also the package's -> class."""


def require(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed; imports nothing.

    Raises:
        ConfigError: Names the package.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"the package {name} is not installed", where="track", hint=f"pip install {name}")


@contextmanager
def mirrored(names: Sequence[str], tracked: Tracked, say: Callable[[str], None]) -> Iterator[Callable[[Record], None]]:
    """What takes the records of one stage to all trackers, in the order of the file.

    Args:
        names: Keys of `TRACKERS`.
        tracked: The stage.
        say: Where one line is printed when a tracker fails.
    """
    mirrors = [_Mirror(name, TRACKERS[name](), tracked, say) for name in names]

    def send(record: Record) -> None:
        for mirror in mirrors:
            mirror.send(record)

    try:
        yield send
    finally:
        for mirror in mirrors:
            mirror.finish()


class _Mirror:
    """One tracker's thread, which drops what it is sent once the tracker has failed."""

    def __init__(self, name: str, tracker: Tracker, tracked: Tracked, say: Callable[[str], None]) -> None:
        self._name, self._tracker, self._tracked, self._say = name, tracker, tracked, say
        self._records: SimpleQueue[Record | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def send(self, record: Record) -> None:
        self._records.put(record)

    def finish(self) -> None:
        self._records.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._tell(f"did not take all records within {PATIENCE:.0f} s; they are in metrics.jsonl")

    def _tell(self, what: str) -> None:
        self._say(f"{self._tracked.stage}: warning: {self._name} {what}")

    def _work(self) -> None:
        try:
            last = self._tracker.open(self._tracked)
            while (record := self._records.get()) is not None:
                if record["step"] > last:
                    last = record["step"]
                    self._tracker.log(last, record["seconds"], figures(record))
            self._tracker.close()
        except Exception as error:  # whatever a library raises, the stage goes on
            what = printable(" ".join(f"{type(error).__name__}: {error}".split()), 200)
            self._tell(f"failed and gets no more of this stage, which goes on: {what}")


def figures(record: Record) -> dict[str, float]:
    """The finite numbers of a record."""
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
    kept = {name: float(value) for name, value in numbers.items() if name not in LEFT_OUT}
    return {name: value for name, value in kept.items() if math.isfinite(value)}
