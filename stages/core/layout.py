"""Which layout of trees an architecture can compute: found out on two examples before anything is trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.batch import Layout, TreeBatch, batches, one_row, packed
from data.tree import Tree
from stages.core.attention import OtherAttentionError
from stages.core.forward import device_of, token_logprobs

LAYOUTS: tuple[Layout, ...] = ("packed", "tree", "plain")
CANDIDATES = 1000
"""Trees of which two are compared: the shortest of those with most branches."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}
"""Largest difference in a token's log-probability between layouts that is put down to rounding."""


@torch.no_grad()
def choose_layout(model: PreTrainedModel, trees: Sequence[Tree]) -> tuple[Layout, list[str]]:
    """Compare two examples in one packed row, and in one row with a mask, with the same in plain rows.

    The first that agrees is chosen. Architectures with an attention of their own, as with sinks or capped scores,
    say so and need the mask. Those with recurrent state or their own treatment of masks cannot compute trees at all,
    nor can those with sliding windows, which either would replace; short examples would not show it, so the
    configuration is asked.

    Returns:
        The layout to use, and warnings.
    """
    examples = sorted(trees[:CANDIDATES], key=lambda tree: (-len(tree.branches), tree.length))[:2]
    if not examples:
        return "packed", []
    window = _window(model)
    if window:
        return "plain", [_warn(f"{type(model).__name__} attends to {window} tokens at most; using plain rows")]
    plain = _by_branch(model, batches(examples, 2 * sum(tree.length for tree in examples), "plain"))
    dtype = next(model.parameters()).dtype
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if _packed_gap(model, examples, plain) <= tolerance:
        return "packed", []
    gap = _gap(_by_branch(model, [one_row(examples)]), plain)
    if gap <= tolerance:
        return "tree", []
    found = f"{type(model).__name__} computes trees differently from plain rows (gap {gap:.2g}); using plain rows"
    return "plain", [_warn(found)]


def _warn(message: str) -> str:
    warnings.warn(message, stacklevel=3)
    return message


def _window(model: PreTrainedModel) -> int | None:
    """Tokens that a layer can look back on, where that is less than the model's context."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    context = getattr(config, "max_position_embeddings", math.inf)
    return window if window is not None and window < context else None


def _packed_gap(model: PreTrainedModel, examples: list[Tree], plain: dict[tuple[int, int], Tensor]) -> float:
    """The gap of the packed layout; infinite where the architecture has an attention of its own."""
    if not model.is_backend_compatible():
        return math.inf
    try:
        return _gap(_by_branch(model, [packed(examples)]), plain)
    except OtherAttentionError:
        return math.inf


def _gap(found: dict[tuple[int, int], Tensor], plain: dict[tuple[int, int], Tensor]) -> float:
    """Largest difference in a token's log-probability between two layouts."""
    gaps = [(found[key] - plain[key]).abs().max().item() for key in plain if len(plain[key])]
    # A NaN compares as larger than any tolerance only if it is made so.
    return max((gap if math.isfinite(gap) else math.inf for gap in gaps), default=0.0)


def _by_branch(model: PreTrainedModel, laid_out: Iterable[TreeBatch]) -> dict[tuple[int, int], Tensor]:
    """Log-probabilities of read tokens by (tree number, branch index)."""
    found: dict[tuple[int, int], Tensor] = {}
    for batch in laid_out:
        values = token_logprobs(model, batch.to(device_of(model))).cpu()
        keys = [(tree.number, index) for tree in batch.trees for index in range(len(tree.branches))]
        counts = [branch.reads for tree in batch.trees for branch in tree.branches]
        found.update(zip(keys, values.split(counts), strict=True))
    return found
