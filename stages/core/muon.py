"""Muon for many small matrices: those of equal shape are orthogonalised together.

`torch.optim.Muon` goes through its matrices one by one. A model has many of few shapes, and on adapters or narrow
models most of the time goes into starting products that are over at once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that drives singular values towards 1, steep at zero so that five rounds are enough."""
ROUNDS = 5
SMALLEST_NORM = 1e-7
ADAMW_RMS = 0.2
"""Root mean square of a typical AdamW update, at learning rate 1."""
TOGETHER = 1 << 24
"""Entries of the matrices that are orthogonalised at once, at most: large ones gain nothing by it and need memory."""


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised before they are applied (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/): m <- momentum m + (1 - momentum) g, u = (1 - momentum) g + momentum m,
    w <- (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) orthogonal(u).

    The last factor gives an update the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that one learning
    rate serves both. The update is `torch.optim.Muon`'s with `adjust_lr_fn="match_rms_adamw"`, but for rounding.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            for alike in _batches(group["params"]):
                wide = torch.stack([_wide(self._momentum(each, group["momentum"])) for each in alike])
                size = ADAMW_RMS * math.sqrt(wide.shape[-1])
                for each, update in zip(alike, orthogonalise(wide), strict=True):
                    each.mul_(1 - group["lr"] * group["weight_decay"])
                    each.add_(update if _is_wide(each) else update.T, alpha=-group["lr"] * size)

    def _momentum(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        """The matrix's update before it is orthogonalised (Nesterov's form)."""
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix.grad)
        return matrix.grad.lerp(state["momentum"].lerp_(matrix.grad, 1 - momentum), momentum)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: [n, rows, columns], rows <= columns.

    Newton-Schulz iteration (Jordan et al. 2024): singular values come out between 0.7 and 1.2. In bfloat16 where the
    device has instructions for it.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(_precision(matrices.device))
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def _batches(matrices: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Matrices of equal shape that have a gradient; a tall one is like a wide one of the same sizes."""
    groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
    for matrix in matrices:
        if matrix.grad is not None:
            groups[tuple(sorted(matrix.shape))].append(matrix)
    for (rows, columns), alike in groups.items():
        size = max(1, TOGETHER // (rows * columns))
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix if _is_wide(matrix) else matrix.T


def _precision(device: torch.device) -> torch.dtype:
    """Asked of the device rather than timed, so that the same machine always computes the same."""
    has_instructions = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if has_instructions else torch.float32
