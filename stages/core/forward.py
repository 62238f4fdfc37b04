"""The one forward: hidden states of a tree batch, and log-probabilities of the tokens that are read.

The language-model head runs only on the positions that are read, in chunks, and log-softmax is in float32, so the
[tokens, vocabulary] matrix never exists at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from data.batch import Layout, TreeBatch, batches, one_row
from data.tree import Tree

LAYOUTS: tuple[Layout, Layout] = ("tree", "plain")
CANDIDATES = 1000
"""Trees of which the two shortest are compared in both layouts."""
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


def logits_of(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits at hidden states [n, hidden]: [n, vocabulary], float32, scaled or capped as the architecture does."""
    logits: Tensor = model.get_output_embeddings()(states).float()
    config = model.config.get_text_config()
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    if factor := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * factor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


def logprobs_of(model: PreTrainedModel, states: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of `targets` [n] at hidden states [n, hidden]: [n], float32.

    With more than one chunk, a chunk's logits are computed again in the backward pass rather than kept.
    """
    head = model.get_output_embeddings()
    per_chunk = max(1, CHUNK_LOGITS // head.weight.shape[0])

    def chunk_logprobs(states: Tensor, targets: Tensor) -> Tensor:
        logits = logits_of(model, states) / temperature
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
            logs = functional.log_softmax(logits_of(model, some) / temperature, dim=-1)
            found.append(-(logs.exp() * logs).sum(-1))
    return torch.cat(found) if found else states.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def choose_layout(model: PreTrainedModel, trees: Sequence[Tree]) -> tuple[Layout, list[str]]:
    """Compare two examples packed into one row with the same in plain rows; choose plain where they differ.

    Architectures with recurrent state or their own treatment of masks cannot compute trees. Nor can those with
    sliding windows, which a given mask replaces; short examples would not show it, so the configuration is asked.

    Returns:
        The layout to use, and warnings.
    """
    examples = sorted(trees[:CANDIDATES], key=lambda tree: tree.length)[:2]
    if not examples:
        return "tree", []
    window = _window(model)
    if window:
        return "plain", [_warn(f"{type(model).__name__} attends to {window} tokens at most; using plain rows")]
    gap = _layout_gap(model, examples)
    dtype = next(model.parameters()).dtype
    if gap <= LAYOUT_TOLERANCE.get(dtype, LAYOUT_TOLERANCE[torch.bfloat16]):
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


def _layout_gap(model: PreTrainedModel, trees: Sequence[Tree]) -> float:
    """Largest difference in a token's log-probability between the two layouts."""
    packed = _by_branch(model, [one_row(trees)])
    plain = _by_branch(model, batches(trees, 2 * sum(tree.length for tree in trees), "plain"))
    gaps = [(packed[key] - plain[key]).abs().max().item() for key in plain if len(plain[key])]
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


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model computes."""
    return next(model.parameters()).device
