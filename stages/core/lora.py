"""The forward of a LoRA layer with less work around the matrix products than the general one has.

y = x W^T + b + s (x A^T) B^T (Hu et al. 2021, arXiv 2106.09685, eq. 3). Three products forward, five backward, all in
the precision of the frozen weights; nothing is copied to another precision but A and B, and what is kept for the
backward pass is x and x A^T. It serves one plain adapter on an unquantized linear layer; others keep peft's forward,
but that sampling from a quantized base under autocast takes the same three products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from stages.core.models import is_quantized


def speed_up(model: nn.Module) -> None:
    """Give the model's LoRA layers on plain linear layers this forward."""
    for layer in _layers(model):
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Inside, the adapters in use stay as they are and no gradient is asked for: their matrices are cast once, and a
    call, as for every token that is sampled, looks for nothing. The numbers are the same; on quantized layers, up to
    rounding."""
    plain = [layer for layer in _layers(model) if "forward" in vars(layer) and _is_plain(layer)]
    quantized = [layer for layer in _quantized_layers(model) if _is_alone(layer)]
    before = [(layer, vars(layer).get("forward")) for layer in (*plain, *quantized)]
    for layer in plain:
        layer.forward = _held_forward(layer)  # type: ignore[method-assign, assignment]
    for layer in quantized:
        layer.forward = _held_quantized_forward(layer)
    try:
        yield
    finally:
        for layer, forward in before:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _layers(model: nn.Module) -> list[Linear]:
    return [
        module for module in model.modules() if type(module) is Linear and type(module.get_base_layer()) is nn.Linear
    ]


def _quantized_layers(model: nn.Module) -> list[Any]:
    """LoRA layers on layers of bitsandbytes, where autocast says in which precision the adapter computes."""
    found: list[Any] = [each for each in model.modules() if isinstance(each, LoraLayer)]
    bases = [each.get_base_layer() for each in found]
    return [
        layer
        for layer, base in zip(found, bases, strict=True)
        if is_quantized(base) and torch.is_autocast_enabled(base.weight.device.type)
    ]


def _held_quantized_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    (role,) = layer.active_adapters
    base, scaling = layer.base_layer, layer.scaling[role]
    precision = torch.get_autocast_dtype(base.weight.device.type)
    down, up = (each[role].weight.to(precision) for each in (layer.lora_A, layer.lora_B))

    def forward(states: Tensor) -> Tensor:
        if states.dtype != precision:
            return type(layer).forward(layer, states)
        rows = states.reshape(-1, base.in_features)
        result: Tensor = base(rows)
        return result.addmm_(rows @ down.T, up.T, alpha=scaling).view(*states.shape[:-1], base.out_features)

    return forward


def _held_forward(layer: Linear) -> Callable[[Tensor], Tensor]:
    (role,) = layer.active_adapters
    base: Any = layer.base_layer
    weight, bias, scaling = base.weight, base.bias, layer.scaling[role]
    adapter: Any = layer
    down, up = (each[role].weight.to(weight.dtype) for each in (adapter.lora_A, adapter.lora_B))
    outputs, inputs = weight.shape

    def forward(states: Tensor) -> Tensor:
        nonlocal down, up
        if down.dtype != weight.dtype:  # weights are widened when a layer is computed in float32
            down, up = (each[role].weight.to(weight.dtype) for each in (adapter.lora_A, adapter.lora_B))
        rows = states.to(weight.dtype).reshape(-1, inputs)
        result, _ = _result(rows, weight, bias, down, up, scaling)
        return result.view(*states.shape[:-1], outputs)

    return forward


def _forward(layer: Linear, states: Tensor, *arguments: Any, **options: Any) -> Tensor:
    if arguments or options or not _is_plain(layer):
        return Linear.forward(layer, states, *arguments, **options)
    (role,) = layer.active_adapters
    base: Any = layer.base_layer
    down: Any = layer.lora_A[role].weight
    up: Any = layer.lora_B[role].weight
    weight = base.weight
    states = states.to(weight.dtype)
    if torch.is_grad_enabled():
        found: Tensor = _LowRank.apply(states, weight, base.bias, down, up, layer.scaling[role])
        return found
    rows = states.reshape(-1, weight.shape[1])
    result, _ = _result(rows, weight, base.bias, down.to(weight.dtype), up.to(weight.dtype), layer.scaling[role])
    return result.view(*states.shape[:-1], weight.shape[0])


def _is_plain(layer: Linear) -> bool:
    """Whether a single plain adapter is active beside weights that are frozen."""
    base: Any = layer.base_layer
    trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    return _is_alone(layer) and not trained and _computes_in(base.weight.dtype, base.weight.device.type)


def _is_alone(layer: Any) -> bool:
    """Whether a single adapter is active, without dropout, variant or bias."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (role,) = layer.active_adapters
    return (
        role in layer.lora_A
        and role not in layer.lora_variant
        and layer.lora_B[role].bias is None
        and isinstance(layer.lora_dropout[role], nn.Identity)
    )


def _computes_in(precision: torch.dtype, device: str) -> bool:
    """Whether products are in this precision: autocast may want another."""
    return not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == precision


def _result(
    rows: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The layer's output for rows [n, inputs], and what is between the adapter's matrices [n, rank]."""
    # Everything has one precision already, so that autocast finds nothing to convert.
    narrow = rows @ down.T
    return functional.linear(rows, weight, bias).addmm_(narrow, up.T, alpha=scaling), narrow


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, states: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        rows, down_cast, up_cast = states.reshape(-1, weight.shape[1]), down.to(weight.dtype), up.to(weight.dtype)
        result, narrow = _result(rows, weight, bias, down_cast, up_cast, scaling)
        context.save_for_backward(rows, narrow, weight, down_cast, up_cast)
        context.scaling, context.precision = scaling, down.dtype
        return result.view(*states.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, narrow, weight, down, up = context.saved_tensors
        scaling, needed = context.scaling, context.needs_input_grad
        wide = gradient.reshape(-1, weight.shape[0]).to(weight.dtype)
        low = wide @ up
        for_states = for_down = for_up = None
        if needed[0]:
            for_states = (wide @ weight).addmm_(low, down, alpha=scaling).view(*gradient.shape[:-1], weight.shape[1])
        if needed[3]:
            for_down = (low.T @ rows).to(context.precision).mul_(scaling)
        if needed[4]:
            for_up = (wide.T @ narrow).to(context.precision).mul_(scaling)
        return for_states, None, None, for_down, for_up, None
