"""Attention of one token a row, against attention written out, and where it leaves the work to the fused one."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from stages.core import one_token
from stages.core.key_values import make_room
from stages.core.one_token import one_token_attention

ROWS, KEY_HEADS, HEADS, WIDTH, SIZE = 3, 2, 6, 7, 8


def cached(dtype: torch.dtype, room: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values as a cache with so much room left hands them out."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(ROWS, KEY_HEADS, WIDTH, SIZE, generator=generator, dtype=dtype) for _ in range(2))
    cache = DynamicCache()
    cache.update(keys[:, :, :-1], values[:, :, :-1], 0)
    make_room(cache, room)
    return cache.update(keys[:, :, -1:], values[:, :, -1:], 0)


def written_out(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """[rows, 1, heads, size], a number at a time."""
    found = torch.empty(ROWS, 1, HEADS, SIZE, dtype=torch.float64)
    for row in range(ROWS):
        for head in range(HEADS):
            of_key = head // (HEADS // KEY_HEADS)
            scores = [
                scaling * (query[row, head, 0].double() @ key[row, of_key, place].double()) for place in range(WIDTH)
            ]
            weights = [score.exp() if seen[row, 0, 0, place] else 0.0 for place, score in enumerate(scores)]
            mixed = sum(weight * value[row, of_key, place].double() for place, weight in enumerate(weights))
            found[row, 0, head] = mixed / sum(weights)
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("room", [1, 5])
@pytest.mark.parametrize("options", [{}, {"scaling": 0.7}])
def test_it_is_attention_written_out_whatever_the_room(
    dtype: torch.dtype, tolerance: float, room: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, value = cached(dtype, room)
    query = torch.randn(ROWS, HEADS, 1, SIZE, generator=torch.Generator().manual_seed(1), dtype=dtype)
    seen = torch.ones(ROWS, 1, 1, WIDTH, dtype=torch.bool)
    seen[0, :, :, :3] = seen[2, :, :, 4] = False
    monkeypatch.setattr(one_token, "sdpa_attention_forward", None)  # which is not called
    scaling = options.get("scaling", SIZE**-0.5)
    found, _ = one_token_attention(models.model(), query, key, value, seen, **options)
    assert (found - written_out(query, key, value, seen, scaling)).abs().max() < tolerance
    found, _ = one_token_attention(models.model(), query, key, value, None, **options)
    assert (found - written_out(query, key, value, torch.ones_like(seen), scaling)).abs().max() < tolerance


@pytest.mark.parametrize(
    "change", [{"dropout": 0.1}, {"softcap": 30.0}, {"s_aux": torch.zeros(HEADS)}, {"position_bias": torch.zeros(1)}]
)
def test_another_attention_is_left_to_the_fused_one(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    key, value = cached(torch.float32, 4)
    query = torch.randn(ROWS, HEADS, 1, SIZE)
    monkeypatch.setattr(one_token, "sdpa_attention_forward", lambda *given, **options: (given, options))
    given, options = one_token_attention(models.model(), query, key, value, None, scaling=0.5, **change)
    assert given[1:] == (query, key, value, None)
    assert options == {"scaling": 0.5, **change}


def test_several_tokens_and_states_that_are_no_beginning_are_left_to_the_fused_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(one_token, "sdpa_attention_forward", lambda *given, **options: given)
    key, value = cached(torch.float32, 4)
    several, one = (torch.randn(ROWS, HEADS, count, SIZE) for count in (2, 1))
    for query, keys, values in (
        (several, key, value),
        (one, key[:, :, 1:], value[:, :, 1:]),
        (one, key[1:], value[1:]),
        (one, key.transpose(1, 2).contiguous().transpose(1, 2), value),
        (one.double(), key, value),
    ):
        assert one_token_attention(models.model(), query, keys, values, None)[1:4] == (query, keys, values)


def test_a_model_attends_otherwise_for_as_long_as_is_asked() -> None:
    model = models.model()
    assert model.config._attn_implementation == "sdpa"
    with one_token.products(model):
        assert model.config._attn_implementation == one_token.NAME
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with one_token.products(model):
        assert model.config._attn_implementation == "eager"
