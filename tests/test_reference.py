"""The reference's log-probabilities, kept: what each step would compute, and computed again only when they must be."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import tiny
import torch

from data.batch import batches
from data.tree import Branch, Tree
from pipeline import cli
from pipeline import manifest as manifests
from pipeline.contract import Artifact
from stages import dpo
from stages.core import reference
from stages.core.layout import LAYOUTS
from stages.core.reference import KeptReference, in_each_step
from stages.core.roles import POLICY, Roles, open_role

STAGES = """\
output: {root}/run
device: cpu
dtype: float32
data:
  pairs: {{source: {root}/pairs.jsonl, held_out: 0.2}}
  more: {{source: {root}/more.jsonl, held_out: 0.2}}
stages:
  dpo:
    kind: dpo
    policy: {root}/model
    data: {{pairs: {{epochs: 0.5}}, more: {{epochs: 2}}}}
    lora: {{rank: 4}}
    epochs: 2
    examples_per_step: 8
    max_length: 256
    optimizer: {{learning_rate: 0.01}}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that nothing was put in yet."""
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs of each forward of a reference."""
    made: list[int] = []
    compute = reference.pair_logprobs
    assert dpo.pair_logprobs is compute  # the policy's forwards do not count

    def counted(language_model: Any, batch: Any) -> torch.Tensor:
        made.append(len(batch.trees))
        return compute(language_model, batch)

    monkeypatch.setattr(reference, "pair_logprobs", counted)
    return made


@pytest.fixture
def base(tmp_path: Path) -> Artifact:
    return models.save_base(tmp_path / "base")


def kept(
    artifact: Artifact, trees: list[Tree], layout: str = "tree", roles: Roles | None = None, budget: int = 60
) -> tuple[KeptReference, list[str]]:
    said: list[str] = []
    roles = roles or open_role(artifact, POLICY, models.LORA, models.CPU)
    found = KeptReference(
        roles, artifact, lambda: iter(trees), tokens_per_batch=budget, layout=layout, say=said.append
    )  # fmt: skip
    return found, said


def by_number(values: reference.Reference, trees: list[Tree]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for batch in batches(trees, 50):
        numbers = [tree.number for tree in batch.trees]
        found.update(zip(numbers, values(batch).tolist(), strict=True))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_what_is_kept_is_what_each_step_would_compute(base: Artifact, layout: str, budget: int) -> None:
    trees = models.pairs(9)
    roles = open_role(base, POLICY, models.LORA, models.CPU)
    models.disturb(roles, POLICY)
    values, said = kept(base, trees, layout, roles, budget)
    expected = by_number(in_each_step(roles), trees)
    for number, pair in by_number(values, trees).items():
        assert pair == pytest.approx(expected[number], rel=1e-5)
    assert said == ["reference: computing log-probabilities of 9 pairs once"]


def test_a_second_run_computes_nothing_and_reads_the_same(base: Artifact, forwards: list[int]) -> None:
    trees = models.pairs(9)
    first, _ = kept(base, trees)
    assert sum(forwards) == 9
    forwards.clear()
    second, said = kept(base, trees)
    assert (forwards, said) == ([], [])
    assert by_number(second, trees) == by_number(first, trees)


def test_pairs_are_found_in_any_order_under_any_number_and_however_often(base: Artifact, forwards: list[int]) -> None:
    trees = models.pairs(9)
    first, _ = kept(base, trees)
    forwards.clear()
    renumbered = [dataclasses.replace(tree, number=100 + tree.number, margin=3.0, origin="x") for tree in trees]
    shuffled = random.Random(0).choices(renumbered, k=30) + renumbered[::-1]
    second, _ = kept(base, shuffled)
    assert forwards == []
    found = by_number(second, renumbered)
    assert {number - 100: pair for number, pair in found.items()} == by_number(first, trees)


def test_a_pair_that_comes_twice_is_computed_once(base: Artifact, forwards: list[int]) -> None:
    trees = models.pairs(5)
    twin = dataclasses.replace(trees[2], number=77)
    values, _ = kept(base, [*trees, twin, *trees])
    assert sum(forwards) == 5
    found = by_number(values, [*trees, twin])
    assert found[77] == found[trees[2].number]


def other_token(tree: Tree) -> Tree:
    first, second = tree.branches
    return dataclasses.replace(tree, branches=(first, Branch((*second.tokens[:-1], 5), second.read)))


def other_split(tree: Tree) -> Tree:
    """The same tokens, of which one more belongs to the prompt."""
    first, second = tree.branches
    shared = dataclasses.replace(tree, prompt=(*tree.prompt, first.tokens[0]))
    return dataclasses.replace(shared, branches=(Branch(first.tokens[1:], first.read[1:]), second))


def unread(tree: Tree) -> Tree:
    first, second = tree.branches
    return dataclasses.replace(tree, branches=(Branch(first.tokens, (False, *first.read[1:])), second))


@pytest.mark.parametrize("change", [other_token, other_split, unread])
def test_a_change_of_one_pair_is_noticed(base: Artifact, forwards: list[int], change: Any) -> None:
    trees = [tree for tree in models.pairs(12) if min(len(each.tokens) for each in tree.branches) > 1]
    kept(base, trees)
    forwards.clear()
    changed = [change(trees[0]), *trees[1:]]
    values, _ = kept(base, changed)
    assert sum(forwards) == len(trees)
    expected = by_number(in_each_step(open_role(base, POLICY, models.LORA, models.CPU)), changed)
    assert by_number(values, changed)[trees[0].number] == pytest.approx(expected[trees[0].number], rel=1e-5)


def test_another_reference_precision_or_layout_is_computed_anew(
    base: Artifact, forwards: list[int], tmp_path: Path
) -> None:
    trees = models.pairs(4)
    roles = models.roles(POLICY)
    models.disturb(roles, POLICY)
    adapter = models.save_role(roles, POLICY, tmp_path / "adapter", base)
    other_base = dataclasses.replace(adapter, base=dataclasses.replace(base, digest="other"))
    half = open_role(base, POLICY, models.LORA, models.HALF)
    for artifact, layout, opened in [
        (base, "tree", None),
        (base, "plain", None),
        (base, "tree", half),
        (dataclasses.replace(base, digest="other"), "tree", None),
        (adapter, "tree", None),
        (other_base, "tree", None),
    ]:
        forwards.clear()
        values, _ = kept(artifact, trees, layout, opened)
        assert sum(forwards) == 4
        again, _ = kept(artifact, trees, layout, opened)
        assert sum(forwards) == 4
        assert by_number(again, trees) == by_number(values, trees)


def test_an_adapter_is_the_reference_of_what_begins_as_it(base: Artifact, tmp_path: Path) -> None:
    trees = models.pairs(4)
    roles = models.roles(POLICY)
    models.disturb(roles, POLICY)
    adapter = models.save_role(roles, POLICY, tmp_path / "adapter", base)
    found = by_number(kept(adapter, trees)[0], trees)
    with roles.use(POLICY):
        for batch in batches(trees, 50):
            expected = reference.pair_logprobs(roles.base, batch).tolist()
            assert [found[tree.number] for tree in batch.trees] == [pytest.approx(each, rel=1e-5) for each in expected]
    assert found != by_number(kept(base, trees)[0], trees)


@pytest.mark.parametrize("file", [reference.FILE_NAME, "index.json"])
def test_a_damaged_entry_is_not_used_but_made_again(
    base: Artifact, forwards: list[int], own_cache: Path, file: str
) -> None:
    trees = models.pairs(4)
    first, _ = kept(base, trees)
    before = by_number(first, trees)
    (entry,) = [path for path in own_cache.iterdir() if not path.name.startswith(".")]
    content = bytearray((entry / file).read_bytes())
    content[len(content) // 2] ^= 1
    (entry / file).write_bytes(content)
    forwards.clear()
    second, said = kept(base, trees)
    assert sum(forwards) == 4
    assert "is damaged" in said[0]
    assert by_number(second, trees) == before
    assert len(list((own_cache / ".damaged").iterdir())) == 1


def test_many_pairs_are_computed_portion_by_portion(
    base: Artifact, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PORTION", 3)
    trees = models.pairs(10)
    values, _ = kept(base, trees, budget=10_000)
    assert forwards == [3, 3, 3, 1]
    expected = by_number(in_each_step(open_role(base, POLICY, models.LORA, models.CPU)), trees)
    for number, pair in by_number(values, trees).items():
        assert pair == pytest.approx(expected[number], rel=1e-5)


def baton(*arguments: str | Path) -> int:
    return cli.execute(cli.app, list(map(str, arguments)))


def write(path: Path, what: str, count: int) -> None:
    rows = [
        {"prompt": f"{what} {each}?", "chosen": f"Answer {each}.", "rejected": f"Why {what} {each}?"}
        for each in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def own(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run on a mixture that takes half of one source and another twice."""
    foreign = tmp_path_factory.getbasetemp() / "foreign-qwen2"
    if not foreign.exists():
        tiny.save_model(foreign, "qwen2", ["Question 12? Answer 34. Why?"] * 3)
    shutil.copytree(foreign, tmp_path / "model")
    write(tmp_path / "pairs.jsonl", "Question", 40)
    write(tmp_path / "more.jsonl", "Riddle", 12)
    config = tmp_path / "own.yaml"
    config.write_text(STAGES.format(root=tmp_path))
    return config


def steps(config: Path, run: str) -> list[dict[str, float]]:
    lines = (config.parent / run / "stages" / "dpo" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.chain
def test_a_stage_with_a_kept_reference_learns_the_same_and_another_beta_reads_it(
    own: Path, forwards: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    once = "stages.dpo.reference=once"
    assert baton("run", own) == 0
    assert baton("run", own, once, f"output={own.parent}/once") == 0
    plain, found = steps(own, "run"), steps(own, "once")
    assert len(plain) == len(found) > 4
    for name in ("loss", "margin", "accuracy", "chosen_logprob"):
        assert [each[name] for each in found] == pytest.approx([each[name] for each in plain], abs=1e-3)
    assert sum(each["tokens"] for each in plain) == 2 * sum(each["tokens"] for each in found)
    first, second = (manifests.load(own.parent / run / "stages" / "dpo") for run in ("run", "once"))
    assert second.metrics["margin"].value == pytest.approx(first.metrics["margin"].value, abs=1e-3)
    assert capsys.readouterr().out.count("reference: computing log-probabilities of") == 2  # training, held out
    forwards.clear()
    other = ["stages.dpo.beta=0.5", "stages.dpo.loss=ipo", "seed=3", f"output={own.parent}/beta"]
    assert baton("run", own, once, *other) == 0
    assert forwards == []
    assert "reference: computing" not in capsys.readouterr().out
    third = manifests.load(own.parent / "beta" / "stages" / "dpo")
    assert second.cost.tokens == sum(each["tokens"] for each in found)
    assert third.cost.tokens == sum(each["tokens"] for each in steps(own, "beta"))


@pytest.mark.chain
@pytest.mark.parametrize("loss", [["loss=simpo", "gamma=0.5"], ["loss=orpo"]])
def test_a_stage_without_a_reference_computes_and_claims_none(own: Path, forwards: list[int], loss: list[str]) -> None:
    assert baton("run", own, "stages.dpo.epochs=0.5", *(f"stages.dpo.{each}" for each in loss)) == 0
    assert forwards == []
    found = manifests.load(own.parent / "run" / "stages" / "dpo")
    assert found.adaptation is not None
    assert found.adaptation.reference is None
    assert {"pair_accuracy", "margin"} <= found.metrics.keys()
