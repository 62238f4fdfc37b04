"""Root-mean-square normalisation in a few passes over memory instead of a dozen.

y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich 2019, arXiv 1910.07467), statistics in float32. The gradient is
written out: with n = 1 / sqrt(mean(x^2) + eps) and v = g * w, it is n v - n^3 mean(v x) x. On processors the kernels of
other normalisations compute it in one pass: rows are scaled by batch normalisation with given statistics, and the
gradient is layer normalisation's for a mean of zero, which is less by n mean(v).

Under autocast the result is in its precision: what comes next are mostly matrix products, which would each convert it.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
"""Those of weights whose statistics float32 is good enough for."""
SIZE = 8
"""Rows on which a module is compared with the formula before it is replaced."""


def speed_up(model: nn.Module) -> None:
    """Give the model's normalisations that compute just this formula this forward."""
    for module in model.modules():
        if _is_the_formula(module):
            module.forward = MethodType(_forward, module)


def _forward(module: nn.Module, states: Tensor) -> Tensor:
    weight: Any = module.weight
    epsilon: Any = module.variance_epsilon
    device = states.device.type
    found: Tensor
    if device == "cpu" and not torch.is_grad_enabled():
        found = _on_processor(states.reshape(-1, states.shape[-1]), weight, epsilon)[0].view(states.shape)
    else:
        function = _OnProcessor if device == "cpu" else _Normalised
        found = function.apply(states, weight, epsilon)
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return found.to(torch.get_autocast_dtype(device))
    return found


@torch.no_grad()
def _is_the_formula(module: nn.Module) -> bool:
    """Whether a module is named as such a normalisation and computes the same: some add 1 to the weight."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or weight is None or not hasattr(module, "variance_epsilon"):
        return False
    if weight.is_meta or weight.dtype not in PRECISIONS:  # a model without weights computes nothing
        return False
    states = torch.linspace(-3, 3, SIZE * len(weight), device=weight.device, dtype=weight.dtype).view(SIZE, -1)
    rounding = max(1e-5, 4 * torch.finfo(weight.dtype).eps)
    with torch.autocast(weight.device.type, enabled=False):
        return torch.allclose(module(states), _forward(module, states), rtol=rounding, atol=rounding)


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length.square() / states.shape[-1] + epsilon)
        context.save_for_backward(states, weight, scale)
        return (states * scale).to(states.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, scale = context.saved_tensors
        weighted = gradient * weight
        mean = (weighted * states).sum(-1, keepdim=True, dtype=torch.float32) / states.shape[-1]
        for_states = (weighted * scale).sub_(states * (scale.pow(3) * mean)).to(states.dtype)
        if not context.needs_input_grad[1]:
            return for_states, None, None
        normalised = (states * scale).to(states.dtype)
        for_weight = (gradient * normalised).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        return for_states, for_weight, None


def _on_processor(rows: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Normalised rows [n, width] and the means of their squares [n]."""
    squares = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).square_().div_(rows.shape[-1])
    scaled = functional.batch_norm(rows[None], torch.zeros_like(squares), squares, None, None, False, 0.0, epsilon)[0]
    return scaled * weight, squares


class _OnProcessor(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        rows = states.reshape(-1, states.shape[-1])
        result, squares = _on_processor(rows, weight, epsilon)
        context.save_for_backward(rows, weight, squares.add_(epsilon).rsqrt_())
        return result.view(states.shape)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scale = context.saved_tensors
        width = rows.shape[-1]
        flat = gradient.reshape(rows.shape).to(rows.dtype)
        zeros, scales = torch.zeros_like(scale)[:, None], scale[:, None]
        # Sums by the kernel, or by a product with the weight, would depend on the number of threads.
        for_states, *_ = torch.ops.aten.native_layer_norm_backward(
            flat, rows, (width,), zeros, scales, weight.float(), None, [True, False, False]
        )
        mean = (flat * weight).sum(-1, keepdim=True, dtype=torch.float32) / width
        for_states.add_((scales * mean).to(flat.dtype))
        if not context.needs_input_grad[1]:
            return for_states.view(gradient.shape), None, None
        normalised = (rows * scales).to(rows.dtype)
        for_weight = (flat * normalised).sum(0, dtype=torch.float32).to(weight.dtype)
        return for_states.view(gradient.shape), for_weight, None
