"""What must hold before weights move: finite losses and gradients, and something to predict that the model can read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from data.tree import Tree
from pipeline.errors import ArtifactError, DataError, NumericalError
from pipeline.terminal import printable

REMEDY = "lower the learning rate, check the data named above, or use dtype=float32; no weight was changed by this step"


def require_finite_loss(loss: Tensor, step: int, origins: Iterable[str]) -> None:
    """Raise NumericalError, naming the rows of the batch, when the loss is NaN or infinite."""
    if not torch.isfinite(loss).all():
        raise NumericalError(f"the loss is {loss.item()}", where=place(step, origins), hint=REMEDY)


def require_finite_gradient(norm: Tensor, step: int, origins: Iterable[str]) -> None:
    """Raise NumericalError when the norm of the gradient is NaN or infinite."""
    if not torch.isfinite(norm):
        raise NumericalError(f"the gradient norm is {norm.item()}", where=place(step, origins), hint=REMEDY)


def require_finite_step(named: Sequence[tuple[str, Tensor]], step: int, origins: Iterable[str]) -> None:
    """Raise NumericalError, naming the rows, when a step made a weight NaN or infinite."""
    if torch.isfinite(nn.utils.get_total_norm([weight for _, weight in named])):
        return
    found = _not_finite(named)
    if found:
        hint = "lower the learning rate; the last checkpoint is from before this step"
        raise NumericalError(f"the step is taken, and {found}", where=place(step, origins), hint=hint)


def require_finite_weights(named: Iterable[tuple[str, Tensor]], where: Path | str = "") -> None:
    """Raise ArtifactError naming the first tensor that holds a NaN or an infinity."""
    found = _not_finite(named)
    if found:
        raise ArtifactError(
            found, where=where, hint="train again from an earlier checkpoint with a lower learning rate"
        )


def require_finite_state(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise NumericalError naming the first tensor of a training's state that holds a NaN or an infinity."""
    found = _not_finite(named)
    if found:
        raise NumericalError(found, hint="lower the learning rate; the checkpoint before this one is kept")


def require_trained_tokens(count: int, origins: Iterable[str]) -> None:
    """Raise DataError, naming the rows, where a step has no token that is trained on."""
    if not count:
        raise DataError(
            "no token of a step's rows is trained on",
            where=rows(origins),
            hint="leave them out, or raise max_length or examples_per_step so that something is predicted",
        )


def require_positions(trees: Iterable[Tree], positions: int | None) -> None:
    """Raise DataError, naming the row, for a sequence that is longer than the model has positions.

    Many models compute such a sequence without a word, and otherwise than they have learnt.
    """
    for tree in trees:
        longest = len(tree.prompt) + max(len(branch.tokens) for branch in tree.branches)
        if positions is not None and longest > positions:
            raise DataError(
                f"a sequence of {longest} tokens, the model has {positions} positions",
                where=tree.origin,
                hint="lower max_length",
            )


def place(step: int, origins: Iterable[str]) -> str:
    """A step and the rows that it was taken from, of which the first few are named."""
    named = rows(origins)
    return f"step {step}" + (f" (rows {named})" if named else "")


def rows(origins: Iterable[str]) -> str:
    """Where rows are from; of many the first few."""
    known = sorted({origin for origin in origins if origin})
    return ", ".join(known[:4]) + (f" and {len(known) - 4} more" if len(known) > 4 else "")


def _not_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    for name, tensor in named:
        if tensor.is_floating_point() and not _has_finite_norm(tensor) and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            return f"tensor `{printable(name)}` is not finite: {count:,} of its {tensor.numel():,} numbers"
    return ""


def _has_finite_norm(tensor: Tensor) -> bool:
    """Whether no number can be otherwise, at a fraction of what it takes to look at each; large ones may overflow."""
    precision = torch.promote_types(tensor.dtype, torch.float32)
    return bool(torch.isfinite(torch.linalg.vector_norm(tensor.detach(), dtype=precision)))
