"""Every recipe loads and plans; those for a GPU really run, on tiny models of the same classes in a local hub cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ggufs
import pytest
import tiny
from conftest import REPOSITORY

from pipeline import cli, loader
from pipeline import manifest as manifests

RECIPES = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml"))
FOREIGN = {
    "qwen-0.5b-lora": ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2"),
    "llama-8b-qlora": ("meta-llama/Llama-3.1-8B-Instruct", "llama"),
}
WITHOUT_PAIRS = ("shakespeare", "arithmetic", "smollm2-instructions")
COMMIT = "c0ffee" + "0" * 34
TRAINED = ["sft", "reward", "dpo", "ppo"]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A small file in the layout of Anthropic's hh-rlhf."""
    path = tmp_path / "pairs.jsonl"
    turn = "\n\nHuman: Say {number}, please.\n\nAssistant:"
    rows = [
        {side: turn.format(number=number) + answer for side, answer in (("chosen", " Yes."), ("rejected", " Never!"))}
        for number in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def ifeval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts in place of the published file of the suite `ifeval`."""
    kinds = ["punctuation:no_comma", "startend:quotation"]
    rows = [
        {"key": key, "prompt": f"Say {key}, please.", "instruction_id_list": [kind], "kwargs": [{}]}
        for key, kind in enumerate(kinds)
    ]
    (tmp_path / "ifeval").mkdir()
    (tmp_path / "ifeval" / "input_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("BATON_DATA", str(tmp_path))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local cache of the hub, empty."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def baton(*arguments: str | Path) -> int:
    """The exit code of the command line, run in this process."""
    return cli.execute(cli.app, list(map(str, arguments)))


def overrides(recipe: str, pairs: Path) -> list[str]:
    """Where to write and what to read, for a recipe whose defaults are not on this machine."""
    other_model = smollm2_overrides(recipe, pairs) if recipe.startswith("smollm2") else []
    sources = loader.load(REPOSITORY / "configs" / f"{recipe}.yaml", other_model).data
    files = {name: source.source for name, source in sources.items() if not source.source.startswith("world:")}
    text = pairs.with_name("text.txt")
    text.write_text("Say seven, please. " * 100)
    given = {name: text if file.endswith(".txt") else pairs for name, file in files.items()}
    return [
        f"output={pairs.parent}/run",
        *(f"data.{name}.source={path}" for name, path in given.items()),
        *other_model,
    ]


def smollm2_overrides(recipe: str, pairs: Path) -> list[str]:
    """A tiny model as a GGUF file, and pairs in the layout of the file that the recipe names."""
    gguf = pairs.with_name("tiny.gguf")
    if not gguf.exists():
        model = tiny.save_model(pairs.with_name("for-gguf"), "qwen2", ["Say seven, please. Yes. Never!"] * 20)
        ggufs.write(model, gguf)
    if recipe == "smollm2-instructions":
        models = [f"stages.grpo.policy={gguf}", f"stages.evaluate.models=[{gguf}, grpo]"]
        return [*models, "stages.grpo.lora.top_layers=2"]
    parts = ("pairs",) if recipe == "smollm2-135m" else ("learned", "judged", "asked")
    for part in parts:
        prompts = [f"Say {part} {number}, please." for number in range(60)]
        answers = {"input": "", "output": "Yes.", "chosen": "Yes.", "rejected": "Never!"}
        pairs.with_name(f"{part}.json").write_text(json.dumps([{"instruction": each, **answers} for each in prompts]))
    starting = ("sft",) if recipe == "smollm2-135m" else ("sft", "judge")
    return [
        *(f"data.{part}.source={pairs.with_name(f'{part}.json')}" for part in parts),
        *(f"stages.{stage}.policy={gguf}" for stage in starting),
    ]


def fill(hub: Path, repository: str, model_type: str) -> Path:
    """A tiny model as the hub's cache keeps one: blobs, links to them, a branch; returns the snapshot."""
    saved = tiny.save_model(hub.parent / "saved", model_type, ["Say seven, please. Yes. Never!"] * 20)
    root = hub / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    for path in saved.iterdir():
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    (root / "refs" / "main").write_text(COMMIT)
    return snapshot


def records(run: Path, stage: str) -> list[dict[str, Any]]:
    lines = (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_handed_out_and_planned(
    recipe: str, pairs: Path, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    assert baton("init", mine, "--recipe", recipe) == 0
    assert mine.read_bytes() == (REPOSITORY / "configs" / f"{recipe}.yaml").read_bytes()
    capsys.readouterr()
    assert baton("run", mine, *overrides(recipe, pairs), "--dry-run") == 0
    planned = capsys.readouterr().out
    stages = loader.load(mine, overrides(recipe, pairs)).stages
    assert f"{len(stages)} of {len(stages)} would run" in planned
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in WITHOUT_PAIRS])
def test_every_recipe_with_the_whole_chain_evaluates_what_it_trains(recipe: str, pairs: Path) -> None:
    stages = loader.load(REPOSITORY / "configs" / f"{recipe}.yaml", overrides(recipe, pairs)).stages
    roles = stages["evaluate"].roles()
    assert {"sft", "dpo", "ppo"} <= set(roles.values())
    assert roles["reward"] == ("judge" if recipe == "smollm2-judged" else "reward")


@pytest.mark.parametrize("recipe", sorted(FOREIGN))
def test_a_hub_model_in_the_cache_is_checked_before_anything_runs(
    recipe: str, pairs: Path, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository, model_type = FOREIGN[recipe]
    snapshot = fill(hub, repository, model_type)
    config = REPOSITORY / "configs" / f"{recipe}.yaml"
    assert baton("run", config, *overrides(recipe, pairs), "--dry-run") == 0
    weights = snapshot / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.resolve().write_bytes(content)
    capsys.readouterr()
    assert baton("run", config, *overrides(recipe, pairs), "--dry-run") == 5
    assert "model.safetensors: damaged: sha256 " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.chain
@pytest.mark.parametrize("recipe", sorted(FOREIGN))
def test_a_recipe_for_a_gpu_runs_whole_on_a_tiny_model_of_its_class(recipe: str, pairs: Path, hub: Path) -> None:
    repository, model_type = FOREIGN[recipe]
    fill(hub, repository, model_type)
    config = REPOSITORY / "configs" / f"{recipe}.yaml"
    small = [f"stages.{name}.{setting}" for name in TRAINED for setting in ("steps=2", "examples_per_step=4")]
    short = [f"stages.{name}.max_new_tokens=8" for name in ("ppo", "evaluate")]
    where = ["device=cpu", "dtype=float32", "data.pairs.held_out=0.3", *overrides(recipe, pairs)]
    assert baton("run", config, *where, *small, *short) == 0
    run = pairs.parent / "run"
    assert baton("verify", run) == 0
    assert records(run, "dpo")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert records(run, "ppo")[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    _check_hand_over(run, f"hub:{repository}@main", quantized=recipe == "llama-8b-qlora")


def _check_hand_over(run: Path, source: str, *, quantized: bool) -> None:
    """A quantized base is handed on by name with its adapter beside it, any other merged."""
    found = {name: manifests.load(run / "stages" / name) for name in TRAINED}
    assert found["sft"].kind == ("adapter" if quantized else "model")
    assert found["sft"].inputs["policy"].source == source
    for manifest in found.values():
        assert manifest.adaptation is not None
        from_hub = quantized or manifest.stage == "sft"
        assert manifest.adaptation.base_source == (source if from_hub else "sft")
        assert manifest.adaptation.quantization == ("4bit" if quantized else "none")
    for name in ("dpo", "ppo"):
        adaptation = found[name].adaptation
        assert adaptation is not None
        assert adaptation.reference == found["sft"].digest
    models = json.loads((run / "stages" / "evaluate" / "evaluation.json").read_text())["models"]
    base = source.partition("@")[0].rpartition("/")[2]
    assert {name: model["parent"] for name, model in models.items()} == {
        base: None,
        "sft": base,
        "dpo": "sft",
        "ppo": "sft",
        "reward": None,
    }


@pytest.mark.chain
def test_every_layer_of_a_four_bit_base_passes_gradients_on_after_it_computed_without(tmp_path: Path) -> None:
    import torch

    from pipeline.config import Lora
    from pipeline.contract import Artifact
    from stages.core.device import choose
    from stages.core.models import load_model
    from stages.core.roles import POLICY, REFERENCE, Roles

    directory = tiny.save_model(tmp_path / "model", "llama", ["Say seven, please."] * 20)
    base = load_model(Artifact(directory, "model", ""), choose("cpu", "float32"), quantization="4bit")
    roles = Roles(base)
    roles.add(POLICY, Lora(rank=4))
    tokens = torch.arange(10)[None]
    with torch.no_grad(), roles.use(REFERENCE):
        before = base.model(tokens).logits
    with roles.use(POLICY):
        logits = base.model(tokens).logits
        logits.log_softmax(-1)[..., 5].sum().backward()
    assert torch.equal(logits, before)
    gradients = {name: parameter.grad for name, parameter in roles.parameters(POLICY) if ".lora_B." in name}
    assert len(gradients) == 14
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


@pytest.mark.chain
def test_verify_names_a_base_that_changed_since_a_stage_used_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.save_model(tmp_path / "base", "llama", ["Say seven, please."] * 20)
    config = tmp_path / "config.yaml"
    config.write_text(f"""\
output: {tmp_path / "run"}
device: cpu
dtype: float32
data: {{chats: {{source: "world:demonstrations", rows: 40}}}}
stages: {{sft: {{kind: sft, policy: {base}, data: chats, steps: 1, lora: {{rank: 2}}}}}}
""")
    assert baton("run", config) == 0
    assert baton("verify", tmp_path / "run") == 0
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert baton("verify", tmp_path / "run") == 5
    said = "".join(capsys.readouterr())
    assert f"input policy: {base}: content digest" in said


@pytest.mark.slow
@pytest.mark.chain
def test_the_recipe_of_a_gguf_file_runs_whole_on_a_tiny_one(pairs: Path, hub: Path) -> None:
    config = REPOSITORY / "configs" / "smollm2-135m.yaml"
    small = [f"stages.{name}.{setting}" for name in TRAINED for setting in ("steps=2", "examples_per_step=4")]
    short = ["stages.ppo.evaluate_every=1", *(f"stages.{name}.max_new_tokens=8" for name in ("ppo", "evaluate"))]
    where = ["device=cpu", "dtype=float32", "data.pairs.held_out=0.3", *overrides("smollm2-135m", pairs)]
    assert baton("run", config, *where, *small, *short) == 0
    stages = pairs.parent / "run" / "stages"
    (base,) = manifests.load(stages / "sft").inputs.values()
    assert base.source.endswith("tiny.gguf")
    figures = manifests.load(stages / "evaluate").metrics
    assert {"dpo.win_rate.reward", "ppo.win_rate.reward"} <= figures.keys()


@pytest.mark.slow
@pytest.mark.chain
def test_the_recipe_of_verifiable_instructions_runs_whole_on_a_tiny_model(pairs: Path, hub: Path) -> None:
    config = REPOSITORY / "configs" / "smollm2-instructions.yaml"
    small = [
        "stages.grpo.steps=2",
        "stages.grpo.examples_per_step=2",
        "stages.grpo.evaluate_every=1",
        "stages.grpo.lora.top_layers=2",
    ]
    suite = pairs.with_name("ifeval.yaml")
    own = (REPOSITORY / "configs" / "suites" / "ifeval.yaml").read_text()
    suite.write_text(own.replace("max_new_tokens: 1280", "max_new_tokens: 8"))
    short = [
        *(f"stages.{name}.max_new_tokens=8" for name in ("grpo", "evaluate")),
        f"stages.evaluate.suites=[{suite}]",
        "stages.evaluate.rows=4",
        "data.instructions.rows=60",
    ]
    where = ["device=cpu", "dtype=float32", *overrides("smollm2-instructions", pairs)]
    assert baton("run", config, *where, *small, *short) == 0
    figures = manifests.load(pairs.parent / "run" / "stages" / "evaluate").metrics
    assert {"grpo.suite.ifeval", "grpo.suite.ifeval_gain", "grpo.suite.ifeval.by-instruction"} <= figures.keys()
    assert figures["grpo.bits_per_byte_ratio"].n == 4
