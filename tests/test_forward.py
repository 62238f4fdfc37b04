"""The tree forward against plain rows and against one sequence at a time."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.batch import Layout, batches
from data.tree import Branch, Tree
from stages.core import forward
from stages.core.forward import hidden_states, token_logprobs
from stages.core.layout import LAYOUTS, choose_layout
from stages.core.likelihood import entropies, logprobs_of

Values = dict[tuple[int, int], Tensor]


def one_at_a_time(model: PreTrainedModel, trees: Iterable[Tree], temperature: float = 1.0) -> Values:
    """Each path through the whole model by itself, with the whole vocabulary's log-softmax."""
    found: Values = {}
    for tree in trees:
        for index, branch in enumerate(tree.branches):
            path = torch.tensor([[*tree.prompt, *branch.tokens]])
            logs = torch.log_softmax(model(path).logits[0].double() / temperature, -1)
            start = len(tree.prompt)
            values = [
                logs[start + place - 1, token]
                for place, (token, read) in enumerate(zip(branch.tokens, branch.read, strict=True))
                if read
            ]
            found[tree.number, index] = torch.stack(values).float()
    return found


def in_batches(model: PreTrainedModel, trees: list[Tree], budget: int, layout: Layout) -> Values:
    found: Values = {}
    for batch in batches(trees, budget, layout):
        assert layout == "tree" or batch.mask is None
        values = token_logprobs(model, batch)
        keys = [(tree.number, index) for tree in batch.trees for index in range(len(tree.branches))]
        assert len(keys) == batch.branches
        assert not found.keys() & set(keys)
        for branch, key in enumerate(keys):
            found[key] = values[batch.branch_of_read == branch]
    return found


def largest_gap(found: Values, expected: Values) -> float:
    assert found.keys() == expected.keys()
    return max((found[key] - expected[key]).abs().max().item() for key in expected)


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("layout", forward.LAYOUTS)
@pytest.mark.parametrize("budget", [1, 60, 200, 4096])
@torch.no_grad()
def test_every_layout_and_budget_gives_the_logprobs_of_one_sequence_at_a_time(
    kind: str, layout: Layout, budget: int
) -> None:
    model, trees = models.model(kind), models.forest(14, seed=budget)
    expected = one_at_a_time(model, trees)
    assert largest_gap(in_batches(model, trees, budget, layout), expected) < 1e-5


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
@torch.no_grad()
def test_any_number_of_branches_gives_the_same_logprobs_as_plain_rows(branches: int) -> None:
    model = models.model("llama")
    trees = [tree for tree in models.forest(60, seed=branches) if len(tree.branches) == branches]
    plain = in_batches(model, trees, 500, "plain")
    assert largest_gap(in_batches(model, trees, 500, "tree"), plain) < 1e-5


@pytest.mark.parametrize("kind", models.KINDS)
@torch.no_grad()
def test_several_trees_in_a_row_do_not_see_each_other(kind: str) -> None:
    model = models.model(kind)
    long, *short = sorted(models.forest(8, seed=3, longest=8), key=lambda tree: -tree.length)
    wide = Tree(long.prompt * 20, long.branches, long.number)
    (batch,) = batches([wide, *short], 10_000)
    rows = len(batch.tokens)
    assert rows < len(batch.trees)
    found = in_batches(model, [wide, *short], 10_000, "tree")
    assert largest_gap(found, one_at_a_time(model, [wide, *short])) < 1e-5


@torch.no_grad()
def test_temperature_divides_the_logits() -> None:
    model, trees = models.model(), models.responses(3)
    (batch,) = batches(trees, 1000)
    expected = one_at_a_time(model, batch.trees, temperature=0.7)
    found = token_logprobs(model, batch, 0.7)
    assert torch.allclose(found, torch.cat([expected[tree.number, 0] for tree in batch.trees]), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 900, 2000])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_chunked_head_has_the_same_values_and_gradients(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch,) = batches(models.forest(4), 1000)

    def values_and_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model = models.model(kind).requires_grad_(True)
        values = token_logprobs(model, batch, 0.9)
        (values * torch.arange(len(values))).sum().backward()
        return values.detach(), {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    whole, gradients = values_and_gradients()
    monkeypatch.setattr(forward, "CHUNK_LOGITS", chunk)
    chunked, parts = values_and_gradients()
    assert torch.allclose(chunked, whole, atol=1e-6)
    assert parts.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(parts[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item()), name


def test_the_whole_matrix_of_logits_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = models.model().requires_grad_(True), []
    monkeypatch.setattr(forward, "CHUNK_LOGITS", 4 * len(models.tokenizer()))
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    (batch,) = batches(models.forest(4), 1000)
    token_logprobs(model, batch).sum().backward()
    assert sum(sizes) >= 2 * len(batch.targets)
    assert max(sizes) <= 4


@torch.no_grad()
def test_the_head_runs_on_read_positions_only() -> None:
    model, sizes = models.model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    (batch,) = batches(models.forest(4), 1000)
    token_logprobs(model, batch)
    assert sizes == [len(batch.targets)]


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 25])
@torch.no_grad()
def test_entropy_is_minus_the_expected_logprob(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "CHUNK_LOGITS", chunk)
    model = models.model()
    (batch,) = batches(models.responses(3), 1000)
    states = hidden_states(model, batch)[batch.sources]
    everything = torch.arange(len(models.tokenizer()))
    slow = []
    for state in states:
        logs = logprobs_of(model, state.expand(len(everything), -1), everything, 0.7)
        slow.append(-(logs.exp() * logs).sum())
    assert torch.allclose(entropies(model, states, 0.7), torch.stack(slow), atol=1e-5)


@torch.no_grad()
def test_no_read_token_gives_no_entropy() -> None:
    assert entropies(models.model(), torch.zeros(0, 32)).shape == (0,)


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("branches", [1, 2])
def test_ordinary_models_compute_trees(kind: str, branches: int) -> None:
    trees = [tree for tree in models.forest(20) if len(tree.branches) == branches]
    assert choose_layout(models.model(kind), trees) == ("tree", [])


@pytest.mark.parametrize("branches", [1, 2, 4])
def test_a_model_that_ignores_masks_is_given_plain_rows(branches: int) -> None:
    model, trees = models.model(), [tree for tree in models.forest(40) if len(tree.branches) == branches]
    compute = model.base_model.forward

    def without_mask(input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return compute(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **kwargs)

    model.base_model.forward = without_mask
    with pytest.warns(UserWarning, match="using plain rows"):
        layout, found = choose_layout(model, trees)
    assert layout == "plain"
    assert "LlamaForCausalLM" in found[0]


def test_a_model_that_computes_nan_on_trees_is_given_plain_rows() -> None:
    model = models.model()
    compute = model.base_model.forward

    def spoiled(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        output = compute(*args, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None:
            output.last_hidden_state.fill_(torch.nan)
        return output

    model.base_model.forward = spoiled
    with pytest.warns(UserWarning, match="using plain rows"):
        assert choose_layout(model, models.pairs(3))[0] == "plain"


@torch.no_grad()
def test_a_model_with_a_sliding_window_is_given_plain_rows_even_if_short_examples_fit_the_window() -> None:
    model = models.model("mistral")
    short = [Tree((7,), (Branch.of((8, 9)),), 0), Tree((5, 6), (Branch.of((7,)),), 1)]
    long = Tree(tuple(range(5, 45)), (Branch.of((50, 51)), Branch.of((60, 61, 62))), 2)
    with pytest.warns(UserWarning, match="8 tokens at most; using plain rows"):
        assert choose_layout(model, [*short, long])[0] == "plain"
    expected = one_at_a_time(model, [long])
    assert largest_gap(in_batches(model, [long], 500, "tree"), expected) > 0.01
    assert largest_gap(in_batches(model, [long], 500, "plain"), expected) < 1e-5


def test_no_trees_need_no_choice() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_layout(models.model(), []) == ("tree", [])


@torch.no_grad()
def test_bfloat16_layouts_differ_by_rounding_only() -> None:
    model, trees = models.model(dtype=torch.bfloat16), models.forest(8)
    plain, tree = (in_batches(model, trees, 500, layout) for layout in forward.LAYOUTS)
    assert largest_gap(tree, plain) < forward.LAYOUT_TOLERANCE[torch.bfloat16]


@torch.no_grad()
def test_the_order_of_trees_does_not_matter() -> None:
    model, trees = models.model(), models.forest(5)
    expected = one_at_a_time(model, trees)
    for order in itertools.islice(itertools.permutations(trees), 0, 120, 40):
        assert largest_gap(in_batches(model, list(order), 80, "tree"), expected) < 1e-5
