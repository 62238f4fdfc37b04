"""Which layout of trees an architecture can compute: found out on two examples before anything is trained.

Layouts are compared in float32, where they agree to 1e-5 and a mistake, such as positions that are off by one, moves
log-probabilities by 0.1 nats and more. In bfloat16 rounding moves them as far: with SmolLM2-135M two layouts differ by
0.06 to 0.13 nats (root mean square), and second branches one position off by 0.09 to 0.46.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.batch import Layout, TreeBatch, batches, one_row, packed
from data.tree import Branch, Tree
from stages.core.attention import OtherAttentionError
from stages.core.float32 import in_float32
from stages.core.forward import device_of, token_logprobs
from stages.core.models import LanguageModel

LAYOUTS: tuple[Layout, ...] = ("packed", "tree", "plain")
CANDIDATES = 1000
"""Trees of which two are compared: the shortest of those with most branches."""
TOLERANCE = 1e-3
"""Largest difference in a token's log-probability between layouts in float32; rounding leaves 2e-5 with 30 layers."""
LEAK_TOLERANCE = 1e-5
"""The same between two rows of one layout that differ in what the token must not see."""
DISTANCE = 3.0
"""In the run's precision, how much further than plain rows a layout may be from float32 (root mean square)..."""
LEAST_DISTANCE = 0.02
"""...and how far it may be in any case, in nats. A neighbour may change rounding by as much: experts get other batches,
and 8-bit layers find other outliers."""
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
"""Layers that look back through an attention's mask and in no other way."""

Values = dict[tuple[int, int], Tensor]
"""Log-probabilities of read tokens by (tree number, branch index)."""


@torch.no_grad()
def choose_layout(
    language_model: LanguageModel, trees: Sequence[Tree], say: Callable[[str], None]
) -> tuple[Layout, list[str]]:
    """Compare two examples in one packed row, and in one row with a mask, with the same in plain rows.

    The first layout is chosen that computes the same in float32, in which other tokens in the neighbours of a branch
    change nothing for it, and which is about as near to that in the run's precision as plain rows are. The role in use
    is computed as it is trained, but without dropout. Architectures with an attention of their own, as with sinks or
    capped scores, say so and need the mask. Those with their own treatment of masks cannot compute trees at all, nor
    can those with recurrent state, convolutions or sliding windows; short examples need not show these, so the model
    is asked.

    Args:
        language_model: The model with the role in use.
        trees: What it is trained on.
        say: Prints a line for the user.

    Returns:
        The layout to use, and warnings.
    """
    examples = sorted(trees[:CANDIDATES], key=lambda tree: (-len(tree.branches), tree.length))[:2]
    if not examples:
        return "packed", []
    model = language_model.model
    fault = _limit(model)
    if fault is None:
        with _evaluating(model):
            trial = _Trial.of(language_model, examples)
            if model.is_backend_compatible() and trial.fault(packed) is None:
                return "packed", []
            fault = trial.fault(one_row)
    if fault is None:
        return "tree", []
    warning = f"{type(model).__name__} {fault}: prompts are computed once for each response (plain rows)"
    say(f"warning: {warning}")
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

    language_model: LanguageModel
    examples: list[Tree]
    exact: Values
    """Plain rows in float32."""
    distance: float
    """How far plain rows are from that in the run's precision."""

    @classmethod
    def of(cls, language_model: LanguageModel, examples: list[Tree]) -> _Trial:
        model = language_model.model
        plain = list(batches(examples, 2 * sum(tree.length for tree in examples), "plain"))
        with in_float32(model):
            exact = _by_branch(model, plain)
        with language_model.compute.autocast():
            return cls(language_model, examples, exact, _distance(_by_branch(model, plain), exact))

    def fault(self, lay_out: Callable[[Sequence[Tree]], TreeBatch]) -> str | None:
        """What speaks against a layout."""
        try:
            with in_float32(self.language_model.model):
                values = self._computed(lay_out(self.examples))
                gap, leak = _gap(values, self.exact), self._leak(values, lay_out)
            with self.language_model.compute.autocast():
                values = self._computed(lay_out(self.examples))
                distance, moved = _distance(values, self.exact), self._leak(values, lay_out)
        except torch.OutOfMemoryError:
            raise
        except (OtherAttentionError, TypeError, ValueError, RuntimeError) as error:
            return f"cannot compute trees ({' '.join(str(error).split())[:200]})"
        if gap > TOLERANCE:
            return f"computes trees differently from plain rows (by {gap:.2g} nats a token in float32)"
        rounding = max(DISTANCE * self.distance, LEAST_DISTANCE)
        if leak > LEAK_TOLERANCE or moved > rounding:
            return f"lets a tree change its neighbours (by {max(leak, moved):.2g} nats)"
        if distance > rounding:
            return (
                f"is {distance:.2g} nats a token from its values in float32 when it computes trees, and "
                f"{self.distance:.2g} in plain rows"
            )
        return None

    def _computed(self, batch: TreeBatch) -> Values:
        return _by_branch(self.language_model.model, [batch])

    def _leak(self, found: Values, lay_out: Callable[[Sequence[Tree]], TreeBatch]) -> float:
        """How far the first branch, and the last, are moved by other tokens in everything that they must not see."""
        last = len(self.examples) - 1, len(self.examples[-1].branches) - 1
        vocabulary = self.language_model.model.config.get_text_config().vocab_size
        leaks = []
        for place, index in ((0, 0), last):
            row = [
                _other(tree, vocabulary, index if number == place else None)
                for number, tree in enumerate(self.examples)
            ]
            key = self.examples[place].number, index
            leaks.append(_gap(self._computed(lay_out(row)), {key: found[key]}))
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


def _distance(values: Values, expected: Values) -> float:
    """Root mean square of the differences in tokens' log-probabilities."""
    squares = torch.cat([(values[key] - expected[key]).square() for key in expected])
    distance = squares.mean().sqrt().item() if len(squares) else 0.0
    return distance if math.isfinite(distance) else math.inf


def _by_branch(model: PreTrainedModel, laid_out: Iterable[TreeBatch]) -> Values:
    found: Values = {}
    for batch in laid_out:
        values = token_logprobs(model, batch.to(device_of(model))).cpu()
        keys = [(tree.number, index) for tree in batch.trees for index in range(len(tree.branches))]
        counts = [branch.reads for tree in batch.trees for branch in tree.branches]
        found.update(zip(keys, values.split(counts), strict=True))
    return found
