"""Faults to plant: in rows of trees, in sampling, in adapters and in weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from data.batch import TreeBatch, one_row
from data.tree import Tree
from stages.core import models, rollout
from stages.core.roles import POLICY, Roles


@contextmanager
def twice(roles: Roles, role: str = POLICY, factor: float = 2.0) -> Iterator[None]:
    """The adapter's update counts twice, or not at all."""
    layers = [layer for layer in roles._layers() if role in layer.scaling]
    before = [layer.scaling[role] for layer in layers]
    for layer in layers:
        layer.scaling[role] *= factor
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[role] = scaling


@contextmanager
def wrong_matrix(roles: Roles) -> Iterator[None]:
    """One layer's keys are computed with the next layer's weights."""
    layers = models.decoder_layers(roles.base.model)
    middle = len(layers) // 2
    first, second = (_smallest(layers[index]) for index in (middle - 1, middle))
    before, first.data = first.data, second.data
    try:
        yield
    finally:
        first.data = before


def _smallest(layer: nn.Module) -> nn.Parameter:
    """Of matrices of the base, the one with the fewest values: that of the keys, where heads share them."""
    named = [(each.numel(), name) for name, each in layer.named_parameters() if each.ndim == 2 and "lora_" not in name]
    return layer.get_parameter(min(named)[1])


def shifted(batch: TreeBatch) -> TreeBatch:
    """Second branches stand one position too far."""
    positions, start = batch.positions.clone(), 0
    for tree in batch.trees:
        second = start + len(tree.prompt) + len(tree.branches[0].tokens)
        positions[0, second : start + tree.length] += 1
        start += tree.length
    return replace(batch, positions=positions)


def half_hidden(batch: TreeBatch) -> TreeBatch:
    """Branches do not see the first half of their prompt."""

    def change(mask: Tensor, start: int, tree: Tree) -> None:
        prompt = start + len(tree.prompt)
        mask[prompt : start + tree.length, start : start + len(tree.prompt) // 2] = False

    return masked(batch, change)


def neighbour_visible(batch: TreeBatch) -> TreeBatch:
    """Trees see the last token of the one before."""

    def change(mask: Tensor, start: int, tree: Tree) -> None:
        if start:
            mask[start : start + tree.length, start - 1] = True

    return masked(batch, change)


def masked(batch: TreeBatch, change: Callable[[Tensor, int, Tree], None]) -> TreeBatch:
    """The same trees in one row with another mask: `change` gets it, and where each tree begins in it."""
    row = one_row(batch.trees)
    assert row.mask is not None
    mask, start = row.mask.clone(), 0
    for tree in batch.trees:
        change(mask[0, 0], start, tree)
        start += tree.length
    return replace(row, mask=mask)


def later_positions(batch: Any, following: Tensor, done: list[bool]) -> None:
    _ADVANCE(batch, following, done)
    batch.positions += len(batch.tokens[0]) == 1


def hidden_prompt(batch: Any, following: Tensor, done: list[bool]) -> None:
    _ADVANCE(batch, following, done)
    batch.mask[:, : batch.width // 2] = 0


_ADVANCE = rollout._Batch._advance
