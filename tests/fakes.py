"""Stages that write small files at once, a run of them, and `baton` on them.

What a fake stage writes is a function of its settings and inputs, as a real one's is, except for the
tokenizer's, which is always the same. `FAKE_STAGE=NAME:WHAT` makes the stage of that name misbehave. The
report is one line unless `REAL_REPORT` is set.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable, MutableMapping
from pathlib import Path

from pipeline.config import PRODUCES
from pipeline.contract import Context, Result
from pipeline.errors import NumericalError
from pipeline.fingerprint import digest
from pipeline.manifest import Adaptation, DataCard, Metric

CONFIG = """\
output: {root}/run
seed: 1
data:
  text: {{source: {root}/text.jsonl}}
  chats: {{source: {root}/chats.jsonl}}
  pairs: {{source: {root}/pairs.jsonl}}
stages:
  tok: {{kind: tokenizer, data: text}}
  base: {{kind: pretrain, tokenizer: tok, data: text, architecture: {{model_type: llama}}}}
  sft:
    kind: sft
    policy: base
    data: chats
  rm: {{kind: reward, policy: sft, data: pairs}}
  dpo:
    kind: dpo
    policy: sft
    data: pairs
    beta: 0.1
"""
COMMAND = "import fakes; fakes.main()"
"""`baton` on fake stages, for `forks`."""
STAGES = ["tok", "base", "sft", "rm", "dpo"]


def write_world(root: Path) -> Path:
    """Three data files and the configuration of a five-stage run; returns the configuration's path."""
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    rows: dict[str, list[dict[str, object]]] = {
        "text": [{"text": f"Sentence {number}."} for number in range(8)],
        "chats": [{"messages": turns} for _ in range(8)],
        "pairs": [{"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": "No."} for number in range(8)],
    }
    for name, lines in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = root / "config.yaml"
    config.write_text(CONFIG.format(root=root))
    return config


def run_stage(context: Context) -> Result:
    """A stage's `run`: logs three steps, writes weights, reports a metric."""
    kind = context.settings.kind
    inputs = {role: artifact.digest for role, artifact in context.inputs.items()}
    settings = {name: value for name, value in context.settings.model_dump(mode="json").items() if name not in inputs}
    made_from = "constant" if kind == "tokenizer" else [inputs, settings, context.seed]
    context.say(f"making {kind}")
    for step in range(3):
        context.progress({"loss": 1.0 / (step + 1)}, done=step + 1, total=3)
        if step == 1:
            _misbehave(context)
    (context.directory / "nested").mkdir()
    (context.directory / "nested" / "weights.safetensors").write_text(digest(made_from))
    (context.directory / "nested" / "weights.safetensors").chmod(0o600)
    policy = context.inputs.get("policy")
    base = (policy.base or policy) if policy else None
    return Result(
        kind=PRODUCES[kind][0],
        metrics={"accuracy": Metric(value=0.5, low=0.25, high=0.75, n=4)},
        data=[
            DataCard(role=role, source=source.source, digest="", format="text", rows=8)
            for role, source in context.data.items()
        ],
        adaptation=Adaptation(base=base.digest, base_source=base.source) if base else None,
        tokens=1000,
        compute={"chosen_device": "cpu"},
    )


def install(modules: MutableMapping[str, types.ModuleType], run: Callable[[Context], Result] = run_stage) -> None:
    """Put fake stage modules where the runner imports the real ones."""
    for kind in PRODUCES:
        module = types.ModuleType(f"stages.{kind}")
        module.run = run  # type: ignore[attr-defined]
        modules[f"stages.{kind}"] = module


def write_report(run: Path) -> Path:
    """A report of one line, at once; the real one draws."""
    path = run / "report.html"
    (run / "report.json").write_text('{"verdict": {"state": "not evaluated", "sentence": ""}}')
    path.write_text(" ".join(sorted(each.name for each in (run / "stages").iterdir())))
    return path


def _misbehave(context: Context) -> None:
    name, _, what = os.environ.get("FAKE_STAGE", "").partition(":")
    if name != context.name:
        return
    (context.directory / "half.safetensors").write_bytes(b"half")
    if what == "nan":
        raise NumericalError("the loss is not finite", where="step 2")
    if what == "bug":
        raise RuntimeError("a bug")
    if what == "tell":
        raise RuntimeError(os.environ["HF_TOKEN"] + " \x1b[31m")
    if what == "link":
        (context.directory / "link").symlink_to("/etc/hostname")
    if what in ("SIGTERM", "SIGINT", "SIGKILL"):
        os.kill(os.getpid(), getattr(signal, what))
    if what == "wait":
        sys.stdout.write("waiting\n")
        sys.stdout.flush()
        while True:
            time.sleep(60)


def main() -> None:
    """The command line on fake stages."""
    install(sys.modules)
    from pipeline import cli, report

    if "REAL_REPORT" not in os.environ:
        report.write = write_report
    cli.main()
