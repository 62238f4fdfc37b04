"""A GGUF file as a base: what it holds is what is trained on, and what cannot serve is refused at `plan`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ggufs
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType
from peft import LoraConfig, inject_adapter_in_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import gguf as gguf_model
from data.gguf import converted
from pipeline import cli, shape
from pipeline import manifest as manifests
from pipeline.config import Lora
from pipeline.fingerprint import file_sha256

pytestmark = [pytest.mark.chain, pytest.mark.usefixtures("report_of_one_line")]

RUN = """\
output: {root}/run
device: cpu
dtype: float32
data:
  chats: {{source: {root}/chats.jsonl, held_out: 0.2}}
stages:
  sft: {{kind: sft, policy: {root}/model.gguf, data: chats, steps: 2, examples_per_step: 4, lora: {{rank: 2}},
    max_length: 64}}
  dpo: {{kind: dpo, policy: {root}/model.gguf, data: pairs, steps: 1, examples_per_step: 4, lora: {{rank: 2}}}}
  evaluate: {{kind: evaluate, models: ["{root}/model.gguf", dpo], prompts: chats, rows: 2, max_new_tokens: 4}}
"""
TEXTS = ["Say 12345  67 times: don't, <|im_end|> please.", "Ünïcödé 字\n\n\tand tabs"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with biases that are not zero; nobody writes to it."""
    directory = tiny.save_model(tmp_path_factory.mktemp("gguf") / "model", "qwen2", ["Say seven. Yes. Never! 12"] * 20)
    made = AutoModelForCausalLM.from_pretrained(directory)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(directory)
    return directory


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    """The configuration of a run on a GGUF file, with its data."""
    ggufs.write(model, tmp_path / "model.gguf")
    rows = [{"prompt": f"Say {n}?", "chosen": f"Yes {n}.", "rejected": "Never!"} for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    path = tmp_path / "run.yaml"
    text = RUN.format(root=tmp_path)
    path.write_text(text.replace("stages:\n", f"  pairs: {{source: {tmp_path}/pairs.jsonl, held_out: 0.2}}\nstages:\n"))
    return path


def baton(*arguments: str | Path) -> int:
    return cli.execute(cli.app, list(map(str, arguments)))


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model(torch.arange(5, 45)[None]).logits


def test_a_file_in_float32_is_the_model_it_was_made_of(model: Path, tmp_path: Path) -> None:
    file = ggufs.write(model, tmp_path / "model.gguf")
    directory = converted(file, file_sha256(file))
    assert (logits(directory) - logits(model)).abs().max() < 1e-5
    ours, theirs = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(model)
    assert ours.chat_template == theirs.chat_template
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)


def test_nothing_that_lies_beside_the_file_is_read(model: Path, tmp_path: Path) -> None:
    alone = ggufs.write(model, tmp_path / "model.gguf")
    (tmp_path / "full").mkdir()
    file = Path(shutil.copy(alone, tmp_path / "full"))
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "config.json",
        "adapter_config.json",
    ):
        (tmp_path / "full" / name).write_text('{"auto_map": {"AutoConfig": "evil.Evil"}, "chat_template": "evil"}')
    gguf_model._convert(file, tmp_path / "converted")
    assert (logits(tmp_path / "converted") - logits(model)).abs().max() < 1e-5
    template = AutoTokenizer.from_pretrained(tmp_path / "converted").chat_template
    assert template == AutoTokenizer.from_pretrained(model).chat_template


def test_blocks_of_eight_bits_become_what_they_stand_for(model: Path, tmp_path: Path) -> None:
    file = ggufs.write(model, tmp_path / "model.gguf", quantized=True)
    found = load_file_as_float(converted(file, file_sha256(file)))
    for name, tensor in load_file(model / "model.safetensors").items():
        meant = torch.from_numpy(tensor)
        if tensor.ndim == 2:
            kind = GGMLQuantizationType.Q8_0
            meant = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor, kind), kind))
        assert torch.equal(found[name], meant.bfloat16().float()), name


def load_file_as_float(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file as load

    return {name: tensor.float() for name, tensor in load(directory / "model.safetensors").items()}


def test_stages_are_trained_on_it_and_know_it_by_its_digest(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = config.parent / "model.gguf", config.parent / "run"
    assert baton("plan", config) == 0
    capsys.readouterr()
    assert baton("run", config) == 0
    assert capsys.readouterr().err == ""
    for name in ("sft", "dpo"):
        given = manifests.load(run / "stages" / name).inputs["policy"]
        assert (given.source, given.digest) == (str(file), file_sha256(file))
    adaptation = manifests.load(run / "stages" / "dpo").adaptation
    assert adaptation is not None
    assert (adaptation.base, adaptation.base_source) == (file_sha256(file), str(file))
    assert baton("export", run / "stages" / "dpo", "--to", config.parent / "out") == 0
    capsys.readouterr()
    assert baton("plan", config) == 0
    assert "nothing to do: every stage is up to date" in capsys.readouterr().out


def test_another_file_trains_again_and_a_lost_cache_converts_again(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config.parent / "model.gguf"
    assert baton("run", config, "--only", "sft") == 0
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "another"))
    assert baton("run", config, "--only", "sft", "--force", "sft") == 0
    assert converted(file, file_sha256(file)).is_relative_to(tmp_path / "another")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert baton("plan", config, "--only", "sft") == 0
    assert "input policy: " in capsys.readouterr().out


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def beginning(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


def noise(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 64)


def nothing(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut, beginning, noise, nothing])
def test_a_damaged_file_is_refused_when_the_run_is_planned(
    config: Path, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    file = config.parent / "model.gguf"
    harm(file)
    assert baton("plan", config) == 5
    said = capsys.readouterr().err
    assert f"{file}: no readable GGUF file: " in said
    assert "fix: download or convert the file again" in said


def test_an_architecture_that_is_not_known_is_refused_when_the_run_is_planned(
    model: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ggufs.write(model, config.parent / "model.gguf", architecture="mystery")
    assert baton("plan", config) == 5
    said = capsys.readouterr().err
    assert f"{file}: the architecture `mystery` cannot be read from GGUF" in said
    assert "qwen2" in said


def test_a_file_without_a_tokenizer_is_refused_when_the_run_is_planned(
    model: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ggufs.write(model, config.parent / "model.gguf", tokens=False)
    assert baton("plan", config) == 5
    said = capsys.readouterr().err
    assert f"{file}: the file holds no tokenizer" in said
    assert "fix: use a file that was converted together with its tokenizer" in said


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        ({"parts": 3}, "the file is one of 3 parts", "join them with"),
        ({"splitting": "viking"}, "the pre-tokenizer `viking` is not known", "use the model's directory"),
    ],
)
def test_a_part_of_a_file_and_unknown_splitting_are_refused_when_the_run_is_planned(
    model: Path, config: Path, options: dict[str, Any], what: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ggufs.write(model, config.parent / "model.gguf", **options)
    assert baton("plan", config) == 5
    said = capsys.readouterr().err
    assert f"{file}: {what}" in said
    assert f"fix: {fix}" in said


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"left_out": "model.layers.1.mlp.up_proj.weight"}, "tensors missing: model.layers.1.mlp.up_proj.weight"),
        ({"hidden": 32}, ""),
    ],
)
def test_a_file_that_does_not_hold_its_model_is_refused_before_it_is_trained_on(
    model: Path, config: Path, options: dict[str, Any], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ggufs.write(model, config.parent / "model.gguf", **options)
    assert baton("run", config) == 5
    said = capsys.readouterr().err
    assert f"{file}: {what}" in said
    assert "fix: download or convert the file again" in said


def test_sizes_that_differ_by_layer_leave_the_memory_unknown(model: Path, tmp_path: Path) -> None:
    file = ggufs.write(model, tmp_path / "model.gguf", key_heads=[1, 2])
    sizes, tensors = gguf_model.outline(file)
    assert "num_key_value_heads" not in sizes
    assert sizes["hidden_size"] == shape.of_directory(model).hidden
    assert shape.of_tensors(sizes, tensors).layers == 2


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "down_proj"], ["self_attn.v_proj"], r".*\.1\..*(up|gate)_proj", ["none"]]
)
def test_an_adapter_is_as_large_on_a_file_as_peft_makes_it(
    targets: str | list[str], model: Path, tmp_path: Path
) -> None:
    settings = Lora(rank=3, targets=targets)
    base = AutoModelForCausalLM.from_pretrained(model)
    if targets == ["none"]:
        expected = 0
    else:
        made = inject_adapter_in_model(LoraConfig(r=3, target_modules=targets), base)
        expected = sum(each.numel() for name, each in made.named_parameters() if "lora_" in name)
    file = ggufs.write(model, tmp_path / "model.gguf")
    assert shape.of_tensors(*gguf_model.outline(file)).adapter(settings) == expected
    assert shape.of_directory(model).adapter(settings) == expected


@pytest.mark.parametrize("name", ["qwen2moe", "qwen3moe", "gpt-oss", "minimax-m2", "qwen35", "lfm2"])
def test_architectures_are_known_by_the_names_that_files_have(name: str, model: Path, tmp_path: Path) -> None:
    gguf_model.header_of(ggufs.write(model, tmp_path / "model.gguf", architecture=name))


def test_a_directory_may_be_called_like_a_file(model: Path, config: Path) -> None:
    (config.parent / "model.gguf").unlink()
    shutil.copytree(model, config.parent / "model.gguf")
    assert baton("plan", config) == 0
