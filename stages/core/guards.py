"""What must hold before weights move: finite losses, finite gradients, a signal to learn from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.errors import ArtifactError, NumericalError

REMEDY = "lower the learning rate, check the data named above, or use dtype=float32; no weight was changed by this step"


def require_finite_loss(loss: Tensor, step: int, origins: Iterable[str]) -> None:
    """Raise NumericalError, naming the rows of the batch, when the loss is NaN or infinite."""
    if not torch.isfinite(loss).all():
        raise NumericalError(f"the loss is {loss.item()}", where=_place(step, origins), hint=REMEDY)


def require_finite_gradient(norm: Tensor, step: int, origins: Iterable[str]) -> None:
    """Raise NumericalError when the norm of the gradient is NaN or infinite."""
    if not torch.isfinite(norm):
        raise NumericalError(f"the gradient norm is {norm.item()}", where=_place(step, origins), hint=REMEDY)


def require_finite_weights(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ArtifactError naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in named:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(
                f"tensor `{name}` is not finite",
                hint="train again from an earlier checkpoint with a lower learning rate",
            )


def _place(step: int, origins: Iterable[str]) -> str:
    rows = sorted({origin for origin in origins if origin})
    shown = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
    return f"step {step}" + (f" (rows {shown})" if shown else "")
