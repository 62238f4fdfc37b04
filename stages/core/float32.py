"""Compute a model in float32 with the very weights that it has, in whatever precision these are stored.

Rounding in bfloat16 moves a single log-probability of a real model by as much as many a mistake does, and differently
in every layout. What two ways of computing a model have in common shows in float32 alone, where rounding leaves 1e-5.
A layer's weights are widened when it is entered and given back when it is left, so that one layer is held twice and
no more. The base's weights can be rounded to another precision on the way, so that a model loaded in float32 computes
what the same model loaded in bfloat16 does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from pipeline.errors import ConfigError
from stages.core.models import decoder_layers, is_quantized

ADAPTERS = "lora_"
"""Part of the names of an adapter's weights, which are float32 in every run."""


@contextmanager
def in_float32(model: PreTrainedModel, weights: torch.dtype | None = None) -> Iterator[None]:
    """Inside, forward passes without gradients compute in float32, also under an autocast that is entered inside.

    4-bit and 8-bit weights are dequantized for it.

    Args:
        model: The model, with its adapters.
        weights: Precision that the base's weights are rounded to first.
    """
    handles = []
    for module, recurse in _units(model):
        widened = _Widened(module, recurse, weights)
        handles.append(module.register_forward_pre_hook(widened.enter))
        handles.append(module.register_forward_hook(widened.leave, always_call=True))
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _units(model: PreTrainedModel) -> Iterator[tuple[nn.Module, bool]]:
    """Modules whose weights are widened together, and whether those of all modules below belong to them."""
    try:
        layers = decoder_layers(model)
    except ConfigError:  # an adapted layer reads its base's weights without calling the base
        layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    below = {id(module) for layer in layers for module in layer.modules()}
    yield from ((layer, True) for layer in layers)
    yield from ((module, False) for module in model.modules() if id(module) not in below)


class _Widened:
    """The weights of a unit, which are float32 while it computes."""

    def __init__(self, module: nn.Module, recurse: bool, weights: torch.dtype | None) -> None:
        self._module, self._recurse, self._weights = module, recurse, weights
        self._stored: list[tuple[nn.Parameter, Tensor]] = []
        self._quantized: list[nn.Module] = []
        self._precision = ExitStack()

    def enter(self, *_: Any) -> None:
        for name, parameter in self._module.named_parameters(recurse=self._recurse):
            rounded = self._weights is not None and ADAPTERS not in name
            if parameter.is_floating_point() and (rounded or parameter.dtype != torch.float32):
                self._stored.append((parameter, parameter.data))
                parameter.data = parameter.data.to(self._weights if rounded else torch.float32).float()
        for module in self._module.modules() if self._recurse else ():
            if is_quantized(module) and "forward" not in vars(module):
                self._quantized.append(module)
                forward = _in_four_bits if hasattr(module.weight, "quant_state") else _in_eight_bits
                module.forward = MethodType(forward, module)
        device = next(self._module.parameters(), torch.empty(0)).device.type
        self._precision.enter_context(torch.autocast(device, enabled=False))

    def leave(self, *_: Any) -> None:
        self._precision.close()
        for parameter, stored in self._stored:
            parameter.data = stored
        for module in self._quantized:
            del module.forward
        self._stored, self._quantized = [], []


def _in_four_bits(module: Any, states: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    return functional.linear(states.float(), weight, module.bias)


def _in_eight_bits(module: Any, states: Tensor) -> Tensor:
    """Without the rounding of the inputs, which depends on what else is in the batch."""
    state, weight = module.state, module.weight
    integers = weight.data if state.CB is None else state.CB
    scales = weight.SCB if state.SCB is None else state.SCB
    return functional.linear(states.float(), integers.float() * (scales.float() / 127)[:, None], module.bias)
