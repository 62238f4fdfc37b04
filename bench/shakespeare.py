"""The recipe `configs/shakespeare.yaml` against the clock, and how well its model knows text that it has not seen.

`python -m bench.pretrain --shakespeare [--repeats 5]` runs the recipe from nothing in processes of their own. The loss
is that of the last tenth of the text, which the recipe must not train on: computed here from the published model alone,
in windows as long as the stage's blocks that lie end to end, in nats per character.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from bench import processes
from bench.comparison import DATA, count

CONFIG = processes.REPOSITORY / "configs" / "shakespeare.yaml"
TEXT = DATA / "tinyshakespeare" / "input.txt"
PACKAGES = ("torch", "transformers")
HELD_OUT = 0.1
WINDOWS = 16
"""Windows that are computed at once."""


def once(config: Path, text: Path, threads: int) -> dict[str, Any]:
    """Wall seconds, those of the stages, and the loss, by the stage itself and by `held_out_loss`."""
    with tempfile.TemporaryDirectory() as directory:
        output, cache = Path(directory) / "run", str(Path(directory) / "cache")
        environment = processes.quiet(threads) | {"BATON_CACHE": cache}
        overrides = [f"data.{name}.source={text}" for name in _sources(config, text)]
        seconds = processes.baton("run", config, f"output={output}", *overrides, **environment)
        manifests = processes.stage_manifests(output)
        stage = next(name for name, each in reversed(manifests.items()) if each["stage_kind"] == "pretrain")
        length = str(manifests[stage]["settings"]["max_length"])
        model = output / "stages" / stage
        found = processes.run("bench.shakespeare", model, text, length, **environment).said
    own = manifests[stage]["metrics"].get("held_out_loss", {}).get("value")
    stages = {name: each["cost"]["seconds"] for name, each in manifests.items()}
    return {"seconds": seconds, "stages": stages, "own_loss": own, **found}


def held_out_loss(model: Path, text: Path, length: int) -> dict[str, float]:
    """Nats per character over the last tenth of a text, and the characters in it."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    from data.tokenizer import load_tokenizer

    content = text.read_text(encoding="utf-8")
    kept = content[int(len(content) * (1 - HELD_OUT)) :]
    tokenizer = load_tokenizer(model)
    ids = torch.tensor(tokenizer(kept, add_special_tokens=False)["input_ids"])
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    starts = range(0, len(ids) - length, length)
    loss = tokens = 0.0
    with torch.no_grad():
        for first in range(0, len(starts), WINDOWS):
            # The last token of a window is the first of the next one, so that every token but one is predicted once.
            rows = torch.stack([ids[start : start + length + 1] for start in starts[first : first + WINDOWS]])
            logits = loaded(input_ids=rows[:, :-1], use_cache=False).logits
            loss += functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
            tokens += rows[:, 1:].numel()
    return {"loss": loss / tokens * len(ids) / len(kept), "characters": len(kept), "tokens": len(ids)}


def main(description: str | None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.pretrain --shakespeare", description=description)
    parser.add_argument("--shakespeare", action="store_true")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--threads", type=count, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--config", type=Path, default=CONFIG, help="another configuration of the same data")
    parser.add_argument("--text", type=Path, default=TEXT, help="(default: tinyshakespeare in BATON_DATA)")
    parser.add_argument("--output", type=Path, default=processes.RESULTS, help="where to write the results")
    chosen = parser.parse_args()
    runs = [once(chosen.config.resolve(), chosen.text, chosen.threads) for _ in range(chosen.repeats)]
    machine = processes.machine(*PACKAGES)
    command = shlex.join(["python", "-m", "bench.pretrain", *sys.argv[1:]])
    text = page(chosen.config, runs, command, chosen.threads, machine)
    sys.stdout.write(text + "\n")
    record = {"command": command, "threads": chosen.threads, "machine": machine, "runs": runs}
    processes.save("shakespeare", record, text, chosen.output)


def page(config: Path, runs: list[dict[str, Any]], command: str, threads: int, machine: dict[str, Any]) -> str:
    """The result in Markdown."""
    rows = [["wall seconds", processes.spread([run["seconds"] for run in runs])]]
    rows += [
        [f"seconds of `{name}`", processes.spread([run["stages"][name] for run in runs])] for name in runs[0]["stages"]
    ]
    rows.append(["loss of the last tenth", processes.spread([run["loss"] for run in runs], 4)])
    if runs[0]["own_loss"] is not None:
        rows.append(["the stage's own held-out loss", processes.spread([run["own_loss"] for run in runs], 4)])
    return "\n\n".join(
        [
            "# tinyshakespeare, from nothing",
            f"`baton run {config.name}`: median [least, most] of {len(runs)} runs, each a process of its "
            "own with an empty token cache, imports included. The loss is in nats per character over the last "
            f"{runs[0]['characters']:,} characters ({runs[0]['tokens']:,} tokens), computed by `bench/shakespeare.py` "
            "from the published model in windows of the stage's block length that lie end to end.",
            processes.table(["", ""], rows),
            f"    {command}",
            f"{threads} threads. {processes.sentence(machine)}",
        ]
    )


def _sources(config: Path, text: Path) -> list[str]:
    """Names of the configuration's data sources that are the text, wherever it lies."""
    sources = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
    found = [name for name, source in sources.items() if Path(str(source["source"])).name == text.name]
    if not found:
        raise SystemExit(f"{config}: no data source reads `{text.name}`")
    return found


if __name__ == "__main__":
    processes.report(**held_out_loss(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
