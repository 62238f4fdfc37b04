"""Which layout an architecture is given."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import architectures
import models
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench import families
from bench.tolerances import faults
from data.batch import Layout, TreeBatch, batches, one_row, packed
from data.tree import Branch, Tree
from stages.core import attention
from stages.core import layout as choosing
from stages.core.device import Compute
from stages.core.float32 import in_float32
from stages.core.forward import token_logprobs
from stages.core.layout import LAYOUTS, choose_layout
from stages.core.models import LanguageModel
from stages.pretrain import from_nothing

EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def computed(model: PreTrainedModel, dtype: torch.dtype | None = None) -> LanguageModel:
    """The model with the precision of its matrix products, by default that of its weights."""
    return LanguageModel(model, models.tokenizer(), Compute(torch.device("cpu"), dtype or model.dtype))


def chosen(language_model: LanguageModel, trees: Sequence[Tree]) -> tuple[Layout, list[str]]:
    """The layout and its warnings, which are all that is said."""
    said: list[str] = []
    layout, warnings = choose_layout(language_model, trees, said.append)
    assert said == [f"warning: {warning}" for warning in warnings]
    assert (layout == "plain") == bool(warnings)
    return layout, warnings


def plain_rows(language_model: LanguageModel, trees: Sequence[Tree]) -> str:
    """The reason why trees are laid out in plain rows."""
    layout, (warning,) = chosen(language_model, trees)
    assert layout == "plain"
    return warning


def logprobs(model: PreTrainedModel, batch: TreeBatch) -> Tensor:
    with torch.no_grad():
        return token_logprobs(model, batch)


@EACH_DTYPE
@pytest.mark.parametrize("kind", [*architectures.PACKED, "granite", "cohere"])
@pytest.mark.parametrize("branches", [1, 2])
def test_ordinary_models_compute_packed_rows(kind: str, branches: int, dtype: torch.dtype) -> None:
    trees = architectures.ragged(9, branches=(branches,))
    assert chosen(computed(architectures.model(kind, dtype)), trees) == ("packed", [])


@EACH_DTYPE
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_given_its_layout(family: str, dtype: torch.dtype) -> None:
    expected = families.LAYOUTS[family]
    assert chosen(families.tiny(family, dtype), architectures.ragged(9, branches=(2,)))[0] == expected


@EACH_DTYPE
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_planted_fault_is_found_in_every_family(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "packed", lambda trees: faults.shifted(packed(trees)))
    monkeypatch.setattr(choosing, "one_row", lambda trees: faults.shifted(one_row(trees)))
    assert chosen(families.tiny(family, dtype), PAIRS)[0] == "plain"


@EACH_DTYPE
def test_capped_scores_need_the_mask(dtype: torch.dtype) -> None:
    """Whatever short examples show: a cap that is far away changes nothing in them."""
    model = architectures.model("gemma2", dtype)
    for layer in model.base_model.layers:
        layer.self_attn.attn_logit_softcapping = 1000.0
    assert chosen(computed(model), architectures.ragged(9)) == ("tree", [])


def test_a_model_without_a_replaceable_attention_is_given_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.model("grouped")
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    assert chosen(computed(model), architectures.ragged(9)) == ("tree", [])


def test_a_model_that_ignores_the_packing_is_given_the_mask() -> None:
    model = architectures.model("grouped")
    compute = model.base_model.forward

    def without_packing(*args: Any, packing: object = None, **options: Any) -> Any:
        model.config._attn_implementation = "sdpa"
        return compute(*args, **options)

    model.base_model.forward = without_packing
    assert chosen(computed(model), architectures.ragged(9, branches=(2,))) == ("tree", [])


@pytest.mark.parametrize("branches", [1, 2, 4])
def test_a_model_that_ignores_packing_and_masks_is_given_plain_rows(branches: int) -> None:
    model, trees = models.model(), [tree for tree in models.forest(40) if len(tree.branches) == branches]
    compute = model.base_model.forward

    def without_mask(input_ids: Tensor, attention_mask: Any = None, packing: Any = None, **options: Any) -> Any:
        model.config._attn_implementation = "sdpa"
        return compute(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)

    model.base_model.forward = without_mask
    layout, warnings = chosen(computed(model), trees)
    assert layout == "plain"
    assert "LlamaForCausalLM computes trees differently from plain rows" in warnings[0]


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
    assert re.search(r"by inf nats", plain_rows(computed(model), models.pairs(3)))


def test_a_model_with_a_sliding_window_is_given_plain_rows_even_if_short_examples_fit_the_window() -> None:
    model = models.model("mistral")
    short = [Tree((7,), (Branch.of((8, 9)),), 0), Tree((5, 6), (Branch.of((7,)),), 1)]
    long = Tree(tuple(range(5, 45)), (Branch.of((50, 51)), Branch.of((60, 61, 62))), 2)
    assert re.search("8 tokens at most", plain_rows(computed(model), [*short, long]))
    (plain,) = batches([long], 1000, "plain")
    expected = logprobs(model, plain)
    for other in (one_row([long]), packed([long])):
        assert (logprobs(model, other) - expected).abs().max() > 0.01


@EACH_DTYPE
@pytest.mark.parametrize("kind", architectures.RECURRENT)
def test_layers_that_look_back_without_a_mask_are_given_plain_rows(kind: str, dtype: torch.dtype) -> None:
    assert re.search(
        "has layers other than attention .*",
        plain_rows(computed(architectures.model(kind, dtype)), architectures.ragged(9)),
    )


def test_a_model_that_says_it_is_stateful_is_given_plain_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.model("grouped")
    monkeypatch.setattr(type(model), "_is_stateful", True)
    assert re.search("carries a state from token to token", plain_rows(computed(model), architectures.ragged(9)))


@EACH_DTYPE
@pytest.mark.parametrize("shift", [2, -3])
def test_a_leak_between_neighbours_within_the_tolerance_of_layouts_is_found(shift: int, dtype: torch.dtype) -> None:
    """A little of the token before or behind, whoever's it is, is added to each token's state."""
    model = architectures.model("grouped", dtype)
    size = 3e-5
    trees = [
        Tree(tuple(range(5, 12)), (Branch.of((60, 61, 70, 80)), Branch.of((90, 62, 71, 33))), 0),
        Tree(tuple(range(25, 32)), (Branch.of((61, 61, 70, 80)), Branch.of((89, 62, 71, 34))), 1),
    ]

    def mix(module: object, inputs: object, output: Tensor) -> Tensor:
        return output + size * output.roll(shift, dims=1)

    assert chosen(computed(model), trees) == ("packed", [])
    model.base_model.layers[0].register_forward_hook(mix)
    assert re.search(r"lets a tree change its neighbours \(by .*\)", plain_rows(computed(model), trees))


@EACH_DTYPE
def test_a_neighbour_may_change_rounding_in_low_precision_and_nothing_in_float32(dtype: torch.dtype) -> None:
    """As where experts get other batches, or 8-bit layers find other outliers: 0.001 of the mean of all tokens."""
    model = architectures.model("grouped", torch.bfloat16)

    def mix(module: object, inputs: object, output: Tensor) -> Tensor:
        return output + 0.001 * output.mean(1, keepdim=True) if output.dtype == dtype else output

    model.base_model.layers[0].register_forward_hook(mix)
    packs = chosen(computed(model), architectures.ragged(9, branches=(2,)))[0] == "packed"
    assert packs == (dtype == torch.bfloat16)


@EACH_DTYPE
def test_values_of_another_size_than_queries_are_packed(dtype: torch.dtype) -> None:
    assert chosen(computed(architectures.model("deepseek_v3", dtype)), architectures.ragged(9)) == ("packed", [])


def test_an_architecture_that_does_not_hand_the_packing_on_is_given_the_mask() -> None:
    assert chosen(computed(architectures.model("nemotron")), architectures.ragged(9)) == ("tree", [])


def test_an_architecture_that_takes_no_mask_of_trees_is_given_plain_rows() -> None:
    assert re.search(
        r"BloomForCausalLM cannot compute trees \(.*\)",
        plain_rows(computed(architectures.model("bloom")), architectures.ragged(9)),
    )


def test_too_little_memory_is_no_reason_for_another_layout() -> None:
    model = architectures.model("grouped")
    compute = model.base_model.forward

    def full(*args: Any, packing: Any = None, **options: Any) -> Any:
        if packing is not None:
            raise torch.OutOfMemoryError("no memory left")
        return compute(*args, **options)

    model.base_model.forward = full
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        chosen(computed(model), architectures.ragged(9))


def test_layouts_are_compared_in_float32_and_in_the_precision_of_training() -> None:
    model, found = architectures.model("grouped"), set()
    model.base_model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: found.add(output.dtype))
    assert chosen(computed(model, torch.bfloat16), architectures.ragged(9)) == ("packed", [])
    assert found == {torch.float32, torch.bfloat16}


def test_layouts_are_compared_without_dropout_and_the_mode_is_restored() -> None:
    model = architectures.model("grouped")
    for layer in model.base_model.layers:
        layer.self_attn.attention_dropout = 0.3
    model.train()
    model.base_model.layers[1].eval()
    before = [module.training for module in model.modules()]
    assert chosen(computed(model), architectures.ragged(9)) == ("packed", [])
    assert [module.training for module in model.modules()] == before


def test_a_model_with_dropout_can_be_made_from_nothing() -> None:
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.5}
    made = from_nothing({"model_type": "gpt2", **shape}, models.tokenizer(), models.CPU, 32)
    made.model.train()
    assert made.model.config.attn_pdrop > 0
    assert chosen(made, architectures.ragged(9)) == ("packed", [])


def test_no_trees_need_no_choice() -> None:
    assert chosen(computed(models.model()), []) == ("packed", [])


@pytest.fixture
def deep() -> PreTrainedModel:
    """A model in bfloat16 that rounding moves as far as a pretrained one: 30 layers and confident predictions."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 30}
    config = AutoConfig.for_model("llama", vocab_size=len(models.tokenizer()), initializer_range=0.25, **shape)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


PAIRS = [
    Tree(tuple(range(5, 25)), (Branch.of((60, 61, 70, 80, 33, 35)), Branch.of((90, 62, 71, 33, 8))), 0),
    Tree(tuple(range(30, 45)), (Branch.of((61, 61, 70, 80, 9)), Branch.of((89, 62, 71, 34, 10, 11))), 1),
]


def test_rounding_that_moves_single_tokens_far_is_no_fault_of_a_layout(deep: PreTrainedModel) -> None:
    (plain,) = batches(PAIRS, 1000, "plain")
    gaps = (logprobs(deep, packed(PAIRS)) - logprobs(deep, plain)).abs()
    assert gaps.max() > 0.15
    assert chosen(computed(deep), PAIRS) == ("packed", [])
    with in_float32(deep):
        assert (logprobs(deep, packed(PAIRS)) - logprobs(deep, plain)).abs().max() < 1e-4


def first_in_second(batch: TreeBatch) -> TreeBatch:
    """Second branches see the first."""

    def change(mask: Tensor, start: int, tree: Tree) -> None:
        prompt, second = start + len(tree.prompt), start + len(tree.prompt) + len(tree.branches[0].tokens)
        mask[second : start + tree.length, prompt:second] = True

    return faults.masked(batch, change)


@EACH_DTYPE
@pytest.mark.parametrize("fault", [faults.shifted, faults.half_hidden, first_in_second, faults.neighbour_visible])
def test_a_planted_fault_is_told_from_rounding(
    deep: PreTrainedModel,
    dtype: torch.dtype,
    fault: Callable[[TreeBatch], TreeBatch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choosing, "packed", lambda trees: fault(packed(trees)))
    monkeypatch.setattr(choosing, "one_row", lambda trees: fault(packed(trees)))
    assert "computes trees differently from plain rows" in plain_rows(computed(deep.to(dtype)), PAIRS)


def test_an_attention_that_is_wrong_in_low_precision_alone_is_found(
    deep: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = attention.padded_attention

    def wrong(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        return attend(query, key * 1.5 if key.dtype == torch.bfloat16 else key, value, *rest)

    monkeypatch.setattr(attention, "padded_attention", wrong)
    assert chosen(computed(deep), PAIRS) == ("tree", [])
    trial = choosing._Trial.of(computed(deep), PAIRS)
    with torch.no_grad():
        assert "nats a token from its values in float32 when it computes trees" in str(trial.fault(packed))


def test_bfloat16_layouts_differ_by_rounding_only() -> None:
    model, trees = models.model(dtype=torch.bfloat16), models.forest(8)

    def by_tree(layout: Layout) -> list[Tensor]:
        (batch,) = batches(trees, 10_000, layout)
        parts = logprobs(model, batch).split([tree.reads for tree in batch.trees])
        return [part for _, part in sorted(zip([tree.number for tree in batch.trees], parts, strict=True))]

    plain = torch.cat(by_tree("plain"))
    for layout in LAYOUTS:
        assert (torch.cat(by_tree(layout)) - plain).abs().max() < 0.15
