"""Which layout an architecture is given."""

from __future__ import annotations

import warnings
from typing import Any

import architectures
import models
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.batch import Layout, TreeBatch, batches, one_row, packed
from data.tree import Branch, Tree
from stages.core.device import Compute
from stages.core.forward import token_logprobs
from stages.core.layout import LAYOUTS, TOLERANCE, choose_layout
from stages.core.models import LanguageModel
from stages.pretrain import from_nothing

EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def computed(model: PreTrainedModel, dtype: torch.dtype | None = None) -> LanguageModel:
    """The model with the precision of its matrix products, by default that of its weights."""
    return LanguageModel(model, models.tokenizer(), Compute(torch.device("cpu"), dtype or model.dtype))


def logprobs(model: PreTrainedModel, batch: TreeBatch) -> Tensor:
    with torch.no_grad():
        return token_logprobs(model, batch)


@EACH_DTYPE
@pytest.mark.parametrize("kind", [*architectures.PACKED, "granite", "cohere"])
@pytest.mark.parametrize("branches", [1, 2])
def test_ordinary_models_compute_packed_rows(kind: str, branches: int, dtype: torch.dtype) -> None:
    trees = architectures.ragged(9, branches=(branches,))
    assert choose_layout(computed(architectures.model(kind, dtype)), trees) == ("packed", [])


@EACH_DTYPE
def test_capped_scores_need_the_mask(dtype: torch.dtype) -> None:
    """Whatever short examples show: a cap that is far away changes nothing in them."""
    model = architectures.model("gemma2", dtype)
    for layer in model.base_model.layers:
        layer.self_attn.attn_logit_softcapping = 1000.0
    assert choose_layout(computed(model), architectures.ragged(9)) == ("tree", [])


def test_a_model_without_a_replaceable_attention_is_given_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.model("grouped")
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    assert choose_layout(computed(model), architectures.ragged(9)) == ("tree", [])


def test_a_model_that_ignores_the_packing_is_given_the_mask() -> None:
    model = architectures.model("grouped")
    compute = model.base_model.forward

    def without_packing(*args: Any, packing: object = None, **options: Any) -> Any:
        model.config._attn_implementation = "sdpa"
        return compute(*args, **options)

    model.base_model.forward = without_packing
    assert choose_layout(computed(model), architectures.ragged(9, branches=(2,))) == ("tree", [])


@pytest.mark.parametrize("branches", [1, 2, 4])
def test_a_model_that_ignores_packing_and_masks_is_given_plain_rows(branches: int) -> None:
    model, trees = models.model(), [tree for tree in models.forest(40) if len(tree.branches) == branches]
    compute = model.base_model.forward

    def without_mask(input_ids: Tensor, attention_mask: Any = None, packing: Any = None, **options: Any) -> Any:
        model.config._attn_implementation = "sdpa"
        return compute(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)

    model.base_model.forward = without_mask
    with pytest.warns(UserWarning, match="using plain rows"):
        layout, found = choose_layout(computed(model), trees)
    assert layout == "plain"
    assert "LlamaForCausalLM" in found[0]


def test_a_model_that_computes_nan_on_trees_is_given_plain_rows() -> None:
    model = models.model()
    compute = model.base_model.forward

    def spoiled(*args: Any, attention_mask: Any = None, packing: Any = None, **options: Any) -> Any:
        options |= {} if packing is None else {"packing": packing}
        output = compute(*args, attention_mask=attention_mask, **options)
        if attention_mask is not None or packing is not None:
            output.last_hidden_state.fill_(torch.nan)
        return output

    model.base_model.forward = spoiled
    with pytest.warns(UserWarning, match=r"gap inf\); using plain rows"):
        assert choose_layout(computed(model), models.pairs(3))[0] == "plain"


def test_a_model_with_a_sliding_window_is_given_plain_rows_even_if_short_examples_fit_the_window() -> None:
    model = models.model("mistral")
    short = [Tree((7,), (Branch.of((8, 9)),), 0), Tree((5, 6), (Branch.of((7,)),), 1)]
    long = Tree(tuple(range(5, 45)), (Branch.of((50, 51)), Branch.of((60, 61, 62))), 2)
    with pytest.warns(UserWarning, match="8 tokens at most; using plain rows"):
        assert choose_layout(computed(model), [*short, long])[0] == "plain"
    (plain,) = batches([long], 1000, "plain")
    expected = logprobs(model, plain)
    for other in (one_row([long]), packed([long])):
        assert (logprobs(model, other) - expected).abs().max() > 0.01


@EACH_DTYPE
@pytest.mark.parametrize("kind", architectures.RECURRENT)
def test_layers_that_look_back_without_a_mask_are_given_plain_rows(kind: str, dtype: torch.dtype) -> None:
    with pytest.warns(UserWarning, match="has layers other than attention .*; using plain rows"):
        assert choose_layout(computed(architectures.model(kind, dtype)), architectures.ragged(9))[0] == "plain"


def test_a_model_that_says_it_is_stateful_is_given_plain_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.model("grouped")
    monkeypatch.setattr(type(model), "_is_stateful", True)
    with pytest.warns(UserWarning, match="carries a state from token to token"):
        assert choose_layout(computed(model), architectures.ragged(9))[0] == "plain"


@EACH_DTYPE
@pytest.mark.parametrize("shift", [2, -3])
def test_a_leak_between_neighbours_within_the_tolerance_of_layouts_is_found(shift: int, dtype: torch.dtype) -> None:
    """A little of the token before or behind, whoever's it is, is added to each token's state."""
    model = architectures.model("grouped", dtype)
    size = {torch.float32: 3e-5, torch.bfloat16: 0.05}[dtype]
    trees = [
        Tree(tuple(range(5, 12)), (Branch.of((60, 61, 70, 80)), Branch.of((90, 62, 71, 33))), 0),
        Tree(tuple(range(25, 32)), (Branch.of((61, 61, 70, 80)), Branch.of((89, 62, 71, 34))), 1),
    ]

    def mix(module: object, inputs: object, output: Tensor) -> Tensor:
        return output + size * output.roll(shift, dims=1)

    assert choose_layout(computed(model), trees) == ("packed", [])
    model.base_model.layers[0].register_forward_hook(mix)
    with pytest.warns(UserWarning, match=r"lets a tree change its neighbours \(by .*\); using plain rows"):
        assert choose_layout(computed(model), trees)[0] == "plain"


@EACH_DTYPE
def test_values_of_another_size_than_queries_are_packed(dtype: torch.dtype) -> None:
    assert choose_layout(computed(architectures.model("deepseek_v3", dtype)), architectures.ragged(9)) == ("packed", [])


def test_an_architecture_that_does_not_hand_the_packing_on_is_given_the_mask() -> None:
    assert choose_layout(computed(architectures.model("nemotron")), architectures.ragged(9)) == ("tree", [])


def test_an_architecture_that_takes_no_mask_of_trees_is_given_plain_rows() -> None:
    with pytest.warns(UserWarning, match=r"BloomForCausalLM cannot compute trees \(.*\); using plain rows"):
        assert choose_layout(computed(architectures.model("bloom")), architectures.ragged(9))[0] == "plain"


def test_too_little_memory_is_no_reason_for_another_layout() -> None:
    model = architectures.model("grouped")
    compute = model.base_model.forward

    def full(*args: Any, packing: Any = None, **options: Any) -> Any:
        if packing is not None:
            raise torch.OutOfMemoryError("no memory left")
        return compute(*args, **options)

    model.base_model.forward = full
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        choose_layout(computed(model), architectures.ragged(9))


def test_layouts_are_compared_in_the_precision_of_training() -> None:
    model, found = architectures.model("grouped"), set()
    model.base_model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: found.add(output.dtype))
    assert choose_layout(computed(model, torch.bfloat16), architectures.ragged(9)) == ("packed", [])
    assert found == {torch.bfloat16}


def test_layouts_are_compared_without_dropout_and_the_mode_is_restored() -> None:
    model = architectures.model("grouped")
    for layer in model.base_model.layers:
        layer.self_attn.attention_dropout = 0.3
    model.train()
    model.base_model.layers[1].eval()
    before = [module.training for module in model.modules()]
    assert choose_layout(computed(model), architectures.ragged(9)) == ("packed", [])
    assert [module.training for module in model.modules()] == before


def test_a_model_with_dropout_can_be_made_from_nothing() -> None:
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.5}
    made = from_nothing({"model_type": "gpt2", **shape}, models.tokenizer(), models.CPU, 32)
    made.model.train()
    assert made.model.config.attn_pdrop > 0
    assert choose_layout(made, architectures.ragged(9)) == ("packed", [])


def test_no_trees_need_no_choice() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_layout(computed(models.model()), []) == ("packed", [])


def test_bfloat16_layouts_differ_by_rounding_only() -> None:
    model, trees = models.model(dtype=torch.bfloat16), models.forest(8)

    def by_tree(layout: Layout) -> list[Tensor]:
        (batch,) = batches(trees, 10_000, layout)
        parts = logprobs(model, batch).split([tree.reads for tree in batch.trees])
        return [part for _, part in sorted(zip([tree.number for tree in batch.trees], parts, strict=True))]

    plain = torch.cat(by_tree("plain"))
    for layout in LAYOUTS:
        assert (torch.cat(by_tree(layout)) - plain).abs().max() < TOLERANCE[torch.bfloat16]
