"""The recipe `configs/shakespeare.yaml` against the clock, and how well its model knows text that it has not seen.

`python -m bench.pretrain --shakespeare [--repeats 5]` runs the recipe from nothing on the first nine tenths of the
text, each run in processes of its own. The loss is that of the last tenth, computed here from the published model
alone, in nats per character. The tenth is cut into windows as long as the stage's blocks that lie end to end, and a
character is predicted from those before it in its window: for blocks of 64 characters this is what nanoGPT's recipe
for a processor evaluates, whose loss of 1.88 is the target.
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
TRAINED = "shakespeare.txt"
"""The file that the recipe reads."""
PACKAGES = ("torch", "transformers")
TRAINED_SHARE = 0.9
WINDOWS = 16
"""Windows that are computed at once."""
MOST_SECONDS, HIGHEST_LOSS = 30.0, 1.88


def once(config: Path, text: Path, threads: int) -> dict[str, Any]:
    """Wall seconds, those of the stages, and the loss as `held_out_loss` has it."""
    with tempfile.TemporaryDirectory() as directory:
        output, trained = Path(directory) / "run", Path(directory) / TRAINED
        trained.write_text(divided(text)[0], encoding="utf-8")
        environment = processes.quiet(threads) | {"BATON_CACHE": str(Path(directory) / "cache")}
        overrides = [f"data.{name}.source={trained}" for name in _sources(config)]
        seconds = processes.baton("run", config, f"output={output}", *overrides, **environment)
        manifests = processes.stage_manifests(output)
        stage = next(name for name, each in reversed(manifests.items()) if each["stage_kind"] == "pretrain")
        length = str(manifests[stage]["settings"]["max_length"])
        found = processes.run("bench.shakespeare", output / "stages" / stage, text, length, **environment).said
    stages = {name: each["cost"]["seconds"] for name, each in manifests.items()}
    return {"seconds": seconds, "stages": stages, "length": int(length), **found}


def divided(text: Path) -> tuple[str, str]:
    """The part of a text to train on, its first nine tenths by characters, and the rest."""
    content = text.read_text(encoding="utf-8")
    end = int(len(content) * TRAINED_SHARE)
    return content[:end], content[end:]


def held_out_loss(model: Path, text: Path, length: int) -> dict[str, float]:
    """Nats per character over the last tenth of a text, and the characters in it."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    from data.tokenizer import load_tokenizer

    kept = divided(text)[1]
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
    parser.add_argument("--config", type=Path, default=CONFIG, help=f"another configuration that reads {TRAINED}")
    parser.add_argument("--text", type=Path, default=TEXT, help="(default: tinyshakespeare in BATON_DATA)")
    parser.add_argument("--output", type=Path, default=processes.RESULTS, help="where to write the results")
    chosen = parser.parse_args()
    if not chosen.text.is_file():
        raise SystemExit(f"no {chosen.text}: set BATON_DATA to the folder with tinyshakespeare, or give --text")
    runs = [once(chosen.config.resolve(), chosen.text, chosen.threads) for _ in range(chosen.repeats)]
    machine = processes.machine(*PACKAGES)
    command = shlex.join(["python", "-m", "bench.pretrain", *sys.argv[1:]])
    text = page(chosen.config, runs, command, chosen.threads, machine)
    sys.stdout.write(text + "\n")
    record = {"command": command, "threads": chosen.threads, "machine": machine, "runs": runs}
    processes.save("shakespeare", record, text, chosen.output)


def page(config: Path, runs: list[dict[str, Any]], command: str, threads: int, machine: dict[str, Any]) -> str:
    """The result in Markdown."""
    stages = list(runs[0]["stages"])
    headings = ["run", "wall seconds", *(f"seconds of `{name}`" for name in stages), "loss of the last tenth"]
    rows = [
        [str(number), *(f"{each:.1f}" for each in (run["seconds"], *run["stages"].values())), f"{run['loss']:.4f}"]
        for number, run in enumerate(runs, 1)
    ]
    return "\n\n".join(
        [
            "# tinyshakespeare, from nothing",
            f"`baton run {config.name}` on the first nine tenths of the text: each run is a process of its own with an "
            "empty token cache, timed from its start to its end, imports included. The loss is in nats per character "
            f"over the last {runs[0]['characters']:,} characters ({runs[0]['tokens']:,} tokens), computed by "
            f"`bench/shakespeare.py` from the published model in windows of {runs[0]['length']} tokens that lie end to "
            "end, the length of the stage's blocks; nanoGPT, too, evaluates in blocks as long as it trains on.",
            processes.table(headings, rows),
            verdict(runs),
            f"    {command}",
            f"{threads} threads. {processes.sentence(machine)}",
        ]
    )


def verdict(runs: list[dict[str, Any]]) -> str:
    """Whether every run met the target."""
    met = sum(run["seconds"] <= MOST_SECONDS and run["loss"] <= HIGHEST_LOSS for run in runs)
    word = "met" if met == len(runs) else "missed"
    kept = f"{met} of {len(runs)} runs keep to both"
    return f"Target: <= {MOST_SECONDS:.0f} s and <= {HIGHEST_LOSS}: {word} ({kept})."


def _sources(config: Path) -> list[str]:
    """Names of the configuration's data sources that are the text, wherever it lies."""
    sources = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
    found = [name for name, source in sources.items() if Path(str(source["source"])).name == TRAINED]
    if not found:
        raise SystemExit(f"{config}: no data source reads `{TRAINED}`")
    return found


if __name__ == "__main__":
    processes.report(**held_out_loss(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
