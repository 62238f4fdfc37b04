"""Reward losses against TRL's RewardTrainer, and ensembles of heads on one adapter."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from data.tree import Branch, Tree
from pipeline import cli
from pipeline import manifest as manifests
from pipeline.config import RewardSettings
from reward import disagreement
from reward.disagreement import Ranking
from reward.head import ScalarHead
from stages import reward
from stages.core import centring
from stages.core.losses import ranking_loss
from stages.core.roles import REWARD, VALUE, Roles
from stages.core.scoring import scores

TEXT = [{"prompt": "Where does Ada live?", "chosen": "In Oslo.", "rejected": "Why?"}]
CONFIG = """\
output: {root}/run
device: cpu
dtype: float32
data:
  pairs: {{source: {root}/pairs.jsonl, held_out: 0.3}}
  prompts: {{source: {root}/pairs.jsonl, held_out: 0.3}}
stages:
  reward: {{kind: reward, policy: {root}/model, data: pairs, heads: 3, lora: {{rank: 4}}, steps: 3,
    examples_per_step: 8, max_length: 64, optimizer: {{learning_rate: 0.01}}}}
  ppo: {{kind: ppo, policy: {root}/model, reward: reward, data: prompts, steps: 1, examples_per_step: 4,
    max_length: 64, max_new_tokens: 4, lora: {{rank: 4}}}}
"""


def settings(**options: Any) -> RewardSettings:
    return RewardSettings(policy="p", data="d", **options)


def judge(heads: int = 1) -> Roles:
    """A reward role whose adapter changes nothing yet, with random heads."""
    roles = models.roles(REWARD)
    roles.heads[REWARD] = ScalarHead(roles.base.hidden_size, heads)
    torch.manual_seed(0)
    torch.nn.init.normal_(roles.heads[REWARD].linear.weight)
    return roles


def ours(roles: Roles, chosen: RewardSettings, trees: list[Tree], seed: int = 0) -> float:
    """The loss of one step; leaves its gradient in adapter and heads."""
    total = 0.0
    with roles.use(REWARD):
        for part in reward._objective(roles, chosen, "tree", seed)(trees):
            part.loss.backward()
            total += part.loss.item()
    return total


@functools.cache
def trl_trainer() -> Any:
    """TRL's trainer on the same base with the same head."""
    from trl import RewardConfig, RewardTrainer

    roles = judge()
    config = models.model().config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    bare = {name: each for name, each in models.model().state_dict().items() if name.startswith("model.")}
    missing, unexpected = model.load_state_dict(bare, strict=False)
    assert (missing, unexpected) == (["score.weight"], [])
    with torch.no_grad():
        model.score.weight.copy_(roles.heads[REWARD].linear.weight)
    arguments = RewardConfig(output_dir="unused", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False)
    return RewardTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(TEXT), processing_class=models.tokenizer()
    )


def trl_loss(trees: list[Tree], *, margin: bool, centring: float | None) -> tuple[float, Tensor]:
    """TRL's loss of a batch, and its gradient in the head."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl_trainer()
        trainer.args.center_rewards_coefficient = centring
        examples = [
            {
                "chosen_ids": [*tree.prompt, *tree.branches[0].tokens],
                "rejected_ids": [*tree.prompt, *tree.branches[1].tokens],
                **({"margin": tree.margin} if margin else {}),
            }
            for tree in trees
        ]
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
        loss.backward()
    return loss.item(), trainer.model.score.weight.grad.clone()


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centring", [0.0, 0.01, 0.5])
def test_loss_and_gradient_are_those_of_trl_s_reward_trainer(margin: bool, centring: float) -> None:
    trees = [dataclasses.replace(tree, margin=0.3 * tree.number) for tree in models.pairs(6)]
    roles = judge()
    expected, gradient = trl_loss(trees, margin=margin, centring=centring or None)
    assert ours(roles, settings(margin=margin, centring=centring), trees) == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(roles.heads[REWARD].linear.weight.grad, gradient, atol=1e-5)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_ranking_loss_is_what_drawing_without_replacement_gives(count: int) -> None:
    """Every order's chance, by drawing from an urn step by step; they are chances of all that can happen."""
    values = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    chances = {}
    for order in itertools.permutations(range(count)):
        left, chance = list(range(count)), 1.0
        for drawn in order:
            chance *= math.exp(values[drawn]) / sum(math.exp(values[each]) for each in left)
            left.remove(drawn)
        chances[order] = chance
    assert sum(chances.values()) == pytest.approx(1)
    for order, chance in chances.items():
        assert math.exp(-ranking_loss(values[list(order)]).item()) == pytest.approx(chance)


def rankings(count: int) -> list[Tree]:
    """Pairs and longer rankings, with margins."""
    some = [*models.pairs(count), *(tree for tree in models.forest(40, seed=4) if len(tree.branches) > 2)][: 2 * count]
    return [Tree(tree.prompt, tree.branches, number, margin=0.1 * number) for number, tree in enumerate(some)]


def test_the_loss_of_an_ensemble_is_the_mean_of_its_heads_each_with_its_own_weights() -> None:
    chosen, trees = settings(heads=3, centring=0.1, margin=True), rankings(4)
    roles = judge(3)
    slow = 0.0
    for head in range(3):
        alone = judge()
        alone.heads[REWARD].linear.weight.data.copy_(roles.heads[REWARD].linear.weight[head : head + 1])
        for tree in trees:
            weight = reward.bootstrap_weights(7, 3, tree.number)[head]
            slow += weight * ours(alone, settings(centring=0.1, margin=True), [tree]) / len(trees) / 3
    assert ours(roles, chosen, trees, seed=7) == pytest.approx(slow, rel=1e-5)


def test_a_tree_weighs_the_same_in_any_batch_and_step() -> None:
    trees = rankings(4)
    apart = judge(3)
    for tree in trees:
        ours(apart, settings(heads=3), [tree])
    together = judge(3)
    ours(together, settings(heads=3), trees[::-1])
    gradient = together.heads[REWARD].linear.weight.grad
    assert torch.allclose(gradient * len(trees), apart.heads[REWARD].linear.weight.grad, atol=1e-5)


def test_weights_differ_by_seed_head_and_tree_and_are_1_on_average() -> None:
    drawn = np.array([[reward.bootstrap_weights(seed, 4, number) for number in range(300)] for seed in range(2)])
    assert len(np.unique(drawn)) == drawn.size
    assert drawn.mean() == pytest.approx(1, abs=0.1)
    assert drawn.std() == pytest.approx(1, abs=0.1)
    assert abs(np.corrcoef(drawn[0].T)[np.triu_indices(4, 1)]).max() < 0.2
    assert reward.bootstrap_weights(0, 4, 5) == drawn[0, 5].tolist()
    assert reward.bootstrap_weights(3, 1, 5) == [1.0]


def test_the_score_is_the_mean_of_the_heads_less_the_mean() -> None:
    head, states = ScalarHead(8, 5), torch.randn(6, 8)
    head.mean.fill_(0.7)
    rows = zip(head.linear.weight, head.linear.bias, strict=True)
    single = torch.stack([states @ row + bias - 0.7 for row, bias in rows], 1)
    assert torch.allclose(head.each(states), single, atol=1e-6)
    assert torch.allclose(head(states), single.mean(1), atol=1e-6)


def test_heads_start_apart() -> None:
    rows = ScalarHead(64, 6).linear.weight
    assert torch.corrcoef(rows).triu(1).abs().max() < 0.6
    assert len(torch.unique(rows)) == rows.numel()


def test_a_value_function_starts_as_the_mean_of_the_heads() -> None:
    roles, trees = judge(4), models.forest(6)
    models.disturb(roles, REWARD)
    roles.copy(REWARD, VALUE)
    assert roles.heads[VALUE].linear.weight.shape == (1, roles.base.hidden_size)
    found, expected = scores(roles, VALUE, trees), scores(roles, REWARD, trees)
    for tree in trees:
        assert found[tree.number] == pytest.approx(expected[tree.number], abs=1e-5)


def test_aligned_heads_agree_on_average_and_score_as_before() -> None:
    head, states = ScalarHead(8, 3), torch.randn(50, 8) + 2
    torch.nn.init.normal_(head.linear.weight)
    before = head(states)
    head.align(head.each(states).mean(0))
    means = head.each(states).mean(0)
    assert torch.allclose(means, means.mean().expand(3), atol=1e-5)
    assert torch.allclose(head(states), before, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
def test_after_centring_every_head_scores_the_reference_s_samples_zero_on_average(heads: int) -> None:
    roles, trees = judge(heads), models.pairs(12)
    before = roles.heads[REWARD].linear.bias.clone()
    options: dict[str, Any] = {"max_length": 64, "seed": 0, "tokens_per_batch": 500}
    measured = centring.centre(roles, trees, **options, layout="tree")
    assert abs(measured.value) > 1e-3
    samples = centring.reference_samples(roles, trees, **options)
    found = centring.scores_by_head(roles, samples, 500, "tree")
    assert np.mean([scored[0] for scored in found.values()], 0) == pytest.approx(np.zeros(heads), abs=1e-5)
    assert torch.equal(before, roles.heads[REWARD].linear.bias) == (heads == 1)


def test_centring_never_needs_more_positions_than_the_model_has() -> None:
    roles = models.roles(REWARD, kind="gpt2")
    roles.add_head(REWARD)
    roles.base.template.stop_id = -1  # every response is as long as it may be
    short, long = Branch.of(range(10, 20)), Branch.of(range(10, 110))
    trees = [Tree(tuple(range(10, 250)), (short, short)), Tree((10, 11), (long, short), 1)]
    options: dict[str, Any] = {"max_length": 1024, "seed": 0, "tokens_per_batch": 500}
    samples = centring.reference_samples(roles, trees, **options)
    assert sorted(tree.length for tree in samples) == [102, roles.base.longest(1024)]
    assert math.isfinite(centring.centre(roles, trees, **options, layout="plain").value)


def test_disagreement_is_the_standard_deviation_over_the_heads() -> None:
    ranking = Ranking(np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0], [-9.0, -9.0, -9.0]]))
    assert not ranking.wrong
    assert ranking.disagreement == pytest.approx((1 + math.sqrt(3) + 0) / 3)
    assert ranking.margin_disagreement == pytest.approx(np.std([1, 2, 0], ddof=1))


def test_a_tie_is_wrong() -> None:
    assert Ranking(np.array([[1.0, 2.0], [2.0, 1.0]])).wrong


def test_the_gap_says_whether_the_heads_differ_more_where_they_are_wrong() -> None:
    chance = np.random.default_rng(0)
    right = [Ranking(np.array([[5.0, 5.0, 5.0], [0.0, 0.0, 0.0]]) + chance.normal(0, 0.1, (2, 3))) for _ in range(60)]
    wrong = [Ranking(np.array([[0.0, 0.0, 0.0], [5.0, 5.0, 5.0]]) + chance.normal(0, 0.5, (2, 3))) for _ in range(40)]
    gap = disagreement.metrics([*right, *wrong])["disagreement_gap"]
    assert gap.value == pytest.approx(
        np.mean([each.margin_disagreement for each in wrong]) - np.mean([each.margin_disagreement for each in right])
    )
    assert 0 < gap.low < gap.value < gap.high
    assert gap.n == 100
    assert "disagreement_gap" not in disagreement.metrics(right)


@pytest.mark.slow
def test_the_gap_s_interval_holds_zero_in_19_of_20_cases_where_there_is_no_gap() -> None:
    chance = np.random.default_rng(1)
    held = 0
    for _ in range(60):
        first, second = chance.exponential(1, 40), chance.exponential(1, 60)
        found = disagreement._difference(first, second)
        held += found.low <= 0 <= found.high
    assert 52 <= held <= 59


def baton(*arguments: str | Path) -> int:
    return cli.execute(cli.app, list(map(str, arguments)))


@pytest.mark.chain
def test_an_ensemble_is_trained_stored_and_handed_to_ppo(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    foreign = tmp_path_factory.getbasetemp() / "foreign-qwen2"
    if not foreign.exists():
        tiny.save_model(foreign, "qwen2", ["Question 12? Answer 34. Why?"] * 3)
    shutil.copytree(foreign, tmp_path / "model")
    rows = [{"prompt": f"Question {each}?", "chosen": f"Answer {each}.", "rejected": "Why?"} for each in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(CONFIG.format(root=tmp_path))
    assert baton("run", tmp_path / "own.yaml") == 0
    stored = tmp_path / "run" / "stages" / "reward"
    tensors = load_file(stored / "head.safetensors")
    assert {name: tuple(each.shape) for name, each in tensors.items()} == {
        "linear.weight": (3, 64), "linear.bias": (3,), "mean": ()
    }  # fmt: skip
    metrics = manifests.load(stored).metrics
    assert metrics["disagreement"].value > 0
    assert metrics["disagreement"].n == metrics["pair_accuracy"].n
    assert "disagreement" not in manifests.load(tmp_path / "run" / "stages" / "ppo").metrics
