"""Which layout of trees an architecture can compute: found out on two examples before anything is trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.batch import Layout, TreeBatch, batches, one_row, packed
from data.tree import Branch, Tree
from stages.core.attention import OtherAttentionError
from stages.core.forward import device_of, token_logprobs
from stages.core.models import LanguageModel

LAYOUTS: tuple[Layout, ...] = ("packed", "tree", "plain")
CANDIDATES = 1000
"""Trees of which two are compared: the shortest of those with most branches."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}
"""Largest difference in a token's log-probability between layouts that is put down to rounding."""
LEAK_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
"""The same between two rows of one layout that differ in what the token must not see."""
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
"""Layers that look back through an attention's mask and in no other way."""

Values = dict[tuple[int, int], Tensor]
"""Log-probabilities of read tokens by (tree number, branch index)."""


@torch.no_grad()
def choose_layout(language_model: LanguageModel, trees: Sequence[Tree]) -> tuple[Layout, list[str]]:
    """Compare two examples in one packed row, and in one row with a mask, with the same in plain rows.

    The first is chosen that agrees, and in which other tokens in the neighbours of a branch change nothing for it.
    The role in use is computed as it is trained, in the run's precision, but without dropout. Architectures with an
    attention of their own, as with sinks or capped scores, say so and need the mask. Those with their own treatment
    of masks cannot compute trees at all, nor can those with recurrent state, convolutions or sliding windows; short
    examples need not show these, so the model is asked.

    Returns:
        The layout to use, and warnings.
    """
    examples = sorted(trees[:CANDIDATES], key=lambda tree: (-len(tree.branches), tree.length))[:2]
    if not examples:
        return "packed", []
    model = language_model.model
    fault = _limit(model)
    if fault is None:
        with _evaluating(model), language_model.compute.autocast():
            trial = _Trial.of(language_model, examples)
            if model.is_backend_compatible() and trial.fault(packed) is None:
                return "packed", []
            fault = trial.fault(one_row)
    if fault is None:
        return "tree", []
    warning = f"{type(model).__name__} {fault}; using plain rows"
    warnings.warn(warning, stacklevel=2)
    return "plain", [warning]


def _limit(model: PreTrainedModel) -> str | None:
    """What the model says of itself that rules trees out."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if window is not None and window < getattr(config, "max_position_embeddings", math.inf):
        return f"attends to {window} tokens at most"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION_LAYERS))
    if others:
        return f"has layers other than attention ({', '.join(others)})"
    return "carries a state from token to token" if model._is_stateful else None


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, without dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class _Trial:
    """Examples that are computed in one layout after the other."""

    model: PreTrainedModel
    examples: list[Tree]
    plain: Values
    dtype: torch.dtype

    @classmethod
    def of(cls, language_model: LanguageModel, examples: list[Tree]) -> _Trial:
        model = language_model.model
        plain = _by_branch(model, batches(examples, 2 * sum(tree.length for tree in examples), "plain"))
        # A quantized base rounds more coarsely than any precision it computes in.
        exact = language_model.compute.dtype == torch.float32 and not getattr(model, "is_quantized", False)
        return cls(model, examples, plain, torch.float32 if exact else torch.bfloat16)

    def fault(self, lay_out: Callable[[Sequence[Tree]], TreeBatch]) -> str | None:
        """What speaks against a layout."""
        try:
            found = _by_branch(self.model, [lay_out(self.examples)])
            gap, leak = _gap(found, self.plain), self._leak(found, lay_out)
        except torch.OutOfMemoryError:
            raise
        except (OtherAttentionError, TypeError, ValueError, RuntimeError) as error:
            return f"cannot compute trees ({' '.join(str(error).split())[:200]})"
        if gap > TOLERANCE[self.dtype]:
            return f"computes trees differently from plain rows (gap {gap:.2g})"
        if leak > LEAK_TOLERANCE[self.dtype]:
            return f"lets a tree change its neighbours (by {leak:.2g})"
        return None

    def _leak(self, found: Values, lay_out: Callable[[Sequence[Tree]], TreeBatch]) -> float:
        """How far the first branch, and the last, are moved by other tokens in everything that they must not see."""
        last = len(self.examples) - 1, len(self.examples[-1].branches) - 1
        vocabulary = self.model.config.get_text_config().vocab_size
        leaks = []
        for place, index in ((0, 0), last):
            row = [
                _other(tree, vocabulary, index if number == place else None)
                for number, tree in enumerate(self.examples)
            ]
            key = self.examples[place].number, index
            leaks.append(_gap(_by_branch(self.model, [lay_out(row)]), {key: found[key]}))
        return max(leaks)


def _other(tree: Tree, vocabulary: int, kept: int | None) -> Tree:
    """The tree with every token exchanged, but for the path of the branch that is kept."""

    def exchanged(tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tuple((token + vocabulary // 2) % vocabulary for token in tokens)

    branches = tuple(
        branch if index == kept else Branch(exchanged(branch.tokens), branch.read)
        for index, branch in enumerate(tree.branches)
    )
    return replace(tree, prompt=exchanged(tree.prompt) if kept is None else tree.prompt, branches=branches)


def _gap(found: Values, expected: Values) -> float:
    """Largest difference in a token's log-probability."""
    gaps = [(found[key] - expected[key]).abs().max().item() for key in expected if len(expected[key])]
    # A NaN compares as larger than any tolerance only if it is made so.
    return max((gap if math.isfinite(gap) else math.inf for gap in gaps), default=0.0)


def _by_branch(model: PreTrainedModel, laid_out: Iterable[TreeBatch]) -> Values:
    found: Values = {}
    for batch in laid_out:
        values = token_logprobs(model, batch.to(device_of(model))).cpu()
        keys = [(tree.number, index) for tree in batch.trees for index in range(len(tree.branches))]
        counts = [branch.reads for tree in batch.trees for branch in tree.branches]
        found.update(zip(keys, values.split(counts), strict=True))
    return found
