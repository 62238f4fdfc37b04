"""What a training has led to on held-out rows, computed for both sides by the same plain code.

`python -m bench.judge JOB` looks at the job's `result`. Rows are computed one by one without padding, packing or trees;
adapters are added to the base's matrices, so neither Baton nor peft nor TRL has a say.

sft, pretrain   `loss`: nats per trained token
reward          `accuracy`: share of the pairs in which the chosen response scores higher
dpo             `accuracy`: share of the pairs whose margin over the base is positive
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench import processes
from bench.job import Job
from bench.rows import IGNORED, Row, labels, paths, read
from pipeline.manifest import Metric
from reward.head import ScalarHead
from reward.intervals import proportion_interval, ratio_interval

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


@torch.no_grad()
def judge(job: Job) -> tuple[str, Metric]:
    """The name of the figure, and the figure with its 95% interval."""
    rows = read(job.directory / "held-out.jsonl")
    if job.kind == "reward":
        return "accuracy", _accuracy(_scores(job, rows))
    found = _logprobs(_trained(job), rows)
    if job.kind == "dpo":
        before = _logprobs(_load(job, job.base), rows)
        return "accuracy", _accuracy([_differences(*pair) for pair in zip(found, before, strict=True)])
    reads = [sum(label != IGNORED for label in labels(row)[0]) for row in rows]
    return "loss", ratio_interval([-each[0] for each in found], reads)


def _accuracy(values: list[list[float]]) -> Metric:
    """Share of the rows whose first value is the larger one."""
    return proportion_interval(sum(first > last for first, *_, last in values), len(values))


def _differences(now: list[float], before: list[float]) -> list[float]:
    return [one - other for one, other in zip(now, before, strict=True)]


def _scores(job: Job, rows: list[Row]) -> list[list[float]]:
    """The score at the last token of every response."""
    model, result = _trained(job), Path(job.result)
    if (result / "head.safetensors").is_file():
        head = ScalarHead.load(result, model.config.hidden_size)
    else:
        head = _head_of_classifier(load_file(result / ADAPTER), model.config.hidden_size)
    head.to(model.device)
    return [[float(head(_states(model, path)[-1:])) for path in paths(row)] for row in rows]


def _head_of_classifier(tensors: dict[str, Tensor], width: int) -> ScalarHead:
    (weight,) = (tensor for name, tensor in tensors.items() if ".score." in name)
    head = ScalarHead(width)
    head.linear.weight.copy_(weight.float())
    return head


def _logprobs(model: PreTrainedModel, rows: list[Row]) -> list[list[float]]:
    """Summed log-probability of the trained tokens of every response."""
    found = []
    for row in rows:
        both = zip(paths(row), labels(row), strict=True)
        found.append([_logprob(model, path, trained) for path, trained in both])
    return found


def _logprob(model: PreTrainedModel, path: list[int], trained: list[int]) -> float:
    logits = model.get_output_embeddings()(_states(model, path)[:-1]).float()
    targets = torch.tensor(trained[1:], device=model.device)
    return -float(functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))


def _states(model: PreTrainedModel, path: list[int]) -> Tensor:
    """Final hidden states of one row: [tokens, hidden]."""
    ids = torch.tensor([path], device=model.device)
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]


def _trained(job: Job) -> PreTrainedModel:
    """The base with the result's adapter added to its matrices, or the result's own weights."""
    result = Path(job.result)
    if not (result / ADAPTER).is_file():
        return _load(job, result)
    model = _load(job, job.base)
    config = json.loads((result / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    _require_plain(config)
    tensors = load_file(result / ADAPTER, device=str(model.device))
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = tensors[name.replace("lora_A", "lora_B")]
            module = model.get_submodule(name.removeprefix(PREFIX).removesuffix(".lora_A.weight"))
            module.weight += (config["lora_alpha"] / config["r"] * (up.float() @ down.float())).to(module.weight.dtype)
    return model


def _require_plain(config: dict[str, Any]) -> None:
    """Other kinds of adapters add something else to the matrices than is added here."""
    if others := [name for name in ("use_dora", "use_rslora") if config.get(name)]:
        raise ValueError(f"only plain LoRA can be judged, this adapter has {others[0]}")


def _load(job: Job, directory: Path) -> PreTrainedModel:
    """On a processor in float32, elsewhere in the job's precision."""
    dtype = torch.float32 if job.device == "cpu" else getattr(torch, job.dtype)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(job.device).eval()


def main() -> None:
    """Judge one job."""
    name, metric = judge(Job.read(Path(sys.argv[1])))
    processes.report(name=name, **metric.model_dump())


if __name__ == "__main__":
    main()
