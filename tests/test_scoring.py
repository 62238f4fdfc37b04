"""Scores and log-probabilities of responses do not depend on their company."""

from __future__ import annotations

import math
import random

import models
import pytest
import torch

from data.packing import rounded_up
from data.tree import Branch, Tree
from pipeline.errors import DataError
from stages.core.device import Compute
from stages.core.layout import LAYOUTS
from stages.core.roles import REWARD, Roles
from stages.core.scoring import exponential, logprobs, loss_metrics, mean_logprobs, on_device, reward_scores, scores


@pytest.fixture(scope="module")
def judge() -> Roles:
    roles = models.roles(REWARD)
    roles.add_head(REWARD)
    models.disturb(roles, REWARD)
    return roles


@torch.no_grad()
def slow_score(roles: Roles, path: tuple[int, ...]) -> float:
    """The head on the last state of one sequence by itself."""
    with roles.use(REWARD):
        states = roles.base.model(torch.tensor([path]), output_hidden_states=True).hidden_states[-1]
        return roles.heads[REWARD](states[0, -1:]).item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 50, 300, 10_000])
def test_scores_do_not_depend_on_batch_mates_padding_or_layout(judge: Roles, layout: str, budget: int) -> None:
    trees = models.forest(12, seed=budget)
    found = scores(judge, REWARD, trees, budget, layout)
    for tree in trees:
        slow = [slow_score(judge, (*tree.prompt, *branch.tokens)) for branch in tree.branches]
        assert found[tree.number] == pytest.approx(slow, abs=1e-5)


def test_a_score_is_the_same_alone_and_in_any_order(judge: Roles) -> None:
    trees = models.responses(8)
    together = reward_scores(judge, REWARD, trees)
    shuffled = random.Random(0).sample(trees, len(trees))
    assert reward_scores(judge, REWARD, shuffled) == pytest.approx(
        [together[tree.number] for tree in shuffled], abs=1e-5
    )
    alone = [reward_scores(judge, REWARD, [tree])[0] for tree in trees]
    assert alone == pytest.approx(together, abs=1e-5)


def test_the_mean_shifts_every_score_alike(judge: Roles) -> None:
    trees = models.responses(4)
    before = reward_scores(judge, REWARD, trees)
    judge.heads[REWARD].mean += 0.5
    after = reward_scores(judge, REWARD, trees)
    judge.heads[REWARD].mean -= 0.5
    assert after == pytest.approx([score - 0.5 for score in before], abs=1e-6)


@torch.no_grad()
def slow_logprob(tree: Tree, branch: Branch) -> float:
    path = torch.tensor([[*tree.prompt, *branch.tokens]])
    logs = torch.log_softmax(models.model()(path).logits[0], -1)
    start = len(tree.prompt) - 1
    return sum(logs[start + place, token].item() for place, token in enumerate(branch.tokens) if branch.read[place])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_are_summed_over_the_read_tokens_of_each_branch(layout: str) -> None:
    trees = models.forest(5)
    found = logprobs(models.language_model(), trees, 60, layout)
    for tree in trees:
        assert found[tree.number] == pytest.approx([slow_logprob(tree, each) for each in tree.branches], abs=1e-4)


def test_the_held_out_loss_is_per_token_and_perplexity_its_exponential() -> None:
    language_model, trees = models.language_model(), models.responses(6)
    slow = -sum(slow_logprob(tree, tree.branches[0]) for tree in trees) / sum(tree.reads for tree in trees)
    found = loss_metrics(language_model, trees, 60, "tree")
    assert found["held_out_loss"].value == pytest.approx(slow, rel=1e-5)
    assert found["held_out_perplexity"].value == pytest.approx(math.exp(slow), rel=1e-5)
    assert found["held_out_perplexity"].low == pytest.approx(math.exp(found["held_out_loss"].low))
    assert loss_metrics(language_model, [], 60, "tree") == {}
    assert exponential(found["held_out_loss"]).n == 6


def test_mean_logprobs_are_per_read_token_in_order() -> None:
    trees = models.responses(5)[::-1]
    slow = [slow_logprob(tree, tree.branches[0]) / tree.reads for tree in trees]
    assert mean_logprobs(models.language_model(), trees) == pytest.approx(slow, abs=1e-5)


@pytest.mark.parametrize("compute", [models.CPU, models.HALF])
def test_rows_are_rounded_up_where_products_of_a_new_shape_are_slow(compute: Compute) -> None:
    language_model = models.language_model(compute=compute)
    (batch,) = on_device(language_model, models.forest(12), 8192, "packed")
    assert batch.packing is not None
    assert batch.packing.rounded == (compute is models.HALF)
    tokens = sum(tree.length for tree in batch.trees)
    assert batch.token_count == (rounded_up(tokens) if compute is models.HALF else tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sequence_beyond_the_models_positions_is_refused_with_its_row(layout: str) -> None:
    language_model = models.language_model()
    longest = language_model.model.config.max_position_embeddings
    tree = Tree((7,) * 6, (Branch.of((8,)), Branch.of((9,) * (longest - 6))), 0, origin="chats.jsonl:7")
    assert len(logprobs(language_model, [tree], layout=layout)[0]) == 2
    longer = Tree((7,) * 7, tree.branches, 0, origin="chats.jsonl:7")
    with pytest.raises(DataError, match=f"chats.jsonl:7: a sequence of {longest + 1} tokens, the model has {longest}"):
        logprobs(language_model, [longer], layout=layout)
