"""The one forward: hidden states of a tree batch, and log-probabilities of the tokens that are read.

The language-model head runs only on the positions that are read, in chunks, and log-softmax is in float32, so the
[tokens, vocabulary] matrix never exists at once.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from data.tree import Layout, Tree, TreeBatch, batches

LAYOUTS: tuple[Layout, Layout] = ("tree", "plain")
CHUNK_LOGITS = 1 << 25
"""Logits computed at once: 128 MiB in float32."""
LAYOUT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}
"""Largest difference in a token's log-probability between layouts that is put down to rounding."""


def hidden_states(model: PreTrainedModel, batch: TreeBatch) -> Tensor:
    """Final hidden states of a batch, flattened: [rows * width, hidden]."""
    output = model.base_model(
        input_ids=batch.tokens, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
    )
    return output.last_hidden_state.flatten(0, 1)


def token_logprobs(model: PreTrainedModel, batch: TreeBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability of every read token given what precedes it on its path: [reads], float32."""
    states = hidden_states(model, batch).index_select(0, batch.sources)
    return logprobs_of(model, states, batch.targets, temperature)


def logprobs_of(model: PreTrainedModel, states: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of `targets` [n] at hidden states [n, hidden]: [n], float32.

    With more than one chunk, a chunk's logits are computed again in the backward pass rather than kept.
    """
    head = model.get_output_embeddings()
    per_chunk = max(1, CHUNK_LOGITS // head.weight.shape[0])

    def chunk_logprobs(states: Tensor, targets: Tensor) -> Tensor:
        logits = head(states).float() / temperature
        return -functional.cross_entropy(logits, targets, reduction="none")

    if len(targets) <= per_chunk:
        return chunk_logprobs(states, targets)
    parts = [
        checkpoint(chunk_logprobs, some, wanted, use_reentrant=False)
        for some, wanted in zip(states.split(per_chunk), targets.split(per_chunk), strict=True)
    ]
    return torch.cat(parts)


def entropies(model: PreTrainedModel, states: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of the next-token distribution at hidden states [n, hidden]: [n], float32, no gradient."""
    head = model.get_output_embeddings()
    per_chunk = max(1, CHUNK_LOGITS // head.weight.shape[0])
    found = []
    with torch.no_grad():
        for some in states.split(per_chunk):
            logs = functional.log_softmax(head(some).float() / temperature, dim=-1)
            found.append(-(logs.exp() * logs).sum(-1))
    return torch.cat(found) if found else states.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def choose_layout(model: PreTrainedModel, trees: Sequence[Tree]) -> tuple[Layout, list[str]]:
    """Compare the tree layout with the plain one on two examples; fall back to plain where they differ.

    Architectures with short sliding windows, recurrent state or their own treatment of masks cannot compute trees.

    Returns:
        The layout to use, and warnings.
    """
    examples = sorted(trees, key=lambda tree: tree.length)[:2]
    if not examples:
        return "tree", []
    gap = _layout_gap(model, examples)
    dtype = next(model.parameters()).dtype
    if gap <= LAYOUT_TOLERANCE.get(dtype, LAYOUT_TOLERANCE[torch.bfloat16]):
        return "tree", []
    found = f"{type(model).__name__} computes trees differently from plain rows (gap {gap:.2g}); using plain rows"
    warnings.warn(found, stacklevel=2)
    return "plain", [found]


def _layout_gap(model: PreTrainedModel, trees: Sequence[Tree]) -> float:
    """Largest difference in a token's log-probability between the two layouts."""
    tree, plain = (_by_branch(model, trees, layout) for layout in LAYOUTS)
    gaps = [(tree[key] - plain[key]).abs().max().item() for key in plain if len(plain[key])]
    # A NaN compares as larger than any tolerance only if it is made so.
    return max((gap if math.isfinite(gap) else math.inf for gap in gaps), default=0.0)


def _by_branch(model: PreTrainedModel, trees: Sequence[Tree], layout: Layout) -> dict[tuple[int, int], Tensor]:
    """Log-probabilities of read tokens by (tree number, branch index); a tree's branches may be in several rows."""
    found: dict[tuple[int, int], Tensor] = {}
    for batch in batches(trees, 2 * sum(tree.length for tree in trees), layout):
        values = token_logprobs(model, batch.to(device_of(model))).cpu()
        seen: Counter[int] = Counter()
        owners = [tree.number for tree in batch.trees for _ in tree.branches]
        for branch, number in enumerate(owners):
            found[number, seen[number]] = values[batch.branch_of_read == branch]
            seen[number] += 1
    return found


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model computes."""
    return next(model.parameters()).device
