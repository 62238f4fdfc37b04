"""Every error a user can cause or meet: what happened, where, how to fix it, and the exit code it ends with.

`ValueError` and `assert` elsewhere in Baton mean a bug in Baton; these classes mean something the user can act on.
"""

from __future__ import annotations

import signal
from pathlib import Path

from pipeline.terminal import printable


class BatonError(Exception):
    """An error with a remedy.

    Args:
        what: What is wrong, with the offending value.
        where: The place: `file:line`, a stage, a path. Empty only when there is none.
        hint: What to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | Path = "", hint: str = "") -> None:
        self.what = what
        self.where = printable(str(where), None)
        self.hint = hint
        super().__init__(self.render())

    def render(self) -> str:
        """The message as printed: `where: what` and, on a line of its own, the hint."""
        place = f"{self.where}: " if self.where else ""
        remedy = f"\n  fix: {self.hint}" if self.hint else ""
        return f"{place}{self.what}{remedy}"

    def in_a_line(self) -> str:
        """The same for a list of warnings."""
        return self.render().replace("\n  fix: ", "; ")


class ConfigError(BatonError):
    """The configuration or the command line is wrong."""

    exit_code = 2


class DataError(BatonError):
    """A data file is missing, malformed or does not hold what the stage needs."""

    exit_code = 3


class NumericalError(BatonError):
    """A loss, gradient or weight is not finite; raised before the optimizer step that it would have spoiled."""

    exit_code = 4


class RequirementError(BatonError):
    """A figure of an evaluation is not what the configuration requires; all is published nevertheless."""

    exit_code = 4


class ArtifactError(BatonError):
    """A stage directory or model is damaged, or does not fit what it is used for."""

    exit_code = 5


class OtherVersionError(ArtifactError):
    """A record is whole, and of a schema that this version of Baton does not read."""


class StorageError(BatonError):
    """No space, or no permission to write."""

    exit_code = 6


class ServerError(BatonError):
    """A reward server or a judge is out of reach, or does not answer as the protocol says."""

    exit_code = 69


class BusyError(BatonError):
    """Another process holds the run directory."""

    exit_code = 75


class Interrupted(BatonError):
    """A signal stopped the run; what was published before it is intact.

    SIGUSR1, by which schedulers announce that a job's time runs out, ends with the code that asks for another try.
    """

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 75 if signal_number == signal.SIGUSR1 else 128 + signal_number
        super().__init__(
            f"stopped by signal {signal_number}",
            hint="run the same command again: finished stages are kept, and training goes on from its checkpoint",
        )
