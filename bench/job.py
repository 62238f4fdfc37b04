"""One training of one side, as a file that a process is started with."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and how; both sides are given the same."""

    kind: str
    """`sft`, `reward`, `dpo`, `pretrain` or `ppo`."""
    material: str
    """Directory that `bench.material` has made: the base, the rows and their tokens."""
    data: str
    """File of preference pairs, in any layout that Baton reads."""
    steps: int
    """Optimizer steps, those of the warm-up included."""
    examples_per_step: int
    max_length: int
    """Longest example in tokens; for pretraining, the tokens of every block."""
    learning_rate: float
    device: str
    dtype: str
    seed: int = 0
    quantization: str = "none"
    """Of the base that Baton's side of the PPO comparison adapts: `none`, `4bit` or `8bit`."""
    reward_steps: int = 40
    """Of the training of the reward model that the PPO comparison needs."""
    reward_rows: int = 128
    """Held-out pairs on which that reward model is judged."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of Baton's stage."""
    variant: str = ""
    """Which way the peer computes; see `bench.peer`."""
    result: str = ""
    """Where to keep what was trained; empty ends the process after the last step, nothing evaluated or stored."""

    @property
    def directory(self) -> Path:
        """The material's directory."""
        return Path(self.material)

    @property
    def source(self) -> Path:
        """What Baton's stage reads: of text all, of pairs those that were taken."""
        return Path(self.data) if self.kind == "pretrain" else self.directory / "rows.jsonl"

    @property
    def base(self) -> Path:
        """The model that both sides start from."""
        return self.directory / "base"

    def write(self, path: Path) -> Path:
        """Store the job; returns the path."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Job:
        """A job that was stored."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))
