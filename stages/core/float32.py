"""Compute a model in float32 with the very weights that it has, in whatever precision these are stored.

Rounding in bfloat16 moves a single log-probability of a real model by as much as many a mistake does, and differently
in every layout. What two ways of computing a model have in common shows in float32 alone, where rounding leaves 1e-5.
A layer's weights are widened when it is entered and given back when it is left, so that one layer is held twice and
no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from pipeline.errors import ConfigError
from stages.core.models import decoder_layers, is_quantized


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Inside, forward passes without gradients compute in float32; 4-bit and 8-bit weights are dequantized for it."""
    handles = []
    for module, recurse in _units(model):
        widened = _Widened(module, recurse)
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

    def __init__(self, module: nn.Module, recurse: bool) -> None:
        self._module, self._recurse = module, recurse
        self._narrow: list[tuple[nn.Parameter, Tensor]] = []
        self._quantized: list[nn.Module] = []

    def enter(self, *_: Any) -> None:
        for parameter in self._module.parameters(recurse=self._recurse):
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                self._narrow.append((parameter, parameter.data))
                parameter.data = parameter.data.float()
        for module in self._module.modules() if self._recurse else ():
            if is_quantized(module) and "forward" not in vars(module):
                self._quantized.append(module)
                forward = _in_four_bits if hasattr(module.weight, "quant_state") else _in_eight_bits
                module.forward = MethodType(forward, module)

    def leave(self, *_: Any) -> None:
        for parameter, narrow in self._narrow:
            parameter.data = narrow
        for module in self._quantized:
            del module.forward
        self._narrow, self._quantized = [], []


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
