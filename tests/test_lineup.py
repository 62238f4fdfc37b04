"""Models side by side: one base for all that share it, each checked, parents known."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch

from data.template import tokenizer_record
from pipeline.contract import Artifact
from pipeline.errors import ArtifactError, ConfigError
from pipeline.manifest import Adaptation, InputRecord, Manifest
from pipeline.references import model_name
from stages.core import probes
from stages.core.lineup import Lineup
from stages.core.roles import POLICY, REFERENCE, REWARD, Roles
from stages.core.scoring import record_probes, reward_scores

PATHS = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(tmp_path: Path) -> Artifact:
    return models.save_base(tmp_path / "sft", digest="sft")


def adapter(base: Artifact, name: str, seed: int, parent: str = "sft") -> Artifact:
    """A trained policy on the base, with probes and the record of its parent."""
    roles = models.roles(POLICY)
    models.disturb(roles, POLICY, seed)
    stored = models.save_role(roles, POLICY, base.directory.parent / name, base)
    with roles.use(POLICY):
        record_probes(stored.directory, models.responses(4), roles.base)
    manifest = Manifest.model_construct(
        adaptation=Adaptation(base=base.digest, base_source=base.source),
        inputs={"policy": InputRecord(source=parent, kind="model", digest=parent)},
        tokenizer=tokenizer_record(models.tokenizer()),
    )
    return Artifact(stored.directory, "adapter", name, manifest, name, base)


def judge_on(base: Artifact) -> tuple[Roles, Artifact]:
    roles = models.roles(REWARD)
    roles.add_head(REWARD)
    models.disturb(roles, REWARD, seed=7)
    stored = models.save_role(roles, REWARD, base.directory.parent / "rm", base, "reward")
    probes.record(stored.directory, models.pairs(4), lambda trees: reward_scores(roles, REWARD, trees), roles.base)
    return roles, stored


def by_role(*artifacts: Artifact) -> dict[str, Artifact]:
    return {f"models.{number}": artifact for number, artifact in enumerate(artifacts)}


@torch.no_grad()
def test_each_contestant_computes_as_itself_on_one_base(base: Artifact) -> None:
    children = [adapter(base, "dpo", 1), adapter(base, "ppo", 2)]
    lineup = Lineup(by_role(base, *children), models.CPU)
    found = {}
    for name, contestant in lineup.contestants.items():
        with contestant.use() as language_model:
            found[name] = language_model.model(PATHS).logits
    assert torch.equal(found["sft"], models.language_model().model(PATHS).logits)
    for name, seed in (("dpo", 1), ("ppo", 2)):
        alone = models.roles(POLICY)
        models.disturb(alone, POLICY, seed)
        with alone.use(POLICY):
            assert torch.equal(found[name], alone.base.model(PATHS).logits)
    assert len({id(contestant.roles) for contestant in lineup.contestants.values()}) == 1


def test_parents_are_those_of_the_manifests_that_stand_in_the_line_up(base: Artifact) -> None:
    dpo = adapter(base, "dpo", 1)
    ppo = adapter(base, "ppo", 2, parent="dpo")
    lineup = Lineup(by_role(base, dpo, ppo), models.CPU)
    assert {name: each.parent for name, each in lineup.contestants.items()} == {"sft": None, "dpo": "sft", "ppo": "dpo"}
    alone = Lineup(by_role(ppo), models.CPU)
    assert alone.contestants["ppo"].parent is None


def test_the_judge_shares_the_base_and_scores_as_it_was_trained(base: Artifact) -> None:
    roles, stored = judge_on(base)
    lineup = Lineup(by_role(base, adapter(base, "dpo", 1)), models.CPU)
    judge = lineup.judge(stored)
    assert judge is lineup.contestants["sft"].roles
    trees = models.responses(5)
    assert reward_scores(judge, REWARD, trees) == reward_scores(roles, REWARD, trees)


def test_another_base_is_loaded_beside_the_first(base: Artifact) -> None:
    other = models.save_base(base.directory.parent / "other", digest="other")
    lineup = Lineup(by_role(base, other), models.CPU)
    assert lineup.contestants["sft"].roles is not lineup.contestants["other"].roles


def test_a_damaged_contestant_is_refused(base: Artifact) -> None:
    first, second = adapter(base, "dpo", 1), adapter(base, "ppo", 2)
    (second.directory / probes.FILE_NAME).write_bytes((first.directory / probes.FILE_NAME).read_bytes())
    with pytest.raises(ArtifactError, match="probe 0"):
        Lineup(by_role(base, first, second), models.CPU)


def test_two_models_of_one_name_are_refused(base: Artifact) -> None:
    with pytest.raises(ConfigError, match="two models are called `sft`"):
        Lineup(by_role(base, base), models.CPU)


def test_the_bare_base_is_the_reference(base: Artifact) -> None:
    assert Lineup(by_role(base), models.CPU).contestants["sft"].role == REFERENCE


@pytest.mark.parametrize(("source", "name"), [
    ("sft", "sft"), ("runs/a/stages/dpo", "dpo"), ("hub:owner/model@main", "model"), ("runs/me@home/stages/dpo", "dpo"),
])  # fmt: skip
def test_a_model_is_called_by_the_last_part_of_its_source(source: str, name: str) -> None:
    assert model_name(source) == name


def test_parents_are_found_whatever_the_order_of_the_models(base: Artifact) -> None:
    dpo = adapter(base, "dpo", 1)
    ppo = adapter(base, "ppo", 2, parent="dpo")
    lineup = Lineup(by_role(ppo, dpo, base), models.CPU)
    assert list(lineup.contestants) == ["sft", "dpo", "ppo"]
    assert [each.parent for each in lineup.contestants.values()] == [None, "sft", "dpo"]
