"""What a plan says of memory: shapes of stages that have yet to run, of directories and of GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ggufs
import models
import pytest
import tiny

from data import gguf
from pipeline import cli, forecast, loader, plan, shape
from pipeline.config import Lora
from pipeline.errors import ConfigError
from pipeline.manifest import MemoryEstimate

ARCHITECTURE = """
      model_type: llama
      hidden_size: 32
      intermediate_size: 64
      num_hidden_layers: 2
      num_attention_heads: 2
"""
CONFIG = """\
output: {root}/run
device: cpu
dtype: float32
memory: 2GB
data:
  text: {{source: {root}/rows.jsonl}}
  rows: {{source: {root}/rows.jsonl}}
  pairs: {{source: {root}/pairs.jsonl}}
stages:
  tok: {{kind: tokenizer, data: text, vocab_size: 300}}
  base:
    kind: pretrain
    tokenizer: tok
    data: text
    architecture: {architecture}
  sft: {{kind: sft, policy: {policy}, data: rows, quantization: {quantization}}}
  dpo: {{kind: dpo, policy: sft, data: pairs, tokens_per_batch: 512}}
  other: {{kind: trl, trainer: DPO, policy: sft, data: pairs}}
"""


def forecasts(
    root: Path, *, policy: str = "base", architecture: str = ARCHITECTURE, quantization: str = "none"
) -> dict[str, Any]:
    """Of a run in which nothing is published."""
    (root / "rows.jsonl").write_text('{"text": "A text."}\n' * 4)
    (root / "pairs.jsonl").write_text('{"prompt": "A?", "chosen": "B.", "rejected": "C."}\n' * 4)
    options = {"policy": policy, "architecture": architecture, "quantization": quantization}
    path = root / "config.yaml"
    path.write_text(CONFIG.format(root=root, **options).replace("data: rows", "data: pairs"))
    settings = loader.load(path)
    decisions = plan.plan(settings)
    found = forecast.forecasts(settings, decisions)
    assert list(found) == ["base", "sft", "dpo", "other"]
    for name, each in found.items():
        said = forecast.in_words(settings, name, each)
        assert said.startswith("memory unknown: " if isinstance(each, str) else "memory ")
    return found


def test_stages_that_have_yet_to_run_have_the_shape_of_what_they_start_from(tmp_path: Path) -> None:
    found = forecasts(tmp_path)
    base = 2 * (300 * 32) + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert found["base"].weights == 4 * base
    assert found["dpo"].weights == 4 * base
    assert found["sft"].weights == 2 * 4 * base  # its adapter is merged
    assert found["dpo"].tokens_per_batch == 512
    assert found["base"].tokens_per_batch == 8192
    assert found["other"] == "a trainer of TRL makes its own batches"
    assert forecast.record(found["other"]) == {"unknown": found["other"]}


def test_an_adapter_on_a_quantized_base_is_also_the_reference(tmp_path: Path) -> None:
    plain, quantized = forecasts(tmp_path), forecasts(tmp_path, quantization="4bit")
    assert quantized["dpo"].weights < plain["dpo"].weights
    assert quantized["dpo"].adapters == 2 * plain["dpo"].adapters


def test_a_directory_says_what_its_model_is(tmp_path: Path) -> None:
    models.language_model().save(tmp_path / "model")
    found = forecasts(tmp_path, policy=str(tmp_path / "model"))
    assert found["dpo"].weights == sum(each.nbytes for each in models.model().parameters())


SAMPLING = """\
output: {root}/run
data:
  text: {{source: {root}/rows.jsonl}}
  prompts: {{source: {root}/prompts.jsonl}}
stages:
  tok: {{kind: tokenizer, data: text, vocab_size: 300}}
  base: {{kind: pretrain, tokenizer: tok, data: text, max_length: 32, architecture: {architecture}}}
  rejection:
    kind: rejection
    policy: {policy}
    data: prompts
    rules: [{{rule: length, words: 4}}]
    max_length: 8192
    max_new_tokens: {longest}
"""


def test_more_layers_to_adapt_than_there_are_are_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "A text."}\n' * 40)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "A?", "chosen": "B.", "rejected": "C."}\n' * 4)
    text = CONFIG.format(root=tmp_path, policy="base", architecture=ARCHITECTURE, quantization="none")
    (tmp_path / "config.yaml").write_text(text.replace("data: rows", "data: pairs"))
    arguments = ["plan", str(tmp_path / "config.yaml"), "stages.dpo.lora.top_layers=3"]
    assert cli.execute(cli.app, arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "stages.dpo.lora.top_layers: top_layers=3, but sft has 2 decoder layers" in said


def test_responses_of_suites_that_take_all_positions_are_refused_too(tmp_path: Path) -> None:
    models.language_model().save(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "What is {n}?"}}\n' for n in range(40)))
    suite = {"kind": "suite", "measures": "Short answers.", "source": "prompts.jsonl", "method": "generation"}
    stage = {"kind": "evaluate", "models": [str(tmp_path / "model")], "prompts": "prompts", "max_length": 2048}
    data = {"prompts": {"source": str(tmp_path / "prompts.jsonl")}}
    for longest in (255, 256):
        rules = {"rules": [{"rule": "length", "words": 4}], "max_new_tokens": longest}
        (tmp_path / "short.yaml").write_text(json.dumps(suite | rules))
        stages = {"evaluate": stage | {"suites": [str(tmp_path / "short.yaml")]}}
        run = {"output": str(tmp_path / "run"), "data": data, "stages": stages}
        (tmp_path / "run.yaml").write_text(json.dumps(run))
        settings = loader.load(tmp_path / "run.yaml")
        if longest < 256:
            forecast.require_fit(settings, plan.plan(settings))
    with pytest.raises(ConfigError, match=r"256 positions, which leaves no room .* before 256 tokens") as refused:
        forecast.require_fit(settings, plan.plan(settings))
    assert refused.value.where == "stages.evaluate.suites.short.max_new_tokens"


@pytest.mark.parametrize(("of", "positions"), [("architecture", 40), ("directory", 256), ("gguf", 2048)])
def test_responses_that_take_all_positions_are_refused_before_anything_is_trained(
    of: str, positions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text('{"text": "A text."}\n' * 40)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "What is {n}?"}}\n' for n in range(40)))
    policy = "base"
    if of == "directory":
        models.language_model().save(tmp_path / "model")
        policy = str(tmp_path / "model")
    elif of == "gguf":
        model = tiny.save_model(tmp_path / "model", "qwen2", ["Some text.", "More of it."])
        policy = str(ggufs.write(model, tmp_path / "model.gguf"))
    config = tmp_path / "config.yaml"
    architecture = f"{ARCHITECTURE}      max_position_embeddings: 40\n"
    in_a_line = "{" + ", ".join(line.strip() for line in architecture.strip().splitlines()) + "}"
    for longest in (positions - 1, positions):
        text = SAMPLING.format(root=tmp_path, architecture=in_a_line, policy=policy, longest=longest)
        config.write_text(text)
        settings = loader.load(config)
        if longest < positions:
            forecast.require_fit(settings, plan.plan(settings))
    refusal = f"{policy} has {positions} positions, which leaves no room for a prompt before {positions} tokens"
    for arguments in (["plan"], ["plan", "--json"], ["run", "--dry-run"], ["run"]):
        assert cli.execute(cli.app, [*arguments, str(config)]) == 2
        assert refusal in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "tok").exists()


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    found = forecasts(tmp_path, architecture="{model_type: mamba}")
    assert found["base"] == found["dpo"] == "the tensors of `mamba` are not known before it is trained"
    found = forecasts(tmp_path, policy="hub:nobody/nothing@main")
    assert found["dpo"] == found["sft"] == "`hub:nobody/nothing@main` is not downloaded yet"
    assert isinstance(found["base"], MemoryEstimate)


def test_precision_and_device_are_read_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu avx512_bf16\n")
    assert forecast._precision("cpu", cpuinfo) == "bfloat16"
    cpuinfo.write_text("flags : fpu avx2\n")
    assert forecast._precision("cpu", cpuinfo) == "float32"
    assert forecast._precision("cpu", tmp_path / "none") == "float32"
    assert forecast._precision("cuda") == "bfloat16"
    assert forecast._precision("mps") == "float32"
    monkeypatch.setattr(forecast, "DRIVER", cpuinfo)
    assert forecast._device() == "cuda"


def test_a_gguf_file_says_it_in_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    model = tiny.save_model(tmp_path / "model", "qwen2", ["Some text.", "More of it."])
    file = ggufs.write(model, tmp_path / "model.gguf", quantized=True)
    assert shape.of_tensors(*gguf.outline(file)).adapter(Lora()) == shape.of_directory(model).adapter(Lora())
    from_file, from_directory = (forecasts(tmp_path, policy=str(each))["dpo"] for each in (file, model))
    assert from_file == from_directory
