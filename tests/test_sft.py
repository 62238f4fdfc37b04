"""Supervised fine-tuning as a stage: what its options change in what it publishes, and what they do not."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline import cli
from pipeline import manifest as manifests
from pipeline.contract import Artifact
from stages import sft
from stages.core.models import LanguageModel, load_model
from stages.core.roles import Roles

pytestmark = pytest.mark.chain

RUN = """\
output: {root}/{name}
device: cpu
dtype: float32
data: {{chats: {{source: "world:demonstrations", rows: 60, held_out: 0.2}}}}
stages:
  sft: {{kind: sft, policy: {root}/base, data: chats, steps: 3, examples_per_step: 4,
    optimizer: {{learning_rate: 0.01}}, {options}}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sft")
    tiny.save_model(made / "base", "llama", ["Say seven, please."] * 20)
    return made


def published(root: Path, name: str, options: str) -> Path:
    """The stage directory of a run with these settings of the stage."""
    config = root / f"{name}.yaml"
    config.write_text(RUN.format(root=root, name=name, options=options))
    assert cli.execute(cli.app, ["run", str(config)]) == 0
    return root / name / "stages" / "sft"


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_checkpointed_layers_change_nothing_in_what_is_published(root: Path) -> None:
    plain = published(root, "plain", "lora: {rank: 4, variant: dora}")
    again = published(root, "checkpointed", "lora: {rank: 4, variant: dora}, gradient_checkpointing: true")
    assert losses(plain) == losses(again)
    expected, found = weights(plain), weights(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[each], found[each]) for each in expected)


@pytest.mark.parametrize(
    "lora", ["rank: 4, variant: rslora, initialisation: pissa", "rank: 4, variant: dora, top_layers: 1"]
)
def test_adapters_of_all_kinds_are_merged_into_the_stored_weights(root: Path, lora: str) -> None:
    directory = published(root, lora.replace(" ", "").replace(":", "-").replace(",", "-"), f"lora: {{{lora}}}")
    manifest = manifests.load(directory)
    assert manifest.kind == "model"
    assert manifest.adaptation is not None
    assert manifest.adaptation.merged
    before, after = weights(root / "base"), weights(directory)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name for name in before if "_proj." in name and ("top" not in lora or ".layers.1." in name)}
    assert moved == adapted


def test_the_trained_model_is_let_go_before_the_stored_one_is_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    load, open_roles = sft.load_model, sft._open

    def watched_open(*arguments: Any) -> Any:
        roles = open_roles(*arguments)
        opened.append(weakref.ref(roles.base.model))
        return roles

    def watched_load(*arguments: Any, **options: Any) -> Any:
        alive.extend(each() is not None for each in opened)
        return load(*arguments, **options)

    monkeypatch.setattr(sft, "_open", watched_open)
    monkeypatch.setattr(sft, "load_model", watched_load)
    published(root, "watched", "lora: {rank: 4}")
    assert alive == [False]


def test_a_merge_that_went_wrong_is_not_published(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forgotten(roles: Roles, role: str, artifact: Artifact) -> LanguageModel:
        return load_model(artifact, roles.base.compute, dtype="auto")

    monkeypatch.setattr(Roles, "merged", forgotten)
    config = root / "forgotten.yaml"
    config.write_text(RUN.format(root=root, name="forgotten", options="lora: {rank: 4}"))
    assert cli.execute(cli.app, ["run", str(config)]) == 5
    assert "probe 0: recorded -" in capsys.readouterr().err
    assert not (root / "forgotten" / "stages" / "sft").exists()
