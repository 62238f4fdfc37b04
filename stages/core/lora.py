"""The forward of a LoRA layer, several times cheaper around the matrix products than the general one.

y = x W^T + b + s (x A^T) B^T (Hu et al. 2021, arXiv 2106.09685, eq. 3). Three products forward, five backward, all in
the precision of the frozen weights; nothing is copied to another precision but A and B, and what is kept for the
backward pass is x and x A^T. It serves one plain adapter on an unquantized linear layer; others keep peft's forward.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional


def speed_up(model: nn.Module) -> None:
    """Give the model's LoRA layers on plain linear layers this forward."""
    for module in model.modules():
        if type(module) is Linear and type(module.get_base_layer()) is nn.Linear:
            module.forward = MethodType(_forward, module)


def _forward(layer: Linear, states: Tensor, *arguments: Any, **options: Any) -> Tensor:
    base = layer.get_base_layer()
    if layer.disable_adapters and not layer.merged:
        return base(states)
    role = layer.active_adapters[0]
    if not _is_plain(layer, states, role) or arguments or options:
        return Linear.forward(layer, states, *arguments, **options)
    precision = base.weight.dtype
    found: Tensor = _LowRank.apply(
        states.to(precision),
        base.weight,
        base.bias,
        layer.lora_A[role].weight,
        layer.lora_B[role].weight,
        layer.scaling[role],
    )
    return found


def _is_plain(layer: Linear, states: Tensor, role: str) -> bool:
    """Whether the active adapter is a single one without dropout, variant or bias, on frozen weights."""
    return (
        len(layer.active_adapters) == 1
        and role in layer.lora_A
        and role not in layer.lora_variant
        and not layer.merged
        and layer.lora_B[role].bias is None
        and isinstance(layer.lora_dropout[role], nn.Identity)
        and not layer.get_base_layer().weight.requires_grad
    )


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, states: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            rows = states.flatten(0, -2)
            down_cast, up_cast = down.to(weight.dtype), (up * scaling).to(weight.dtype)
            narrow = rows @ down_cast.T
            result = functional.linear(rows, weight, bias).addmm_(narrow, up_cast.T)
        context.save_for_backward(rows, narrow, weight, down_cast, up_cast)
        context.scaling, context.precision = scaling, down.dtype
        return result.view(*states.shape[:-1], -1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, narrow, weight, down, up = context.saved_tensors
        wide = gradient.flatten(0, -2).to(weight.dtype)
        low = wide @ up
        needed = context.needs_input_grad
        for_states = torch.addmm(wide @ weight, low, down).view(*gradient.shape[:-1], -1) if needed[0] else None
        for_down = (low.T @ rows).to(context.precision) if needed[3] else None
        for_up = (wide.T @ narrow).to(context.precision).mul_(context.scaling) if needed[4] else None
        return for_states, None, None, for_down, for_up, None
