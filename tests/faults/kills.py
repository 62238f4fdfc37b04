"""kill -9 at random times over the whole chain, which is really trained: how it ends is how it would have ended.

Times are uniform over what an uninterrupted run takes. A run that was killed is started again, and killed again, until
it gets through; then all content digests, metrics and logs, but for times, are compared with the uninterrupted run's.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft  # noqa: F401  what a process that is forked later needs, it has
import torch
from transformers.models.gpt2 import modeling_gpt2  # noqa: F401

import stages.dpo
import stages.ppo
import stages.pretrain
import stages.reward
import stages.sft
import stages.tokenizer  # noqa: F401
from pipeline import cli, report
from pipeline.errors import BatonError

from . import children, runs

CHAIN = """\
output: {root}/run
device: cpu
dtype: float32
checkpoint_minutes: 0
data:
  corpus: {{source: "world:corpus", rows: 40, held_out: 0.2}}
  demonstrations: {{source: "world:demonstrations", rows: 24, held_out: 0.2}}
  preferences: {{source: "world:preferences", rows: 24, held_out: 0.2}}
  prompts: {{source: "world:prompts", rows: 24, held_out: 0.2}}
stages:
  tokenizer: {{kind: tokenizer, data: corpus, vocab_size: 300}}
  base: {{kind: pretrain, tokenizer: tokenizer, data: corpus, max_length: 32, steps: 4, examples_per_step: 4,
    architecture: {{model_type: gpt2, n_embd: 16, n_layer: 2, n_head: 2, n_positions: 256, resid_pdrop: 0.1,
    embd_pdrop: 0.1}}, optimizer: {{name: muon, learning_rate: 0.01}}}}
  sft: {{kind: sft, policy: base, data: demonstrations, steps: 4, examples_per_step: 4, lora: {{rank: 2}},
    optimizer: {{learning_rate: 0.01}}}}
  reward: {{kind: reward, policy: sft, data: preferences, steps: 4, examples_per_step: 4, lora: {{rank: 2}},
    optimizer: {{learning_rate: 0.01}}}}
  dpo: {{kind: dpo, policy: sft, data: preferences, steps: 4, examples_per_step: 4, lora: {{rank: 2}},
    optimizer: {{learning_rate: 0.01}}}}
  ppo: {{kind: ppo, policy: sft, reward: reward, data: prompts, steps: 3, examples_per_step: 4, minibatches: 2,
    samples_per_prompt: 2, max_new_tokens: 4, evaluate_every: 2, evaluate_rows: 2, lora: {{rank: 2}},
    optimizer: {{learning_rate: 0.01}}, value_learning_rate: 0.01}}
"""


@dataclass(frozen=True)
class Trial:
    """A run that was killed until it got through."""

    killed_after: list[float]
    """Seconds of every attempt that was killed."""
    alike: bool
    """Whether it ended as the uninterrupted one."""
    whole: bool
    """Whether all that was there after every kill was complete."""


def whole(root: Path) -> tuple[dict[str, Any], float]:
    """The results of an uninterrupted run, and its seconds."""
    place = root / "uninterrupted"
    _configure(place)
    began = time.monotonic()
    code = children.run(partial(_run, place), root / "output")
    assert code == 0, (root / "output").read_text(encoding="utf-8")
    return runs.results(place), time.monotonic() - began


def trials(root: Path, kills: int, seed: int) -> Iterator[Trial]:
    """Runs that are killed, until there were so many kills."""
    expected, seconds = whole(root)
    generator = random.Random(seed)
    done = 0
    while done < kills:
        place = root / "killed"
        _configure(place)
        killed_after, complete = [], True
        while done < kills:
            wait = generator.uniform(0, seconds)
            code = _killed_after(wait, place, root / "output")
            if code == 0:
                break
            assert code == -signal.SIGKILL, (root / "output").read_text(encoding="utf-8")
            done += 1
            killed_after.append(wait)
            complete = complete and _is_whole(place)
        code = children.run(partial(_run, place), root / "output")
        yield Trial(killed_after, code == 0 and runs.results(place) == expected, complete)
        shutil.rmtree(place)


def _killed_after(seconds: float, place: Path, output: Path) -> int:
    """The exit code of a run that is killed after so long, if it is not over before."""
    child = children.start(partial(_run, place), output)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return children.ended(child)


def _is_whole(place: Path) -> bool:
    try:
        runs.require_whole(place)
    except (AssertionError, BatonError):
        return False
    return True


def _configure(place: Path) -> None:
    place.mkdir()
    (place / "config.yaml").write_text(CHAIN.format(root=place), encoding="utf-8")


def _run(place: Path) -> int:
    torch.set_num_threads(1)
    os.environ["BATON_CACHE"] = str(place / "cache")
    report.write = runs.fakes.write_report
    return cli.execute(cli.app, ["run", str(place / "config.yaml")])
