"""Attention within packed trees against a loop over every token, in every way that it is computed."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import architectures
import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from data.packing import Packing
from stages.core import attention
from stages.core.attention import (
    OtherAttentionError,
    flash_attention,
    packed_attention,
    padded_attention,
    replaced,
)

SCALE = 0.4
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Attention = Callable[[Tensor, Tensor, Tensor, Packing, float], Tensor]


def states(
    packing: Packing, heads: int = 4, key_heads: int = 2, size: int = 8, seed: int = 0, value_size: int = 0
) -> list[Tensor]:
    """Query, key and value in float64, to be made leaves of any precision."""
    generator = torch.Generator().manual_seed(seed)
    tokens = packing.width
    return [
        torch.randn(1, count, tokens, width, generator=generator, dtype=torch.float64)
        for count, width in ((heads, size), (key_heads, size), (key_heads, value_size or size))
    ]


def paths(packing: Packing) -> list[list[int]]:
    """For each token what it sees, itself included."""
    found = []
    for span in packing.spans:
        prompt = range(span.start, span.start + span.prompt)
        found += [list(prompt[: place + 1]) for place in range(span.prompt)]
        begin = prompt.stop
        for length in span.branches:
            found += [[*prompt, *range(begin, begin + place + 1)] for place in range(length)]
            begin += length
    return found


def token_by_token(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    heads, shared = query.shape[1], query.shape[1] // key.shape[1]
    found = []
    for token, path in enumerate(paths(packing)):
        for head in range(heads):
            weights = (key[0, head // shared, path] @ query[0, head, token] * scale).softmax(0)
            found.append(weights @ value[0, head // shared, path])
    return torch.stack(found).view(1, -1, heads, value.shape[-1])


def with_gradients(compute: Attention, inputs: list[Tensor], packing: Packing, dtype: torch.dtype) -> list[Tensor]:
    """The result, and the gradients of an arbitrary weighting of it."""
    leaves = [each.to(dtype).requires_grad_() for each in inputs]
    result = compute(*leaves, packing, SCALE)
    generator = torch.Generator().manual_seed(7)
    weighting = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)
    gradients = torch.autograd.grad((result * weighting).sum(), leaves)
    assert all(gradient.dtype == dtype for gradient in gradients)
    return [result.detach().double(), *(gradient.double() for gradient in gradients)]


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize(("count", "branches"), [(1, (1,)), (1, (3,)), (4, (1,)), (7, (1, 2, 3, 4))])
def test_padded_attention_is_a_loop_over_tokens(count: int, branches: tuple[int, ...], key_heads: int) -> None:
    packing = Packing.of(architectures.ragged(count, seed=count, branches=branches))
    inputs = states(packing, key_heads=key_heads)
    expected = with_gradients(token_by_token, inputs, packing, torch.float64)
    for found, exact in zip(with_gradients(padded_attention, inputs, packing, torch.float32), expected, strict=True):
        assert torch.allclose(found, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize(("count", "branches"), [(1, (2,)), (7, (1, 2, 3, 4)), (23, (1,))])
def test_a_rows_padding_changes_nothing_for_its_trees_and_gets_no_gradient(
    count: int, branches: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    trees = architectures.ragged(count, seed=count, branches=branches)
    plain = Packing.of(trees)
    row = Packing.of(trees, plain.width + 9)
    inputs = [each.to(dtype).double() for each in states(row)]
    without = [each[:, :, : plain.width] for each in inputs]

    def of_trees(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
        whole = padded_attention(query, key, value, packing, scale)
        assert whole.shape[1] == packing.width
        assert whole.isfinite().all()
        return whole[:, : plain.width]

    expected = with_gradients(token_by_token, without, plain, torch.float64)
    result, *gradients = with_gradients(of_trees, inputs, row, dtype)
    assert error(result, expected[0]) < tolerance
    for found, exact in zip(gradients, expected[1:], strict=True):
        assert error(found[:, :, : plain.width], exact) < tolerance
        assert not found[:, :, plain.width :].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("value_size", [6, 24])
def test_values_may_have_another_size(value_size: int, dtype: torch.dtype, tolerance: float) -> None:
    packing = Packing.of(architectures.ragged(7))
    inputs = [each.to(dtype).double() for each in states(packing, value_size=value_size)]
    expected = with_gradients(token_by_token, inputs, packing, torch.float64)
    for found, exact in zip(with_gradients(padded_attention, inputs, packing, dtype), expected, strict=True):
        assert error(found, exact) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branches", [(1,), (2, 3)])
def test_dropout_zeroes_weights_and_keeps_their_mean(branches: tuple[int, ...], dtype: torch.dtype) -> None:
    packing = Packing.of(architectures.ragged(40, branches=branches))
    query, key, value = (each.to(dtype) for each in states(packing))
    ones = torch.ones_like(value)
    torch.manual_seed(0)
    found, _ = packed_attention(torch.nn.Module(), query, key, ones, None, packing=packing, dropout=0.5)
    alone = found[0, [span.start for span in packing.spans]].float()
    assert set(alone.unique().tolist()) == {0.0, 2.0}
    assert found.float().mean() == pytest.approx(1.0, abs=0.05)


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("size", "flash"), [(4, False), (8, True), (20, False), (64, True), (256, True), (264, False)])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_flash_attention_computes_the_head_sizes_it_has(
    size: int, flash: bool, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    states = torch.zeros(1, 1, 1, size, dtype=dtype)
    assert attention._flash_computes(states, states, 0.0, capability) == flash


def test_what_flash_attention_cannot_do_is_padded() -> None:
    states, wide = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16)
    assert attention._flash_computes(states, states, 0.0, (8, 0))
    assert not attention._flash_computes(states.float(), states.float(), 0.0, (8, 0))
    assert not attention._flash_computes(states, wide, 0.0, (8, 0))
    assert not attention._flash_computes(states, states, 0.1, (8, 0))
    assert not attention._flash_computes(states, states, 0.0, (7, 5))
    assert not attention._flash_computes(states, states, 0.0, None)


def test_dense_masks_of_one_batch_only_are_kept() -> None:
    kept = []
    for seed in range(3):
        packing = Packing.of(architectures.ragged(7, seed=seed, branches=(2,)))
        biases = attention._biases(packing, torch.bfloat16, torch.device("cpu"))
        assert biases is attention._biases(packing, torch.bfloat16, torch.device("cpu"))
        kept.append(weakref.ref(biases[0]))
    del biases
    gc.collect()
    assert [each() is None for each in kept] == [True, True, False]


def test_products_and_fused_attention_agree_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    trees = architectures.ragged(12, seed=1)
    inputs = states(Packing.of(trees))
    rounded = [each.bfloat16().double() for each in inputs]
    exact = with_gradients(token_by_token, rounded, Packing.of(trees), torch.float64)
    for width in (attention.PRODUCTS_WIDTH, 0):
        monkeypatch.setattr(attention, "PRODUCTS_WIDTH", width)
        found = with_gradients(padded_attention, inputs, Packing.of(trees), torch.bfloat16)
        assert [error(*each) < 0.01 for each in zip(found, exact, strict=True)] == [True] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tree", [0, 5])
def test_a_nan_stays_in_its_tree(tree: int, dtype: torch.dtype) -> None:
    packing = Packing.of(architectures.ragged(12, seed=2))
    inputs = [each.to(dtype) for each in states(packing)]
    clean = padded_attention(*inputs, packing, SCALE)
    span = packing.spans[tree]
    for each in inputs:
        each[:, :, span.start] = torch.nan
    found = padded_attention(*inputs, packing, SCALE)
    outside = torch.ones(packing.spans[-1].stop, dtype=torch.bool)
    outside[span.start : span.stop] = False
    assert torch.equal(found[:, outside], clean[:, outside])
    assert found[:, ~outside].isnan().all()


def by_sequence(query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """What variable-length causal attention is: [queries, heads, size]; the last query sees the last key."""
    shared = query.shape[1] // key.shape[1]
    found = []
    bounds = [zip(starts.tolist(), starts[1:].tolist(), strict=False) for starts in (queries, keys)]
    for asking, seen in zip(*bounds, strict=True):
        some = query[slice(*asking)].transpose(0, 1)
        known, worth = (each[slice(*seen)].transpose(0, 1).repeat_interleave(shared, 0) for each in (key, value))
        scores = some @ known.transpose(1, 2) * scale
        later = scores.shape[2] - scores.shape[1] + 1
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(later)
        found.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ worth).transpose(0, 1))
    return torch.cat(found)


def varlen_of_211(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """With the signature that torch 2.11 has."""
    for states, starts, longest in ((query, cu_seq_q, max_q), (key, cu_seq_k, max_k)):
        assert starts.dtype == torch.int32
        assert longest == starts.diff().max()
        assert len(states) == starts[-1]
    assert window_size == (-1, 0)
    assert return_aux is None
    assert scale is not None
    return by_sequence(query, key, value, cu_seq_q, cu_seq_k, scale)


def installed_varlen(*arguments: Any, **options: Any) -> Tensor:
    """With the signature that the installed torch has, which is checked."""
    inspect.signature(installed_varlen).bind(*arguments, **options)
    query, key = arguments[:2]
    assert options.pop("enable_gqa", key.shape[1] != query.shape[1]) == (key.shape[1] != query.shape[1])
    return varlen_of_211(*arguments, **options)


installed_varlen.__signature__ = inspect.signature(varlen.varlen_attn)  # type: ignore[attr-defined]


@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("branches", [(1,), (1, 2, 3, 4)])
@pytest.mark.parametrize("stand_in", [varlen_of_211, installed_varlen])
def test_branches_are_called_as_sequences_of_variable_length(
    stand_in: Callable[..., Tensor], branches: tuple[int, ...], key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    trees = architectures.ragged(9, seed=4, branches=branches)
    packing = Packing.of(trees)
    inputs = states(packing, key_heads=key_heads)
    found = with_gradients(flash_attention, inputs, packing, torch.float64)
    exact = with_gradients(token_by_token, inputs, packing, torch.float64)
    assert [error(*each) < 1e-9 for each in zip(found, exact, strict=True)] == [True] * 4
    row = Packing.of(trees, 32 + -(-packing.width // 32) * 32)
    assert row.padding
    wider = [torch.nn.functional.pad(each, (0, 0, 0, row.padding)) for each in inputs]
    assert torch.allclose(flash_attention(*wider, row, SCALE)[:, : packing.width], found[0])


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branches", [(1,), (1, 2, 3, 4)])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_cuda_computes_what_a_processor_does(key_heads: int, branches: tuple[int, ...], dtype: torch.dtype) -> None:
    packing = Packing.of(architectures.ragged(12, seed=5, branches=branches))
    inputs = states(packing, key_heads=key_heads, size=32)
    rounded = [each.to(dtype).double() for each in inputs]
    exact = with_gradients(padded_attention, rounded, packing, torch.float64)

    def on_cuda(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
        moved = (each.cuda() for each in (query, key, value))
        return packed_attention(torch.nn.Module(), *moved, None, packing=packing, scaling=scale)[0].cpu()

    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-3
    for found, expected in zip(with_gradients(on_cuda, inputs, packing, dtype), exact, strict=True):
        assert error(found, expected) < tolerance


def test_the_scale_is_by_default_the_roots_inverse() -> None:
    packing = Packing.of(architectures.ragged(3))
    inputs = [each.float() for each in states(packing)]
    found, weights = packed_attention(torch.nn.Module(), *inputs, None, packing=packing)
    assert torch.equal(found, padded_attention(*inputs, packing, 8**-0.5))
    assert weights is None


def test_a_packing_that_does_not_arrive_is_named() -> None:
    inputs = states(Packing.of(architectures.ragged(3)))
    with pytest.raises(OtherAttentionError, match="Module is not handed the packing"):
        packed_attention(torch.nn.Module(), *inputs, None)


@pytest.mark.parametrize("option", attention.OTHERWISE)
def test_another_attention_is_not_replaced(option: str) -> None:
    packing = Packing.of(architectures.ragged(3))
    inputs = [each.float() for each in states(packing)]
    with pytest.raises(OtherAttentionError, match=f"Module attends with `{option}`"):
        packed_attention(torch.nn.Module(), *inputs, None, packing=packing, **{option: 2.0})
    packed_attention(torch.nn.Module(), *inputs, None, packing=packing, **{option: None})


def test_a_second_derivative_is_refused() -> None:
    packing = Packing.of(architectures.ragged(3))
    query, key, value = (each.requires_grad_() for each in states(packing))
    (gradient,) = torch.autograd.grad(
        padded_attention(query, key, value, packing, SCALE).square().sum(), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_models_attention_is_back_after_the_forward_and_after_an_error() -> None:
    model = architectures.model("grouped")
    with replaced(model):
        assert model.config._attn_implementation == attention.NAME
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ZeroDivisionError), replaced(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


def test_the_padding_of_a_row_is_a_sequence_of_its_own() -> None:
    trees = architectures.ragged(5, branches=(1,))
    plain = Packing.of(trees)
    padding = 2 * plain.width
    found = attention._sequences(Packing.of(trees, plain.width + padding), torch.device("cpu"))
    assert found.queries.tolist() == [*(span.start for span in plain.spans), plain.width, plain.width + padding]
    assert found.keys.tolist() == found.queries.tolist()
    assert found.longest_query == found.longest_key == padding
