"""What a stage is given and what it gives back.

A stage is a module `stages.KIND` with `run(context) -> Result`. It reads its inputs, writes its files into
`context.directory`, and returns what its manifest needs to say. It never sees the run directory or another stage's
temporary files; publishing is the runner's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.config import DataSource, StageSettings
from pipeline.manifest import Adaptation, DataCard, Manifest, MemoryEstimate, Metric


@dataclass(frozen=True)
class Artifact:
    """An input that was verified: a stage directory with its manifest, or a foreign model directory without one."""

    directory: Path
    kind: str
    digest: str
    manifest: Manifest | None = None
    source: str = ""
    """The reference in the configuration: a stage name, a path or `hub:owner/name@revision`."""
    base: Artifact | None = None
    """For adapters and reward models: the model that they sit on."""


class Progress(Protocol):
    """How a stage tells the runner where it is."""

    def __call__(self, record: Mapping[str, Any], *, done: int, total: int) -> None:
        """Log one record (numbers and short strings) after `done` of `total` steps."""


class Checkpoints(Protocol):
    """Where a stage that takes steps leaves its state between them, and finds it when it was stopped before.

    All state that steps change belongs in a checkpoint, that of random generators included: a stage that goes on ends
    as one that was never stopped.
    """

    def resume(self) -> Path | None:
        """Directory of the checkpoint to go on from; None at the beginning. The log is what it was then."""

    def steps(self, size: int) -> AbstractContextManager[None]:
        """Goes around all steps: within, a signal lets the step in progress end and leave a checkpoint.

        Args:
            size: About as many bytes as a checkpoint will have.

        Raises:
            StorageError: There is no space for checkpoints.
        """

    def after(self, step: int, write: Callable[[Path], None]) -> None:
        """Called when a step is over and its record logged; where a checkpoint is due, `write` fills its directory.

        Args:
            step: Steps that were taken.
            write: Writes the state into an empty directory.

        Raises:
            KeyboardInterrupt: A signal came; the checkpoint is there.
        """

    def tokens_per_batch(self) -> int | None:
        """Tokens of the batches with which the checkpoint to go on from was made; None where there is none, or it does
        not say."""

    def made_with(self, tokens_per_batch: int) -> None:
        """Called before the first step: checkpoints will say so."""

    def rescue(self, step: int, write: Callable[[Path], None]) -> None:
        """Called where the next step cannot be taken for something that is none of the stage's, as a server that is
        down: leaves a checkpoint of the steps so far, if there is none, before the error ends the stage."""


class NoCheckpoints:
    """Nothing is found and nothing kept, as for a stage that is called by hand."""

    def resume(self) -> None:
        """Begin."""

    def steps(self, size: int) -> AbstractContextManager[None]:
        """Signals do what they do."""
        return nullcontext()

    def after(self, step: int, write: Callable[[Path], None]) -> None:
        """Go on."""

    def tokens_per_batch(self) -> None:
        """There is none."""

    def made_with(self, tokens_per_batch: int) -> None:
        """Nobody asks."""

    def rescue(self, step: int, write: Callable[[Path], None]) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class Context:
    """Everything a stage may use."""

    name: str
    settings: Any
    """The stage's own settings, a subclass of `StageSettings`."""
    inputs: Mapping[str, Artifact]
    """By role, as `StageSettings.roles()` names them."""
    data: Mapping[str, DataSource]
    """By data role, as `StageSettings.data_roles()` names them; evaluation suites as `suites.NAME`."""
    directory: Path
    """An empty directory that the stage fills; it becomes the stage directory."""
    progress: Progress
    say: Callable[[str], None]
    """Print one line for the user."""
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    memory: int | None = None
    """Bytes that the stage may plan with at most, where the user set a limit."""
    sources: Mapping[str, DataSource] = field(default_factory=dict)
    """All data sources of the run by name, which a source's preparation may refer to."""
    trained: tuple[str, ...] = ()
    """Names of the sources of which the run's stages learn the answers to prompts."""
    pretrained: tuple[str, ...] = ()
    """Names of the sources that the run's stages read as text."""
    evaluated: tuple[str, ...] = ()
    """Names of the sources whose held-out rows the run's models are evaluated on, and the stage must not train on."""
    checkpoints: Checkpoints = field(default_factory=NoCheckpoints)
    """Where a stage that takes steps goes on, and leaves what it would go on from."""


@dataclass
class Result:
    """What a stage reports; together with its files it becomes the manifest."""

    kind: str
    """`tokenizer`, `model`, `adapter`, `reward` or `evaluation`."""
    metrics: dict[str, Metric] = field(default_factory=dict)
    data: list[DataCard] = field(default_factory=list)
    adaptation: Adaptation | None = None
    """For adapters, reward models and merged models: which base, which reference, merged or not."""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Digest of the tokenizer, digest of the chat template, special ids, vocabulary size."""
    tokens: int = 0
    """Tokens that went through the model in training or sampling."""
    compute: dict[str, str] = field(default_factory=dict)
    """Device and dtype that were chosen."""
    expected_memory: MemoryEstimate | None = None
    """What the stage was expected to take, where the shape of its model is known."""
    warnings: list[str] = field(default_factory=list)


__all__ = ["Artifact", "Checkpoints", "Context", "NoCheckpoints", "Progress", "Result", "StageSettings"]
