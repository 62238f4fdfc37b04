"""The forward in every layout against one sequence at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import architectures
import models
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.batch import Layout, TreeBatch, batches, packed
from data.tree import Branch, Tree
from stages.core import attention
from stages.core.forward import hidden_states, summed_token_logprobs, token_logprobs
from stages.core.layout import LAYOUTS

Values = dict[tuple[int, int], Tensor]
ROUNDING = 0.15
"""Nats a token that bfloat16 moves in models of two layers, at most."""
each_packed = pytest.mark.parametrize("kind", architectures.PACKED)


def one_at_a_time(model: PreTrainedModel, trees: Iterable[Tree], temperature: float = 1.0) -> Values:
    """Each path through the whole model by itself, with the whole vocabulary's log-softmax."""
    found: Values = {}
    for tree in trees:
        for index, branch in enumerate(tree.branches):
            path = torch.tensor([[*tree.prompt, *branch.tokens]])
            logs = torch.log_softmax(model(path, use_cache=False).logits[0].double() / temperature, -1)
            start = len(tree.prompt)
            values = [
                logs[start + place - 1, token]
                for place, (token, read) in enumerate(zip(branch.tokens, branch.read, strict=True))
                if read
            ]
            found[tree.number, index] = torch.stack(values).float()
    return found


def by_branch(batch: TreeBatch, values: Tensor) -> Values:
    keys = [(tree.number, index) for tree in batch.trees for index in range(len(tree.branches))]
    assert len(keys) == batch.branches
    return {key: values[batch.branch_of_read == branch] for branch, key in enumerate(keys)}


def in_batches(model: PreTrainedModel, trees: list[Tree], budget: int, layout: Layout) -> Values:
    found: Values = {}
    for batch in batches(trees, budget, layout):
        assert layout == "tree" or batch.mask is None
        assert (layout == "packed") == (batch.packing is not None)
        some = by_branch(batch, token_logprobs(model, batch))
        assert not found.keys() & some.keys()
        found |= some
    return found


def largest_gap(found: Values, expected: Values) -> float:
    assert found.keys() == expected.keys()
    return max((found[key] - expected[key]).abs().max().item() for key in expected)


def gradients(model: PreTrainedModel, values: Values) -> dict[str, Tensor]:
    """Of an uneven weighting of all tokens, by every weight's name."""
    model.zero_grad()
    ordered = torch.cat([values[key] for key in sorted(values)])
    (ordered * torch.linspace(-1.0, 2.0, len(ordered))).sum().backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def root_mean_square(found: Values, exact: Values) -> float:
    return torch.cat([found[key] - exact[key] for key in exact]).square().mean().sqrt().item()


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 60, 4096])
@torch.no_grad()
def test_every_layout_and_budget_gives_the_logprobs_of_one_sequence_at_a_time(
    kind: str, layout: Layout, budget: int
) -> None:
    model, trees = models.model(kind), models.forest(8, seed=budget)
    expected = one_at_a_time(model, trees)
    assert largest_gap(in_batches(model, trees, budget, layout), expected) < 1e-5


@each_packed
@pytest.mark.parametrize(("count", "branches"), [(1, (1,)), (1, (4,)), (6, (1,)), (9, (1, 2, 3, 4))])
def test_a_packed_row_has_values_and_gradients_of_each_branch_behind_its_prompt(
    kind: str, count: int, branches: tuple[int, ...]
) -> None:
    model, trees = architectures.model(kind), architectures.ragged(count, seed=count, branches=branches)
    alone = one_at_a_time(model, trees)
    exact = gradients(model, alone)
    found = in_batches(model, trees, 100_000, "packed")
    assert largest_gap(found, alone) < 1e-5
    mine = gradients(model, found)
    assert mine.keys() == exact.keys() == dict(model.named_parameters()).keys()
    for name, gradient in exact.items():
        # The gradient of an attention's key bias is zero but for rounding.
        assert (mine[name] - gradient).norm() < 1e-5 * max(gradient.norm(), 10.0), name


def test_prompts_and_branches_of_one_token_are_packed() -> None:
    trees = [
        Tree((7,), (Branch.of((8,)),), 0),
        Tree((9,), (Branch.of((10,)), Branch.of((11,))), 1),
        Tree((12,), (Branch.of(tuple(range(13, 80))),), 2),
        Tree(tuple(range(20, 90)), (Branch.of((5,)), Branch.of((6,))), 3),
    ]
    model = architectures.model("grouped")
    assert largest_gap(in_batches(model, trees, 100_000, "packed"), one_at_a_time(model, trees)) < 1e-5


@each_packed
def test_bfloat16_is_as_exact_packed_as_in_plain_rows(kind: str) -> None:
    model, trees = architectures.model(kind, torch.bfloat16), architectures.ragged(9, seed=1)
    exact_model = cast(PreTrainedModel, architectures.model(kind).to(torch.float32))
    exact_model.load_state_dict(model.state_dict())
    exact = one_at_a_time(exact_model, trees)
    plain, row = (in_batches(model, trees, 100_000, layout) for layout in ("plain", "packed"))
    assert root_mean_square(row, exact) < 1.5 * root_mean_square(plain, exact)
    truth = gradients(exact_model, exact)
    its, mine = gradients(model, plain), gradients(model, row)
    for name, gradient in truth.items():
        assert mine[name].dtype == torch.bfloat16
        scale = max(gradient.norm(), 10.0)
        assert (mine[name] - gradient).norm() < 2.0 * (its[name] - gradient).norm() + 0.01 * scale, name


@each_packed
def test_products_and_fused_attention_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, trees = architectures.model(kind, torch.bfloat16), architectures.ragged(9, seed=2)
    products = in_batches(model, trees, 100_000, "packed")
    of_products = gradients(model, products)
    monkeypatch.setattr(attention, "PRODUCTS_WIDTH", 0)
    fused = in_batches(model, trees, 100_000, "packed")
    assert not all(torch.equal(products[key], fused[key]) for key in fused)
    assert largest_gap(products, fused) < ROUNDING
    for name, gradient in gradients(model, fused).items():
        assert (of_products[name] - gradient).norm() < 0.05 * max(gradient.norm(), 10.0), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", [0, 4])
@torch.no_grad()
def test_a_tree_changes_nothing_for_the_others(changed: int, dtype: torch.dtype) -> None:
    model, trees = architectures.model("grouped", dtype), architectures.ragged(9, seed=3)
    tree = trees[changed]
    other = replace(
        tree,
        prompt=tuple(token + 1 for token in tree.prompt[::-1]),
        branches=tuple(Branch.of(tuple(token - 1 for token in branch.tokens[::-1])) for branch in tree.branches),
    )
    before, after = (
        by_branch(batch, token_logprobs(model, batch))
        for batch in (packed(trees), packed([*trees[:changed], other, *trees[changed + 1 :]]))
    )
    for key, values in before.items():
        assert torch.equal(after[key], values) == (key[0] != changed)


@pytest.mark.parametrize("changed", [0, 4])
def test_a_nan_spoils_its_own_tree_only(changed: int) -> None:
    model, trees = architectures.model("grouped"), architectures.ragged(9, seed=4)
    trees[changed] = replace(trees[changed], prompt=(1, *trees[changed].prompt))
    with torch.no_grad():
        model.get_input_embeddings().weight[1] = torch.nan
    batch = packed(trees)
    for key, values in by_branch(batch, token_logprobs(model, batch)).items():
        assert values.isfinite().all() == (key[0] != changed)


def test_the_models_attention_is_back_after_a_forward_that_raised() -> None:
    model, batch = architectures.model("grouped"), packed(architectures.ragged(2))
    hook = model.base_model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden_states(model, batch)
    assert model.config._attn_implementation == "sdpa"
    hook.remove()
    assert hidden_states(model, batch).isfinite().all()


@each_packed
@torch.no_grad()
def test_a_rollout_is_the_same_before_and_after_a_packed_forward(kind: str) -> None:
    model, prompt = architectures.model(kind), torch.arange(5, 15)[None]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    before = model.generate(prompt, **options)
    token_logprobs(model, packed(architectures.ragged(5)))
    assert torch.equal(model.generate(prompt, **options), before)
    tree = Tree(tuple(before[0, :10].tolist()), (Branch.of(tuple(before[0, 10:].tolist())),))
    assert largest_gap(in_batches(model, [tree], 100, "packed"), one_at_a_time(model, [tree])) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_attention_dropout_acts_on_packed_rows_in_training_only(dtype: torch.dtype) -> None:
    model, batch = architectures.model("grouped", dtype), packed(architectures.ragged(5))
    for layer in model.base_model.layers:
        layer.self_attn.attention_dropout = 0.3
    exact = token_logprobs(model, batch)
    assert torch.equal(token_logprobs(model, batch), exact)
    model.train()
    assert (token_logprobs(model, batch) - exact).abs().max() > ROUNDING


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_values_of_another_size_than_queries_are_computed(layout: Layout) -> None:
    model, trees = architectures.model("deepseek_v3"), architectures.ragged(9, seed=5)
    assert largest_gap(in_batches(model, trees, 400, layout), one_at_a_time(model, trees)) < 1e-5


@torch.no_grad()
def test_capped_scores_are_computed_with_a_mask() -> None:
    model, trees = architectures.model("gemma2"), architectures.ragged(9, seed=5)
    assert largest_gap(in_batches(model, trees, 400, "tree"), one_at_a_time(model, trees)) < 1e-5


@pytest.mark.parametrize("kind", ["grouped", "qwen2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sum_has_the_value_and_gradients_of_the_parts(kind: str, layout: Layout) -> None:
    model, trees = architectures.model(kind), architectures.ragged(5)
    (batch,) = batches(trees, 100_000, layout)
    found = []
    for compute in (lambda: token_logprobs(model, batch).sum(), lambda: summed_token_logprobs(model, batch)):
        model.zero_grad()
        total = compute()
        total.backward()
        found.append([total.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for mine, exact in zip(*found, strict=True):
        assert (mine - exact).norm() < 1e-5 * max(exact.norm(), 10.0)


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
@torch.no_grad()
def test_any_number_of_branches_gives_the_same_logprobs_as_plain_rows(branches: int) -> None:
    model = models.model("llama")
    trees = [tree for tree in models.forest(60, seed=branches) if len(tree.branches) == branches]
    plain = in_batches(model, trees, 500, "plain")
    for layout in ("tree", "packed"):
        assert largest_gap(in_batches(model, trees, 500, cast(Layout, layout)), plain) < 1e-5


@pytest.mark.parametrize("kind", models.KINDS)
@torch.no_grad()
def test_several_trees_in_a_row_do_not_see_each_other(kind: str) -> None:
    model = models.model(kind)
    long, *short = sorted(models.forest(8, seed=3, longest=8), key=lambda tree: -tree.length)
    wide = Tree(long.prompt * 20, long.branches, long.number)
    (batch,) = batches([wide, *short], 10_000, "tree")
    assert len(batch.tokens) < len(batch.trees)
    found = in_batches(model, [wide, *short], 10_000, "tree")
    assert largest_gap(found, one_at_a_time(model, [wide, *short])) < 1e-5


@torch.no_grad()
def test_temperature_divides_the_logits() -> None:
    model, trees = models.model(), models.responses(3)
    (batch,) = batches(trees, 1000)
    expected = one_at_a_time(model, batch.trees, temperature=0.7)
    found = token_logprobs(model, batch, 0.7)
    assert torch.allclose(found, torch.cat([expected[tree.number, 0] for tree in batch.trees]), atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_head_runs_on_read_positions_only(layout: Layout) -> None:
    model, sizes = models.model(), []
    cast(nn.Module, model.lm_head).register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    (batch,) = batches(models.forest(4), 1000, layout)
    token_logprobs(model, batch)
    assert sizes == [len(batch.targets)]


@pytest.mark.parametrize("layout", ["tree", "packed"])
@torch.no_grad()
def test_the_order_of_trees_does_not_matter(layout: Layout) -> None:
    model, trees = models.model(), models.forest(5)
    expected = one_at_a_time(model, trees)
    for order in itertools.islice(itertools.permutations(trees), 0, 120, 40):
        assert largest_gap(in_batches(model, list(order), 80, layout), expected) < 1e-5


@pytest.mark.parametrize("kind", ["grouped", "qwen3"])
def test_a_row_that_is_rounded_up_has_the_same_loss_and_gradients(kind: str) -> None:
    trees = architectures.ragged(9, seed=2)
    found = []
    for width in (None, 2 * sum(tree.length for tree in trees)):
        model, batch = architectures.model(kind), packed(trees, width)
        values = token_logprobs(model, batch)
        (values * torch.linspace(-1.0, 2.0, len(values))).sum().backward()
        found.append([values.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain, rounded in zip(*found, strict=True):
        assert torch.allclose(plain, rounded, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
