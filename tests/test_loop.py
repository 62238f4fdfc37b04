"""The training loop: steps are the same however their examples are cut into batches."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import models
import pytest
import torch
from torch import Tensor, nn

from data.mixture import stream
from data.tree import Tree
from pipeline.config import DpoSettings, Optimizer, RewardSettings, Training
from stages import dpo, reward
from stages.core import loop, optim
from stages.core.layout import LAYOUTS
from stages.core.loop import Part, Updater, total_steps, train
from stages.core.roles import POLICY, REWARD, Roles
from stages.core.scoring import negative_mean

Gradients = dict[str, Tensor]
PLAIN_DESCENT = Optimizer(learning_rate=1.0, warmup=0.0, schedule="constant", clip_norm=1e9)


def one_step(parameters: list[tuple[str, nn.Parameter]], objective: loop.Objective, trees: list[Tree]) -> Gradients:
    """The gradient of one step, read off what plain descent at rate 1 does to the weights."""
    before = {name: each.detach().clone() for name, each in parameters}
    record = Updater(parameters, PLAIN_DESCENT, 1).step(objective(trees))
    found = {name: before[name] - each.detach() for name, each in parameters}
    return {**found, "record": torch.tensor([record["loss"], record["gradient_norm"]])}


@pytest.fixture
def plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(named: list[tuple[str, nn.Parameter]], settings: Optimizer) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([each for _, each in named], lr=settings.learning_rate)]

    monkeypatch.setattr(optim, "build", build)


def sft(budget: int, layout: str) -> Gradients:
    roles = prepared(POLICY)
    with roles.use(POLICY):
        return one_step(roles.parameters(POLICY), negative_mean(roles.base, budget, layout), models.forest(8, 1))


def dpo_step(budget: int, layout: str) -> Gradients:
    roles = prepared(POLICY)
    settings = DpoSettings(policy="p", data="d", beta=0.2, sft_weight=0.1, tokens_per_batch=budget)
    return one_step(roles.parameters(POLICY), dpo.objective(roles, settings, layout), models.pairs(8))


def reward_step(budget: int, layout: str) -> Gradients:
    roles = prepared(REWARD)
    settings = RewardSettings(policy="p", data="d", centring=0.01, tokens_per_batch=budget)
    rankings = [*models.pairs(5), *(tree for tree in models.forest(30, seed=4) if len(tree.branches) > 2)][:8]
    trees = [Tree(tree.prompt, tree.branches, number) for number, tree in enumerate(rankings)]
    with roles.use(REWARD):
        return one_step(roles.parameters(REWARD), reward._objective(roles, settings, layout), trees)


def prepared(role: str) -> Roles:
    roles = models.roles(role)
    if role == REWARD:
        torch.manual_seed(0)
        roles.add_head(role)
        roles._freeze_the_rest()
    models.disturb(roles, role)
    return roles


STEPS = {"sft": sft, "dpo": dpo_step, "reward": reward_step}


@pytest.mark.usefixtures("plain_descent")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STEPS)
def test_eight_batches_of_one_example_give_the_gradient_of_one_batch_of_eight(name: str, layout: str) -> None:
    whole = STEPS[name](100_000, "plain")
    for budget in (1, 70):
        parts = STEPS[name](budget, layout)
        assert parts.keys() == whole.keys()
        gap = max((parts[key] - whole[key]).abs().max().item() for key in whole)
        size = max(each.abs().max().item() for each in whole.values())
        assert gap < 1e-6 * max(1.0, size)


@pytest.mark.usefixtures("plain_descent")
@pytest.mark.parametrize("name", STEPS)
def test_the_gradient_is_not_zero(name: str) -> None:
    assert all(each.abs().max() > 1e-5 for each in STEPS[name](1000, "tree").values())


@pytest.mark.usefixtures("plain_descent")
def test_the_sft_loss_is_the_mean_over_all_tokens_not_over_batches() -> None:
    language_model = models.language_model()
    trees = models.forest(6, 1)
    total, reads = 0.0, 0
    for tree in trees:
        path = torch.tensor([[*tree.prompt, *tree.branches[0].tokens]])
        logs = torch.log_softmax(language_model.model(path).logits[0], -1)
        for place, token in enumerate(tree.branches[0].tokens):
            if tree.branches[0].read[place]:
                total -= logs[len(tree.prompt) + place - 1, token].item()
                reads += 1
    losses = [part.loss.item() for part in negative_mean(language_model, 40, "tree")(trees)]
    assert len(losses) > 1
    assert sum(losses) == pytest.approx(total / reads, rel=1e-5)


def test_shares_and_tokens_of_parts_add_up() -> None:
    weight = nn.Parameter(torch.ones(2))
    updater = Updater([("weight", weight)], Optimizer(), 5)
    record = updater.step([Part(weight.sum() * each, {"accuracy": 0.1 * each}, 10) for each in (1, 2, 3)])
    assert record["loss"] == pytest.approx(12)
    assert record["accuracy"] == pytest.approx(0.6)
    assert record["tokens"] == 30
    assert record["gradient_norm"] == pytest.approx(6 * math.sqrt(2))


@pytest.mark.usefixtures("plain_descent")
def test_a_large_gradient_is_scaled_down_to_the_clip_norm() -> None:
    weight = nn.Parameter(torch.zeros(4))
    settings = PLAIN_DESCENT.model_copy(update={"clip_norm": 0.5})
    record = Updater([("weight", weight)], settings, 1).step([Part(weight.sum() * 100)])
    assert record["gradient_norm"] == pytest.approx(200)
    assert weight.detach().norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.usefixtures("plain_descent")
def test_one_steps_gradient_does_not_leak_into_the_next() -> None:
    weight = nn.Parameter(torch.zeros(1))
    updater = Updater([("weight", weight)], PLAIN_DESCENT, 3)
    for _ in range(3):
        updater.step([Part(weight.sum())])
    assert weight.item() == pytest.approx(-3)


def test_frozen_weights_are_left_alone() -> None:
    weight, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
    updater = Updater([("weight", weight), ("frozen", frozen)], Optimizer(weight_decay=0.5), 2)
    updater.step([Part((weight * frozen).sum())])
    assert torch.equal(frozen, torch.ones(3))
    assert not torch.equal(weight, torch.ones(3))


def test_learning_lowers_the_loss() -> None:
    roles = prepared(POLICY)
    trees = models.forest(8, 1)
    settings = Training(steps=12, examples_per_step=8, optimizer=Optimizer(learning_rate=0.02))
    with roles.use(POLICY):
        objective = negative_mean(roles.base, 4000, "tree")
        updater = Updater(roles.parameters(POLICY), settings.optimizer, 12)
        losses = [each["loss"] for each in train(trees, objective, updater, settings, 0)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("examples", "epochs", "size", "expected"), [
    (10, 1.0, 5, 2), (10, 1.0, 4, 3), (10, 2.5, 5, 5), (3, 0.1, 8, 1), (7, 3.0, 100, 1),
])  # fmt: skip
def test_steps_cover_the_epochs_exactly(examples: int, epochs: float, size: int, expected: int) -> None:
    trees = models.forest(examples)
    settings = Training(epochs=epochs, examples_per_step=size)
    assert total_steps(examples, settings) == expected
    chosen = list(loop._steps(trees, settings, expected, 0))
    assert len(chosen) == expected
    assert sum(map(len, chosen)) == max(1, round(examples * epochs))
    counts = Counter(tree.number for step in chosen for tree in step)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_number_of_steps_overrules_the_epochs_and_starts_the_rows_over() -> None:
    settings = Training(steps=7, examples_per_step=3, epochs=1.0)
    chosen = list(loop._steps(models.forest(4), settings, total_steps(4, settings), 0))
    assert [len(step) for step in chosen] == [3] * 7


def test_every_pass_holds_every_item_once_in_an_order_of_its_own() -> None:
    taken = stream(range(20), 3)
    passes = [list(itertools.islice(taken, 20)) for _ in range(4)]
    assert all(sorted(each) == list(range(20)) for each in passes)
    assert len(set(map(tuple, passes))) == 4


def test_the_order_depends_on_the_seed_alone() -> None:
    first, again, other = (list(itertools.islice(stream(range(20), seed), 30)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
