"""Models from anybody: no pickle is read, no code runs, no file outside is followed, through real entry points."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import hostile
import pytest
import tiny
from conftest import REPOSITORY

from pipeline import cli, model_files
from pipeline import manifest as manifests
from pipeline.manifest import Manifest

pytestmark = pytest.mark.usefixtures("report_of_one_line")

EVIL = """
from pathlib import Path
Path({canary!r}).touch()
class Evil: pass
"""
RUN = """\
output: {root}/run
device: cpu
dtype: float32
data:
  demonstrations: {{source: "world:demonstrations", rows: 20, held_out: 0.3}}
  preferences: {{source: "world:preferences", rows: 20, held_out: 0.3}}
stages:
  {stage}: {{kind: {kind}, policy: {policy}, data: {data}, steps: 1, examples_per_step: 2, lora: {{rank: 2}}}}
"""
AFTER = """\
output: {root}/after
device: cpu
dtype: float32
data:
  corpus: {{source: "world:corpus", rows: 60, held_out: 0.3}}
  demonstrations: {{source: "world:demonstrations", rows: 20, held_out: 0.3}}
  preferences: {{source: "world:preferences", rows: 20, held_out: 0.3}}
  prompts: {{source: "world:prompts", rows: 20, held_out: 0.3}}
stages:
  base: {{kind: pretrain, tokenizer: {run}/stages/tokenizer, data: corpus, max_length: 64, steps: 1,
    examples_per_step: 2, architecture: {{model_type: llama, hidden_size: 32, intermediate_size: 64,
    num_hidden_layers: 1, num_attention_heads: 2}}}}
  longer: {{kind: pretrain, policy: {run}/stages/base, data: corpus, max_length: 64, steps: 1, examples_per_step: 2}}
  again: {{kind: dpo, policy: {run}/stages/dpo, data: preferences, steps: 1, examples_per_step: 2}}
  t_dpo: {{kind: trl, trainer: DPO, policy: {run}/stages/dpo, data: preferences, steps: 1, examples_per_step: 2,
    examples_per_batch: 2, max_length: 256}}
  ppo: {{kind: ppo, policy: {run}/stages/sft, reward: {run}/stages/reward, data: prompts, steps: 1,
    examples_per_step: 2, max_new_tokens: 4, evaluate_rows: 2}}
"""


def baton(*arguments: str | Path) -> int:
    """The exit code of the command line, run in this process."""
    return cli.execute(cli.app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `transformers` saves it; nobody writes to it."""
    return tiny.save_model(tmp_path_factory.mktemp("saved") / "model", "llama", ["Say seven. Yes. Never!"] * 20)


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy of the model to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five stages; nobody writes to it."""
    root = tmp_path_factory.mktemp("chain")
    path = root / "chain.yaml"
    path.write_text(tiny.CHAIN.format(root=root).partition("  ppo:")[0])
    assert baton("run", path) == 0
    return root / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "chain"))


def tuned(policy: Path, *, kind: str = "sft") -> int:
    """The exit code of a run that trains on a model or stage directory."""
    root = policy.parent if kind == "sft" else policy.parent.parent.parent
    path = root / "hostile.yaml"
    data = "demonstrations" if kind == "sft" else "preferences"
    path.write_text(RUN.format(root=root, stage="tuned", kind=kind, policy=policy, data=data))
    return baton("run", path)


def test_pickles_beside_the_weights_of_a_model_are_never_read(model: Path, tmp_path: Path) -> None:
    hostile.plant_pickles(model, tmp_path / "canary")
    assert tuned(model) == 0
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", hostile.PICKLES)
def test_a_model_that_is_but_a_pickle_is_refused(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile.plant_pickles(model, tmp_path / "canary")
    (model / "model.safetensors").rename(model / "other.safetensors")
    for other in set(hostile.PICKLES) - {name}:
        (model / other).unlink()
    assert tuned(model) == 5
    assert "safetensors needed" in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()


def test_pickles_in_the_stages_of_somebody_else_are_never_read(run: Path, tmp_path: Path) -> None:
    """Their manifests list them, so the directories are whole; every kind of stage reads them."""
    canary, stages = tmp_path / "canary", run / "stages"
    for name in ("tokenizer", "base", "sft", "reward", "dpo"):
        hostile.plant_pickles(stages / name, canary)
        hostile.reseal(stages / name, stages / "sft")
    path = tmp_path / "after.yaml"
    path.write_text(AFTER.format(root=tmp_path, run=run))
    assert baton("run", path) == 0
    assert len(list((tmp_path / "after" / "stages").iterdir())) == 5
    assert not canary.exists()
    assert [each for each in (tmp_path / "after").rglob("*") if each.is_file() and hostile.is_pickle(each)] == []


def test_the_canary_would_act(tmp_path: Path) -> None:
    import torch

    hostile.plant_pickles(tmp_path, tmp_path / "canary")
    for name in hostile.PICKLES:
        assert hostile.is_pickle(tmp_path / name)
        with suppress(RuntimeError):  # what torch finds afterwards is no model
            # The one unsafe load there is, of the test's own file: a canary that could not act would prove nothing.
            torch.load(tmp_path / name, weights_only=False)
        (tmp_path / "canary").rmdir()


def test_an_adapter_that_is_but_a_pickle_is_refused(run: Path, tmp_path: Path) -> None:
    directory = run / "stages" / "dpo"
    hostile.plant_pickles(directory, tmp_path / "canary")
    (directory / "adapter_model.safetensors").unlink()
    hostile.reseal(directory)
    assert tuned(directory, kind="dpo") == 5
    assert not (tmp_path / "canary").exists()


AUDITED = """
import sys

found = []

def note(event, arguments):
    if event == "pickle.find_class" or event in ("socket.connect", "socket.getaddrinfo", "os.system", "os.exec"):
        found.append((event, str(arguments)))

sys.addaudithook(note)
from pipeline import cli
code = cli.execute(cli.app, ["run", sys.argv[1]])
print(code, found)
"""


@pytest.mark.slow
@pytest.mark.chain
def test_a_chain_unpickles_nothing_starts_no_program_and_connects_to_nobody(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AUDITED, str(tiny.write_chain(tmp_path))]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


CODE: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
    "auto_map elsewhere": {"auto_map": {"AutoModelForCausalLM": "evil/model--evil.Evil"}},
    "auto_map of a part": {"text_config": {"model_type": "llama", "auto_map": {"AutoConfig": "evil.Evil"}}},
    "an unknown type": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}},
    "attention": {"attn_implementation": "evil/kernel"},
    "attention, private": {"_attn_implementation": "evil/kernel@main:evil"},
    "attention, internal": {"_attn_implementation_internal": "evil/kernel"},
    "attention by part": {"attn_implementation": {"": "sdpa", "text_config": "evil/kernel"}},
    "attention with a substitute": {"attn_implementation": "flash_attention_3"},
    "experts": {"experts_implementation": "evil/kernel"},
    "quantization": {"quantization_config": {"quant_method": "torchao", "quant_type": {"_type": "evil.Evil"}}},
    "compression": {"compression_config": {"quant_method": "compressed-tensors"}},
    "kernels": {"use_kernels": True, "kernel_config": {"RMSNorm": "evil/kernel:Evil"}},
    "weights elsewhere": {"transformers_weights": "../outside.safetensors"},
    "weights as a pickle": {"transformers_weights": "adapter_model.bin"},
    "a class to save with": {"_auto_class": "AutoModelForCausalLM"},
    "a function of torch's": {"dtype": "load"},
    "layers without end": {"num_hidden_layers": 10**9},
    "a negative width": {"intermediate_size": -128},
    "fewer words than none": {"vocab_size": -5},
    "words without end": {"vocab_size": 10**12},
}


@pytest.mark.parametrize("name", list(CODE))
def test_a_configuration_that_names_code_is_refused_before_it_is_loaded(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    (model / "evil.py").write_text(EVIL.format(canary=str(canary)))
    monkeypatch.syspath_prepend(model)
    shutil.copy(model / "model.safetensors", tmp_path / "outside.safetensors")
    hostile.plant_pickles(model, canary)
    hostile.change(model / "config.json", **CODE[name])
    assert tuned(model) == 5
    assert f"{model}/config.json: `" in capsys.readouterr().err
    assert not canary.exists()
    assert "evil" not in sys.modules


def test_fields_that_are_off_ask_for_nothing(model: Path) -> None:
    off = {"use_kernels": False, "trust_remote_code": False, "auto_map": {}, "_auto_class": None}
    hostile.change(model / "config.json", **off, sliding_window=None, chunk_size=0, vision_layer_size=None)
    assert tuned(model) == 0


@pytest.mark.parametrize("name", ["auto_map", "attention", "weights as a pickle"])
def test_a_published_stage_is_held_to_the_same(name: str, run: Path, tmp_path: Path) -> None:
    directory = run / "stages" / "sft"
    hostile.plant_pickles(directory, tmp_path / "canary")
    hostile.change(directory / "config.json", **CODE[name])
    hostile.reseal(directory)
    assert tuned(directory, kind="dpo") == 5
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}),
        ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}),
        ("generation_config.json", {"custom_generate": "evil/generate"}),
        ("generation_config.json", {"cache_implementation": "evil/cache"}),
    ],
)
def test_other_files_that_name_code_are_refused_too(file: str, fields: dict[str, Any], model: Path) -> None:
    hostile.change(model / file, **fields)
    assert tuned(model) == 5


@pytest.mark.parametrize("field", ["tokenizer_file", "vocab_file", "chat_template_file", "added_tokens_file"])
def test_a_tokenizer_reads_no_file_outside_its_directory(field: str, model: Path, tmp_path: Path) -> None:
    from data.tokenizer import load_tokenizer

    plain = load_tokenizer(model)
    outside = json.loads((model / "tokenizer.json").read_text())
    outside["added_tokens"][0]["content"] = "<|canary|>"
    (tmp_path / "outside.json").write_text(json.dumps(outside))
    hostile.change(model / "tokenizer_config.json", **{field: "../outside.json"})
    found = load_tokenizer(model)
    assert found.get_vocab() == plain.get_vocab()
    assert found.chat_template == plain.chat_template


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/OUTSIDE", "sub/../../outside.safetensors", "..", ".", "", "\0", "missing"]
)
@pytest.mark.parametrize("published", [False, True])
def test_an_index_of_shards_leads_nowhere_else(shard: str, published: bool, model: Path, run: Path) -> None:
    directory = run / "stages" / "sft" if published else model
    outside = directory.parent / "outside.safetensors"
    (directory / "model.safetensors").rename(outside)
    shard = shard.replace("/OUTSIDE", str(outside))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    if published:
        hostile.reseal(directory)
    assert tuned(directory, kind="dpo" if published else "sft") == 5


def test_a_link_out_of_a_model_is_refused_and_the_hub_s_own_are_not(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "commit"
    blobs.mkdir(parents=True)
    shutil.copytree(model, snapshot)
    (snapshot / "model.safetensors").rename(blobs / "weights")
    (snapshot / "model.safetensors").symlink_to(blobs / "weights")
    assert tuned(snapshot) == 0
    (model / "model.safetensors").rename(tmp_path / "outside")
    (model / "model.safetensors").symlink_to(tmp_path / "outside")
    assert tuned(model) == 5


ADAPTERS: dict[str, dict[str, Any]] = {
    "module": {"megatron_config": {"a": 1}, "megatron_core": "evil"},
    "module alone": {"megatron_core": "evil"},
    "class": {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}},
    "base": {"base_model_name_or_path": "../../../outside"},
    "file": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "quantized": {"loftq_config": {"loftq_bits": 4}},
    "other kind": {"peft_type": "XLORA"},
    "layers": {"layer_replication": [[0, 2], [0, 2]]},
    "whole layers": {"modules_to_save": ["lm_head"]},
    "pattern": {"target_modules": "(.*)*!"},
    "patterns": {"rank_pattern": {"(.*)*!": 8}},
    "parameters": {"target_parameters": ["lm_head.weight"]},
    "bias": {"bias": "all"},
}


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_an_adapter_is_what_batons_adapters_can_be_and_no_more(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    canary, directory = tmp_path / "canary", run / "stages" / "dpo"
    (tmp_path / "evil.py").write_text(EVIL.format(canary=str(canary)))
    monkeypatch.syspath_prepend(tmp_path)
    hostile.change(directory / "adapter_config.json", **ADAPTERS[name])
    hostile.reseal(directory)
    assert tuned(directory, kind="dpo") == 5
    assert "adapter_config.json: `" in capsys.readouterr().err
    assert not canary.exists()


def test_an_adapter_beside_the_weights_of_a_model_is_refused(run: Path) -> None:
    """`transformers` would load it onto the model."""
    model, adapter = run / "stages" / "sft", run / "stages" / "dpo"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, model / name)
    hostile.reseal(model)
    assert tuned(model, kind="dpo") == 5


@pytest.mark.parametrize("base", ["dpo", "../stages/dpo", "reward", ".", "..", ""])
def test_a_base_that_is_no_model_is_not_followed(base: str, run: Path) -> None:
    directory = run / "stages" / "dpo"
    manifest: Manifest = manifests.load(directory)
    assert manifest.adaptation is not None
    adaptation = manifest.adaptation.model_copy(update={"base_source": base})
    hostile.write_manifest(directory, manifest.model_copy(update={"adaptation": adaptation}))
    assert tuned(directory, kind="dpo") == 5


BROKEN: dict[str, tuple[str, bytes]] = {
    "weights that are none": ("model.safetensors", b"\xff" * 64),
    "weights with an endless header": ("model.safetensors", b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"),
    "no weights": ("model.safetensors", b""),
    "configuration cut short": ("config.json", b"{"),
    "configuration too deep": ("config.json", b"[" * 100_000),
    "configuration as a list": ("config.json", b"[]"),
    "configuration of nothing known": ("config.json", b'{"model_type": "nothing known"}'),
    "configuration with a word for a size": ("config.json", b'{"model_type": "llama", "hidden_size": "x"}'),
    "configuration with an unknown activation": ("config.json", b'{"model_type": "llama", "hidden_act": "evil"}'),
    "configuration in another encoding": ("config.json", b"\xff\xfe{}"),
    "tokenizer without anything": ("tokenizer.json", b"{}"),
    "tokenizer too deep": ("tokenizer.json", b"[" * 100_000),
    "no tokenizer": ("tokenizer.json", b""),
    "tokenizer settings as a list": ("tokenizer_config.json", b"[1]"),
    "tokenizer settings of another kind": ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 5}}'),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_broken_files_are_refused_like_damaged_ones(name: str, model: Path) -> None:
    file, content = BROKEN[name]
    (model / file).write_bytes(content)
    assert tuned(model) == 5


@pytest.mark.parametrize("name", ["configuration too deep", "tensors too deep", "configuration without end"])
def test_broken_files_of_a_stage_are_refused_like_damaged_ones(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run / "stages" / "sft"
    header = b"[" * 100_000
    if name == "tensors too deep":
        (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    else:
        (directory / "config.json").write_bytes(header)
    if name == "configuration without end":
        os.truncate(directory / "config.json", model_files.LARGEST + 1)
    hostile.reseal(directory)
    assert tuned(directory, kind="dpo") == 5
    said = {"tensors too deep": "no readable list of tensors", "configuration too deep": "not JSON"}
    assert said.get(name, "larger than 50,000,000 bytes") in capsys.readouterr().err


def test_an_architecture_cannot_name_code_either(run: Path, tmp_path: Path) -> None:
    for field in ("attn_implementation: evil/kernel", "auto_map: {AutoConfig: evil.Evil}", "transformers_weights: x"):
        path = tmp_path / "after.yaml"
        text = AFTER.format(root=tmp_path, run=run).partition("  longer:")[0]
        path.write_text(text.replace("model_type: llama", f"model_type: llama, {field}"))
        assert baton("run", path) == 2


def test_no_library_that_fetches_kernels_belongs_to_baton() -> None:
    needed = [each.partition(";")[0] for each in importlib.metadata.requires("baton-align") or ()]
    assert not [each for each in needed if each.startswith("kernels")]
    assert "\nkernels" not in (REPOSITORY / "constraints.txt").read_text()
