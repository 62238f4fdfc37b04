"""Attention within packed trees: each tree's tokens see its prompt and their own branch, and nothing of other trees.

Trees of similar length are padded to one width, for the attention alone. On CUDA, where precision and head size
allow, branches are the sequences of variable-length flash attention instead, which needs no padding and no mask.
`replaced` puts this in the place of a model's own attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from data.packing import Group, Packing, Span
from pipeline.memory import PRODUCTS_WIDTH

NAME = "packed_trees"
FLASH = (torch.bfloat16, torch.float16)
"""Precisions in which flash attention computes."""
FLASH_CAPABILITY = (8, 0)
"""The oldest CUDA devices with flash attention."""
FLASH_SIZES = range(8, 257, 8)
"""Head sizes of flash attention."""
KEPT = 4
"""Batches of which orders are kept, from layer to layer and from role to role."""
OTHERWISE = ("softcap", "s_aux", "position_bias")
"""Options by which an architecture's attention is another one: capped scores, sinks, learned distances."""


class OtherAttentionError(Exception):
    """The architecture's attention is not the one that is computed here."""


@contextmanager
def replaced(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """Inside, the model attends by the function of this name. By default its forward takes `packing`, and its layers
    attend within the trees of that."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as `transformers` calls it, for one packed row.

    Args:
        module: The layer.
        query: [1, heads, tokens, size].
        key: [1, key heads, tokens, size]; a key head serves as many heads as it takes.
        value: [1, key heads, tokens, value size].
        attention_mask: None; `packing` says it all.
        packing: Where the trees stand; None where the architecture does not hand it on.
        scaling: Factor of the scores, by default 1 / sqrt(size).
        dropout: Probability with which a weight is zeroed.
        options: What other attentions take.

    Returns:
        [1, tokens, heads, value size], and None for the weights.

    Raises:
        OtherAttentionError: An option asks for another attention, or `packing` did not arrive.
    """
    if packing is None:
        raise OtherAttentionError(f"{type(module).__name__} is not handed the packing")
    for name in OTHERWISE:
        if options.get(name) is not None:
            raise OtherAttentionError(f"{type(module).__name__} attends with `{name}`")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Rotary embeddings in float32 raise what a product in lower precision gave.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if _flash_computes(query, value, dropout, _capability(query.device)):
        return flash_attention(query, key, value, packing, scale), None
    return padded_attention(query, key, value, packing, scale, dropout), None


AttentionInterface.register(NAME, packed_attention)


def _capability(device: torch.device) -> tuple[int, int] | None:
    """What a CUDA device can do; None of other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _flash_computes(query: Tensor, value: Tensor, dropout: float, capability: tuple[int, int] | None) -> bool:
    """Whether flash attention can do it: on CUDA, in few precisions and head sizes, and without dropout only."""
    if capability is None or capability < FLASH_CAPABILITY or query.dtype not in FLASH or dropout > 0.0:
        return False
    return query.shape[-1] in FLASH_SIZES and value.shape[-1] == query.shape[-1]


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention in groups of trees, each padded to one width: [1, tokens, heads, value size]."""
    heads, size = query.shape[1], value.shape[3]
    biases = _biases(packing, query.dtype, query.device)
    padded = (_padded(each, packing) for each in (query, key, value))
    attended = [_attend(*group, scale=scale, dropout=dropout) for group in zip(*padded, biases, strict=True)]
    order = _order(packing, heads, query.device)
    rows = torch.cat([each.reshape(-1, size) for each in attended])
    return _Rearranged.apply(rows, order.slots, order.rows, order.padding_slots).view(1, -1, heads, size)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    """Flash attention over sequences of different lengths, without padding: [1, tokens, heads, size].

    A tree's prompt with its first branch is one sequence, and so is every further branch, whose queries see the keys
    of the prompt too. No query is computed twice.
    """
    from torch.nn.attention.varlen import varlen_attn

    sequences = _sequences(packing, query.device)
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if "enable_gqa" in signature(varlen_attn).parameters:  # torch 2.11 takes fewer key heads without being told
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    if not packing.causal:
        key, value = (each.index_select(0, sequences.seen) for each in (key, value))
    bounds = (sequences.queries, sequences.keys, sequences.longest_query, sequences.longest_key)
    found: Any = varlen_attn(query, key, value, *bounds, **options)
    return found[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, scale: float, dropout: float) -> Tensor:
    """Attention of padded trees: query [trees, heads, width, size], key and value [trees, key heads, width, size]."""
    if bias is not None and _products_pay(query.shape[2], query.dtype):
        return _products(query, key, value, bias, scale, dropout)
    grouped = query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(
        query, key, value, bias, dropout, is_causal=bias is None, scale=scale, enable_gqa=grouped
    )


def _products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, dropout: float) -> Tensor:
    """dropout(softmax(q k^T scale + bias)) v, heads that share a key head stacked."""
    trees, heads, width, size = query.shape
    stacked = (query * scale).view(trees * key.shape[1], -1, size)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    scores = torch.bmm(stacked, key.transpose(1, 2)).view(trees, heads, width, width)
    weights = scores.add_(bias).softmax(-1)
    if dropout > 0.0:
        weights = functional.dropout(weights, dropout)
    return torch.bmm(weights.view(*stacked.shape[:2], width), value).view(trees, heads, width, -1)


def _padded(states: Tensor, packing: Packing) -> list[Tensor]:
    """[1, heads, tokens, size] to one [trees, heads, width, size] for each group."""
    heads, size = states.shape[1], states.shape[3]
    order = _order(packing, heads, states.device)
    rows = states.transpose(1, 2).reshape(-1, size)
    padded = _Rearranged.apply(rows, order.rows, order.slots, order.padding_rows)
    shapes = [(len(group.spans), heads, group.width, size) for group in packing.groups]
    parts = padded.split([trees * heads * width for trees, _, width, _ in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _Rearranged(torch.autograd.Function):
    """Rows in another order, padding added or taken away.

    A row has one place, so that the backward pass is a selection too, much faster than adding rows up. Padding
    is a copy of a row on the way there, which no result depends on, and zero on the way back. `padding` says which
    rows no place is a copy of, though `back` names one for them.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor, there: Tensor, back: Tensor, padding: Tensor) -> Tensor:
        context.back, context.padding = back, padding
        return rows.index_select(0, there)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        found = gradient.index_select(0, context.back)
        if len(context.padding):
            found.index_fill_(0, context.padding, 0.0)
        return found, None, None, None


@dataclass(frozen=True)
class _Order:
    """Between rows [tokens x heads] and slots [groups x trees x heads x width]."""

    rows: Tensor
    """[slots] the row that is put there; for padding the first one of its tree, so that a NaN stays in its tree and at
    most reaches the row's own padding."""
    slots: Tensor
    """[rows] where each is put; for the row's own padding the first slot."""
    padding_slots: Tensor
    """Slots that are padding."""
    padding_rows: Tensor
    """Rows that are padding."""


@lru_cache(KEPT)
def _order(packing: Packing, heads: int, device: torch.device) -> _Order:
    tokens, real = zip(*(_tokens(group, heads) for group in packing.groups), strict=True)
    head = torch.cat([_heads(group, heads) for group in packing.groups])
    taken = torch.cat(real)
    rows = torch.cat(tokens) * heads + head
    slots = torch.zeros(packing.width * heads, dtype=torch.long)
    slots[rows[taken]] = taken.nonzero().squeeze(1)
    padding_slots = (~taken).nonzero().squeeze(1)
    padding_rows = torch.arange(packing.spans[-1].stop * heads, packing.width * heads)
    return _Order(*(each.to(device) for each in (rows, slots, padding_slots, padding_rows)))


def _tokens(group: Group, heads: int) -> tuple[Tensor, Tensor]:
    """[trees x heads x width] the token of each slot, and whether it is no padding, which repeats the tree's first."""
    starts = torch.tensor([span.start for span in group.spans])[:, None, None]
    lengths = torch.tensor([span.length for span in group.spans])[:, None, None]
    place = torch.arange(group.width).expand(len(group.spans), heads, -1)
    real = place < lengths
    return (starts + torch.where(real, place, 0)).flatten(), real.flatten()


def _heads(group: Group, heads: int) -> Tensor:
    return torch.arange(heads)[None, :, None].expand(len(group.spans), -1, group.width).flatten()


def _products_pay(width: int, dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and width <= PRODUCTS_WIDTH


@lru_cache(1)  # dense: for layers and roles that take the same batch in a row
def _biases(packing: Packing, dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    """For each group what is added to its scores; None where fused attention needs nothing but to be causal."""
    return [
        None if group.causal and not _products_pay(group.width, dtype) else _bias(group, dtype).to(device)
        for group in packing.groups
    ]


def _bias(group: Group, dtype: torch.dtype) -> Tensor:
    """[trees, 1, width, width] 0 where attention is allowed, else the lowest number."""
    allowed = torch.zeros(len(group.spans), group.width, group.width, dtype=torch.bool)
    for tree, span in enumerate(group.spans):
        allowed[tree, : span.length, : span.prompt] = True
        begin = span.prompt
        for length in span.branches:
            allowed[tree, begin : begin + length, begin : begin + length] = True
            begin += length
    allowed = allowed.tril()
    allowed[:, :, 0] = True  # padding sees something, so that no softmax is over nothing
    bias = torch.full(allowed.shape, torch.finfo(dtype).min, dtype=dtype)
    return bias.masked_fill_(allowed, 0.0)[:, None]


@dataclass(frozen=True)
class _Sequences:
    """What variable-length attention is told. A causal query sees keys up to its own place, counted from the end."""

    queries: Tensor
    """[sequences + 1] where the queries of each begin and the last end."""
    keys: Tensor
    """[sequences + 1] the same of its keys."""
    longest_query: int
    longest_key: int
    seen: Tensor
    """[keys] the token of each key."""


@lru_cache(KEPT)
def _sequences(packing: Packing, device: torch.device) -> _Sequences:
    queries, seen = zip(*(each for span in packing.sequences for each in _paths(span)), strict=True)
    keys = [len(each) for each in seen]
    return _Sequences(
        torch.tensor([0, *accumulate(queries)], dtype=torch.int32, device=device),
        torch.tensor([0, *accumulate(keys)], dtype=torch.int32, device=device),
        max(queries),
        max(keys),
        torch.cat(seen).to(device),
    )


def _paths(span: Span) -> Iterator[tuple[int, Tensor]]:
    """For each branch how many of its tokens ask, and the tokens that they see: the first asks for the prompt too."""
    prompt, begin = torch.arange(span.start, span.start + span.prompt), span.start + span.prompt
    for number, length in enumerate(span.branches or (0,)):
        yield length + (span.prompt if number == 0 else 0), torch.cat((prompt, torch.arange(begin, begin + length)))
        begin += length
