"""Probes pass on the model that they were recorded on and on no other."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch

from bench import families
from pipeline.contract import Artifact
from pipeline.errors import ArtifactError
from reward.head import ScalarHead
from stages.core import probes
from stages.core.device import Compute
from stages.core.models import LanguageModel
from stages.core.roles import POLICY, REFERENCE, REWARD, Roles, open_base, open_role
from stages.core.scoring import record_probes, replay_probes, reward_scores


def recorded(directory: Path, language_model: LanguageModel | None = None) -> Artifact:
    record_probes(directory, models.forest(20), language_model or models.language_model())
    return Artifact(directory, "model", "")


def test_the_same_model_passes(tmp_path: Path) -> None:
    replay_probes(recorded(tmp_path), models.language_model())


def test_eight_probes_of_one_branch_are_kept(tmp_path: Path) -> None:
    content = json.loads((recorded(tmp_path).directory / probes.FILE_NAME).read_text())
    assert len(content["inputs"]) == len(content["outputs"]) == probes.COUNT
    first = models.forest(20)[0]
    assert content["inputs"][0] == {"prompt": list(first.prompt), "response": list(first.branches[0].tokens)}


@pytest.mark.parametrize("part", ["embed_tokens", "layers.0", "layers.1", "lm_head"])
def test_one_weight_that_changed_is_noticed(tmp_path: Path, part: str) -> None:
    artifact, other = recorded(tmp_path), models.language_model()
    name, weight = next((name, each) for name, each in other.model.named_parameters() if part in name)
    used = models.forest(20)[0].prompt[0] if part in ("embed_tokens", "lm_head") else 0
    weight.data[used, 0] += 2.0
    with pytest.raises(ArtifactError, match=r"probe \d: recorded .* found"):
        replay_probes(artifact, other)
    assert part in name


def test_another_model_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not the one that was trained"):
        replay_probes(recorded(tmp_path), models.language_model(seed=1))


def test_a_model_that_yields_nan_is_noticed(tmp_path: Path) -> None:
    artifact, other = recorded(tmp_path), models.language_model()
    other.model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ArtifactError, match="found nan"):
        replay_probes(artifact, other)


def test_an_adapter_applied_twice_or_not_at_all_is_noticed(tmp_path: Path) -> None:
    base = models.save_base(tmp_path / "base")
    roles = open_role(base, POLICY, models.LORA, models.CPU)
    models.disturb(roles, POLICY)
    adapter = models.save_role(roles, POLICY, tmp_path / "dpo", base)
    with roles.use(POLICY):
        record_probes(adapter.directory, models.responses(8), roles.base)
        replay_probes(adapter, roles.base)
    with roles.use(REFERENCE), pytest.raises(ArtifactError):
        replay_probes(adapter, roles.base)
    twice = Roles(roles.merged(POLICY, base))
    twice.load(POLICY, adapter.directory)
    with twice.use(REFERENCE):
        replay_probes(adapter, twice.base)
    with twice.use(POLICY), pytest.raises(ArtifactError):
        replay_probes(adapter, twice.base)


def test_a_lightly_trained_adapter_left_out_is_noticed_in_bfloat16(tmp_path: Path) -> None:
    base = models.save_base(tmp_path / "base")
    roles = open_role(base, POLICY, models.LORA, models.HALF)
    models.disturb(roles, POLICY, size=0.05)
    adapter = models.save_role(roles, POLICY, tmp_path / "dpo", base)
    with roles.use(POLICY):
        record_probes(adapter.directory, models.responses(8), roles.base)
        replay_probes(adapter, roles.base)
    with roles.use(REFERENCE), pytest.raises(ArtifactError):
        replay_probes(adapter, roles.base)


def test_a_random_head_is_noticed(tmp_path: Path) -> None:
    roles = models.roles(REWARD)
    roles.add_head(REWARD)
    models.disturb(roles, REWARD)
    base = models.save_base(tmp_path / "base")
    reward = models.save_role(roles, REWARD, tmp_path / "reward", base, "reward")
    probes.record(reward.directory, models.pairs(5), lambda trees: reward_scores(roles, REWARD, trees), roles.base)
    again = open_base(reward, models.CPU)
    again.load(REWARD, reward.directory)

    def replay() -> None:
        probes.replay(reward.directory, lambda trees: reward_scores(again, REWARD, trees), again.base)

    replay()
    again.heads[REWARD] = ScalarHead(again.base.hidden_size)
    with pytest.raises(ArtifactError, match="recorded"):
        replay()


def test_another_precision_is_given_room_for_rounding_but_not_for_another_model(tmp_path: Path) -> None:
    artifact = recorded(tmp_path)
    replay_probes(artifact, models.language_model(compute=models.HALF))
    with pytest.raises(ArtifactError):
        replay_probes(artifact, models.language_model(seed=1, compute=models.HALF))


def recorded_before(directory: Path, outputs: list[float], compute: Compute) -> LanguageModel:
    """Probes without outputs in float32, as older versions recorded them."""
    language_model = models.language_model(compute=compute)
    probes.record(directory, models.responses(len(outputs)), lambda trees: outputs, language_model)
    content = json.loads((directory / probes.FILE_NAME).read_text())
    del content[probes.IN_FLOAT32]
    (directory / probes.FILE_NAME).write_text(json.dumps(content))
    return language_model


def test_older_probes_have_the_tolerance_of_their_precision(tmp_path: Path) -> None:
    recorded_before(tmp_path, [1.0, 2.0], models.CPU)
    probes.replay(tmp_path, lambda trees: [1.0, 2.0005], models.language_model())
    with pytest.raises(ArtifactError, match=r"probe 1: recorded 2\.000000, found 2\.002000"):
        probes.replay(tmp_path, lambda trees: [1.0, 2.002], models.language_model())
    probes.replay(tmp_path, lambda trees: [1.0, 2.5], models.language_model(compute=models.HALF))
    with pytest.raises(ArtifactError, match=r"tolerance 0\.6"):
        probes.replay(tmp_path, lambda trees: [1.0, 2.7], models.language_model(compute=models.HALF))
    half = recorded_before(tmp_path, [1.0], models.HALF)
    probes.replay(tmp_path, lambda trees: [1.015], half)
    with pytest.raises(ArtifactError, match=r"tolerance 0\.02"):
        probes.replay(tmp_path, lambda trees: [1.03], half)


@pytest.mark.parametrize("recording", [models.CPU, models.HALF])
@pytest.mark.parametrize("replaying", [models.CPU, models.HALF])
def test_outputs_in_float32_are_the_same_in_every_precision(
    tmp_path: Path, recording: Compute, replaying: Compute
) -> None:
    """Of weights that bfloat16 cannot hold, a receiver in another precision still computes the recorded ones."""
    base = models.save_base(tmp_path / "base")
    roles = open_role(base, POLICY, models.LORA, recording)
    models.disturb(roles, POLICY, size=0.05)
    adapter = models.save_role(roles, POLICY, tmp_path / "dpo", base)
    with roles.use(POLICY):
        record_probes(adapter.directory, models.responses(8), roles.base)
    again = open_base(adapter, replaying)
    again.load(POLICY, adapter.directory)
    with again.use(POLICY):
        replay_probes(adapter, again.base)
    for _, parameter in again.parameters(POLICY):
        parameter.data.mul_(1.02)
    with again.use(POLICY), pytest.raises(ArtifactError, match=r"tolerance 0\.001"):
        replay_probes(adapter, again.base)


def test_rounding_in_the_precision_of_the_run_passes_and_a_broken_kernel_does_not(tmp_path: Path) -> None:
    half = models.language_model(compute=models.HALF)
    probes.record(tmp_path, models.responses(1), lambda trees: [1.0], half)
    in_own_precision_and_in_float32 = iter([[1.2], [1.0], [1.3]])
    probes.replay(tmp_path, lambda trees: next(in_own_precision_and_in_float32), half)
    with pytest.raises(ArtifactError, match=r"tolerance 0\.25"):
        probes.replay(tmp_path, lambda trees: next(in_own_precision_and_in_float32), half)


@pytest.mark.parametrize("compute", [models.CPU, models.HALF])
@pytest.mark.parametrize("family", ["gemma2", "gemma2 with a window", "mistral with a window", "phi"])
def test_every_architecture_has_probes(tmp_path: Path, family: str, compute: Compute) -> None:
    """Also one whose attention computes no packed rows."""
    artifact = recorded(tmp_path, families.tiny(family, compute.dtype))
    replay_probes(artifact, families.tiny(family, compute.dtype))
    with pytest.raises(ArtifactError, match="recorded"):
        replay_probes(artifact, families.tiny(family, compute.dtype, seed=1))


def test_a_foreign_model_has_no_probes_to_replay(tmp_path: Path) -> None:
    probes.replay(tmp_path, lambda trees: pytest.fail("nothing to score"), models.language_model())
