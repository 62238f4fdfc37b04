"""The whole chain, really trained, on the embedded world with a model of a few thousand parameters."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY

from pipeline import cli, inputs, launch, seal
from pipeline import manifest as manifests
from pipeline.fingerprint import file_sha256
from pipeline.manifest import Manifest, OutputRecord
from pipeline.store import RunDirectory

pytestmark = pytest.mark.chain

STAGES = ["tokenizer", "base", "sft", "reward", "dpo", "ppo", "evaluate"]
BRANCHES = """\
output: {root}/branches
device: cpu
dtype: float32
data:
  corpus: {{source: "world:corpus", rows: 200}}
  demonstrations: {{source: "world:demonstrations", rows: 100}}
  preferences: {{source: "world:preferences", rows: 100}}
  prompts: {{source: "world:prompts", rows: 100}}
stages:
  longer: {{kind: pretrain, policy: {run}/stages/base, data: corpus, max_length: 64, steps: 2, examples_per_step: 4}}
  full: {{kind: sft, policy: longer, data: demonstrations, lora: null, steps: 2, examples_per_step: 4}}
  again: {{kind: dpo, policy: {run}/stages/dpo, data: preferences, steps: 2, examples_per_step: 4}}
  ppo: {{kind: ppo, policy: {run}/stages/base, reward: {run}/stages/reward, data: prompts, steps: 1}}
"""
WEIGHTS = [
    ("tokenizer", "tokenizer.json"),
    ("base", "model.safetensors"),
    ("sft", "model.safetensors"),
    ("reward", "adapter_model.safetensors"),
    ("reward", "head.safetensors"),
    ("dpo", "adapter_model.safetensors"),
    ("ppo", "adapter_model.safetensors"),
]


def baton(*arguments: str | Path) -> int:
    """The exit code of the command line, run in this process."""
    return cli.execute(cli.app, list(map(str, arguments)))


@pytest.fixture
def config(chain: Path) -> Path:
    """The configuration of a finished run of the whole chain."""
    return chain.parent / "chain.yaml"


@pytest.fixture
def run(chain: Path) -> Path:
    """The finished run; nobody writes to it."""
    return chain


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to damage or to continue."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture(scope="module")
def branches(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second run that continues from the first one's stages."""
    root = tmp_path_factory.mktemp("chain")
    path = root / "branches.yaml"
    path.write_text(BRANCHES.format(root=root, run=chain))
    assert baton("run", path, "--only", "longer", "--only", "full", "--only", "again") == 0
    return root / "branches"


def manifest_of(run: Path, stage: str) -> Manifest:
    return manifests.load(run / "stages" / stage)


def digests(run: Path) -> dict[str, str]:
    return {name: manifest_of(run, name).digest for name in STAGES}


def records(run: Path, stage: str) -> list[dict[str, Any]]:
    lines = (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-len(content) // 4] ^= 1
    path.write_bytes(content)


def exchange(path: Path) -> None:
    """Put other weights of the same shapes in a stage, and make its manifest say that all is well."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(7)
    tensors = {name: each + torch.randn(each.shape, generator=generator) for name, each in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    directory = path.parent
    manifest = manifests.load(directory)
    outputs = [_as_it_is(output, directory) for output in manifest.outputs]
    changed = manifest.model_copy(update={"outputs": outputs, "digest": manifests.content_digest(outputs)})
    (directory / manifests.FILE_NAME).write_text(seal.sealed(changed))
    manifests.verify(directory)


def _as_it_is(output: OutputRecord, directory: Path) -> OutputRecord:
    path = directory / output.path
    return output.model_copy(update={"bytes": path.stat().st_size, "sha256": file_sha256(path)})


def test_every_stage_is_published_intact_with_its_report(run: Path) -> None:
    assert sorted(path.name for path in (run / "stages").iterdir()) == sorted(STAGES)
    assert baton("verify", run) == 0
    assert (run / "report.html").read_text().lstrip().startswith("<!")
    assert json.loads((run / "report.json").read_text())


def test_every_stage_with_a_model_records_what_it_was_expected_to_take(run: Path) -> None:
    for stage in STAGES:
        cost = manifest_of(run, stage).cost
        assert (cost.expected_memory is None) == (stage == "tokenizer")
        if cost.expected_memory:
            assert cost.expected_memory.tokens_per_batch == 8192
            assert cost.peak_memory_bytes < 1.5 * cost.expected_memory.total


def test_the_plan_says_what_every_stage_with_a_model_takes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert baton("plan", config, f"output={config.parent}/other") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("      memory ") and line.endswith("(auto)") for line in lines) == len(STAGES) - 1
    assert baton("plan", config, f"output={config.parent}/other", "--json") == 0
    plan = {each["stage"]: each["memory"] for each in json.loads(capsys.readouterr().out)}
    assert plan["tokenizer"] is None
    parts = ("weights", "adapters", "optimizer", "activations", "logits", "cache", "fixed")
    assert plan["ppo"]["total"] == sum(plan["ppo"][name] for name in parts)
    assert plan["ppo"]["adapters"] > plan["dpo"]["adapters"] > 0


@pytest.mark.slow
def test_a_chain_within_a_limit_takes_smaller_batches(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--until", "dpo", f"output={tmp_path}/run", "stages.dpo.max_length=128", "memory=1MB"]
    assert baton("run", config, *arguments) == 0
    assert "dpo: tokens_per_batch auto: 256, of 0 MB that are free" in capsys.readouterr().out
    expected = manifest_of(tmp_path / "run", "dpo").cost.expected_memory
    assert expected is not None
    assert expected.tokens_per_batch == 256
    assert baton("plan", config, *arguments[:-1]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_manifests_lead_from_every_stage_to_the_one_before(run: Path) -> None:
    kinds = {"tokenizer": "tokenizer", "base": "model", "sft": "model", "reward": "reward", "dpo": "adapter"}
    for name in STAGES:
        manifest = manifest_of(run, name)
        assert manifest.kind == {**kinds, "ppo": "adapter", "evaluate": "evaluation"}[name]
        for given in manifest.inputs.values():
            directory = run / given.directory
            assert given.manifest_sha256 == file_sha256(directory / "manifest.json")
            assert given.digest == manifests.load(directory).digest
    sft = manifest_of(run, "sft")
    for name in ("reward", "dpo", "ppo"):
        adaptation = manifest_of(run, name).adaptation
        assert adaptation is not None
        assert (adaptation.base, adaptation.base_source) == (sft.digest, "sft")
        assert adaptation.reference == (None if name == "reward" else sft.digest)
    assert len({json.dumps(manifest_of(run, name).tokenizer) for name in STAGES[:-1]}) == 1


@pytest.mark.parametrize(("stage", "file"), WEIGHTS)
def test_a_flipped_byte_is_named(copy: Path, capsys: pytest.CaptureFixture[str], stage: str, file: str) -> None:
    flip_a_byte(copy / "stages" / stage / file)
    assert baton("verify", copy) == 5
    shown = capsys.readouterr()
    assert f"{stage}: damaged\n  {file}: sha256 " in shown.out
    assert f"damaged: {stage}" in shown.err


@pytest.mark.parametrize(("stage", "child"), [("sft", "dpo"), ("reward", "ppo"), ("sft", "ppo")])
def test_a_stage_does_not_start_on_a_damaged_input(
    config: Path, copy: Path, capsys: pytest.CaptureFixture[str], stage: str, child: str
) -> None:
    shutil.rmtree(copy / "stages" / child)
    file = "model.safetensors" if stage == "sft" else "head.safetensors"
    flip_a_byte(copy / "stages" / stage / file)
    assert baton("run", config, f"output={copy}", "--only", child) == 5
    assert f"stages/{stage}: damaged: {file}: sha256 " in capsys.readouterr().err
    assert not (copy / "stages" / child).exists()
    assert not (copy / ".failed").exists()


@pytest.mark.parametrize(
    ("stage", "file", "child"),
    [
        ("base", "model.safetensors", "sft"),
        ("sft", "model.safetensors", "dpo"),
        ("reward", "head.safetensors", "ppo"),
        ("reward", "adapter_model.safetensors", "ppo"),
        ("reward", "adapter_model.safetensors", "evaluate"),
        ("dpo", "adapter_model.safetensors", "evaluate"),
    ],
)
def test_probes_refuse_another_model_whose_hashes_are_in_order(
    config: Path, copy: Path, capsys: pytest.CaptureFixture[str], stage: str, file: str, child: str
) -> None:
    before = manifests.sha256(copy / "stages" / child)
    exchange(copy / "stages" / stage / file)
    assert baton("run", config, f"output={copy}", "--only", child) == 5
    said = capsys.readouterr().err
    assert f"stages/{stage}/probes.json: probe " in said
    assert "is not the one that was trained" in said
    assert manifests.sha256(copy / "stages" / child) == before


def test_a_reward_model_on_an_exchanged_base_is_refused_with_both_digests(
    config: Path, copy: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exchange(copy / "stages" / "sft" / "model.safetensors")
    assert baton("run", config, f"output={copy}", "--only", "ppo") == 5
    old, new = manifest_of(run, "sft").digest, manifest_of(copy, "sft").digest
    assert f"its base `sft` has digest {new}, it was trained on {old}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_run_trains_nothing_and_never_imports_torch(config: Path, copy: Path) -> None:
    before = {str(path): path.read_bytes() for path in manifests.walk(copy / "stages")}
    script = (
        "import sys; from pipeline import cli; code = cli.execute(cli.app, sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", script, "run", str(config), f"output={copy}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to do: every stage is up to date" in done.stdout
    assert {str(path): path.read_bytes() for path in manifests.walk(copy / "stages")} == before


@pytest.mark.slow
def test_a_changed_setting_reruns_its_stage_and_what_follows(
    config: Path, copy: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ["stages.dpo.beta=0.2", f"output={copy}"]
    assert baton("plan", config, *change) == 0
    planned = capsys.readouterr().out
    assert "run   dpo (dpo)\n      config beta: 0.1 -> 0.2\n" in planned
    assert "run   evaluate (evaluate)\n      parent will run: dpo\n" in planned
    assert "2 of 7 would run" in planned
    assert baton("run", config, *change) == 0
    before, after = digests(run), digests(copy)
    assert {name for name in STAGES if before[name] != after[name]} == {"dpo", "evaluate"}
    assert sorted(path.name.rpartition("-")[0] for path in (copy / "archive").iterdir()) == ["dpo", "evaluate"]
    assert baton("verify", copy) == 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(config: Path, run: Path, tmp_path: Path) -> None:
    assert baton("run", config, f"output={tmp_path}/same") == 0
    assert digests(tmp_path / "same") == digests(run)
    assert baton("run", config, f"output={tmp_path}/other", "seed=1", "--until", "base") == 0
    assert manifest_of(tmp_path / "other", "tokenizer").digest == manifest_of(run, "tokenizer").digest
    assert manifest_of(tmp_path / "other", "base").digest != manifest_of(run, "base").digest


def test_every_stage_logs_its_steps(run: Path) -> None:
    steps = {name: len(records(run, name)) for name in STAGES}
    assert steps == {"tokenizer": 1, "base": 12, "sft": 6, "reward": 6, "dpo": 4, "ppo": 2, "evaluate": 4}
    for name in STAGES:
        numbers = [value for record in records(run, name) for value in record.values() if isinstance(value, float)]
        assert all(map(math.isfinite, numbers))


def test_pretraining_and_the_reward_model_learn(run: Path) -> None:
    for name in ("base", "reward"):
        losses = [record["loss"] for record in records(run, name)]
        assert losses[-1] < losses[0]


def test_dpo_starts_at_its_reference(run: Path, branches: Path) -> None:
    for directory, stage in ((run, "dpo"), (branches, "again")):
        first, *_, last = records(directory, stage)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["margin"] == 0.0
        assert last["margin"] != 0.0


def test_ppo_starts_at_its_reference_with_a_ratio_of_one(config: Path, copy: Path, run: Path) -> None:
    first, second = records(run, "ppo")
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert second["kl"] != 0.0
    change = ["stages.ppo.minibatches=1", "stages.ppo.steps=1", f"output={copy}"]
    assert baton("run", config, *change, "--only", "ppo") == 0
    with_one_update = records(copy, "ppo")[0]
    assert with_one_update["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert with_one_update["approximate_kl"] > 0.0


def test_models_are_compared_with_their_parents_and_every_figure_has_an_interval(run: Path) -> None:
    models = json.loads((run / "stages" / "evaluate" / "evaluation.json").read_text())["models"]
    parents = {name: model["parent"] for name, model in models.items()}
    assert parents == {"base": None, "sft": "base", "dpo": "sft", "ppo": "sft", "reward": None}
    for model in models.values():
        for metric in model["metrics"].values():
            assert metric["low"] <= metric["value"] <= metric["high"]
            assert metric["n"] >= 1
    for name in ("dpo", "ppo"):
        found = models[name]["metrics"].keys()
        assert {"gold_gain", "reward_gain", "kl", "pair_accuracy", "bits_per_byte", "length"} <= found
        assert {"win_rate.gold", "win_rate.reward"} <= found
    assert "pair_accuracy" in models["reward"]["metrics"]
    samples = (run / "stages" / "evaluate" / "samples.jsonl").read_text().splitlines()
    assert all(json.loads(line)["responses"].keys() == {"base", "sft", "dpo", "ppo"} for line in samples)


def test_policies_are_compared_with_best_of_n_of_their_parent_at_the_same_divergence(run: Path) -> None:
    found = json.loads((run / "stages" / "evaluate" / "evaluation.json").read_text())
    assert found["frontier"].keys() == {"sft"}
    points = found["frontier"]["sft"]
    assert [point["n"] for point in points] == [1, 2, 3]
    rewards = [point["reward"]["value"] for point in points]
    assert rewards == sorted(rewards)
    assert all(point["gold"]["low"] <= point["gold"]["value"] <= point["gold"]["high"] for point in points)
    gold = [point["gold"]["value"] for point in points]
    roots = [math.sqrt(math.log(n) - (n - 1) / n) for n in (1, 2, 3)]
    for name in ("dpo", "ppo"):
        metrics = found["models"][name]["metrics"]
        bar = np.interp(math.sqrt(max(0.0, metrics["kl"]["value"])), roots, gold)
        assert metrics["frontier_gap"]["value"] == pytest.approx(metrics["gold"]["value"] - bar)
    assert "Reward against divergence" in (run / "report.html").read_text()


@pytest.mark.slow
def test_best_of_n_without_an_adapter_beside_its_parent_is_warned_about(config: Path, copy: Path) -> None:
    change = ["stages.evaluate.models=[base, sft]", f"output={copy}"]
    assert baton("run", config, *change, "--only", "evaluate") == 0
    assert json.loads((copy / "stages" / "evaluate" / "evaluation.json").read_text())["frontier"] == {}
    (warning,) = manifest_of(copy, "evaluate").warnings
    assert "best_of has nothing to measure" in warning


def test_a_reward_model_that_is_loaded_again_gives_the_scores_it_recorded(run: Path) -> None:
    from data.tree import Branch, Tree
    from pipeline.inputs import resolve
    from stages.core.device import choose
    from stages.core.roles import REWARD, open_base
    from stages.core.scoring import reward_scores

    recorded = json.loads((run / "stages" / "reward" / "probes.json").read_text())
    roles = open_base(resolve("reward", RunDirectory(run), STAGES), choose("cpu", "float32"))
    roles.load(REWARD, run / "stages" / "reward")
    trees = [
        Tree(tuple(each["prompt"]), (Branch.of(each["response"]),), number)
        for number, each in enumerate(recorded["inputs"])
    ]
    found = reward_scores(roles, REWARD, trees)
    assert len(found) == 8
    assert found == pytest.approx(recorded["outputs"], abs=1e-6)


@pytest.mark.slow
def test_a_stage_runs_as_a_script_of_its_own(config: Path, copy: Path, run: Path) -> None:
    command = [sys.executable, "-m", "stages.dpo", str(config), f"output={copy}", "--force", "dpo"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "dpo: running (forced)" in done.stdout
    assert digests(copy) == digests(run)  # in another process, where sets have another order
    assert manifest_of(copy, "dpo").command.startswith(f"python -m stages.dpo {config}")


def test_a_script_of_a_kind_that_the_run_does_not_have_says_so(branches: Path) -> None:
    config = branches.parent / "branches.yaml"
    assert cli.execute(launch.application("reward"), [str(config)]) == 2


def test_pretraining_goes_on_from_a_model(run: Path, branches: Path) -> None:
    longer = manifest_of(branches, "longer")
    assert longer.inputs["policy"].digest == manifest_of(run, "base").digest
    assert longer.tokenizer == manifest_of(run, "base").tokenizer
    assert longer.digest != manifest_of(run, "base").digest
    assert records(branches, "longer")[0]["loss"] < records(run, "base")[0]["loss"]


def test_all_weights_can_be_fine_tuned(branches: Path) -> None:
    from safetensors.torch import load_file

    manifest = manifest_of(branches, "full")
    assert (manifest.kind, manifest.adaptation) == ("model", None)
    before, after = (load_file(branches / "stages" / name / "model.safetensors") for name in ("longer", "full"))
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)


def test_dpo_on_an_adapter_keeps_it_as_the_reference(run: Path, branches: Path) -> None:
    adaptation = manifest_of(branches, "again").adaptation
    assert adaptation is not None
    assert adaptation.base == manifest_of(run, "sft").digest
    assert adaptation.reference == manifest_of(run, "dpo").digest


def test_an_adapter_whose_base_is_in_another_run_can_be_handed_on(run: Path, branches: Path) -> None:
    found = inputs.resolve(str(branches / "stages" / "again"), RunDirectory(branches), {})
    assert found.base is not None
    assert found.base.directory.resolve() == (run / "stages" / "sft").resolve()
    assert found.base.digest == manifest_of(run, "sft").digest


def test_a_reward_model_on_another_base_is_refused_with_a_way_out(
    branches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert baton("run", branches.parent / "branches.yaml", "--only", "ppo") == 5
    said = capsys.readouterr().err
    assert "the reward model sits on " in said
    assert "fix: train the reward stage on the same `policy` as this stage" in said
    assert not (branches / "stages" / "ppo").exists()
