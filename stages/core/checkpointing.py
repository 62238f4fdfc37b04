"""Gradient checkpointing: decoder layers that forget what they computed and compute it again in the backward pass.

Chen et al. 2016 (arXiv 1604.06174). The library's own acts in train mode only, in which no model with an adapter is
here; this one acts whenever gradients are recorded. Left out: which layers to checkpoint, it is all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stages.core.models import LanguageModel, decoder_layers


def checkpoint_layers(language_model: LanguageModel) -> None:
    """Keep only the inputs of the decoder layers for backward passes, whatever adapters they have or will get.

    The backward pass must run in the role of the forward pass, which `Roles` sees to: a layer computed again without
    its adapter would leave the adapter without a gradient.

    Raises:
        ConfigError: The architecture does not keep its decoder layers in one list.
    """
    config = language_model.model.config.get_text_config()
    for layer in decoder_layers(language_model.model):
        layer.forward = partial(_checkpointed, layer, layer.forward, config)


def _checkpointed(layer: nn.Module, forward: Any, config: Any, *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    attention = config._attn_implementation

    def compute(*inputs: Any) -> Any:
        with _attending(config, attention):
            return forward(*inputs, **options)

    # Only a layer in train mode draws random numbers, which then have to be the same ones again.
    return checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=layer.training)


@contextmanager
def _attending(config: Any, attention: str) -> Iterator[None]:
    """The attention of the forward pass, which may be in place for just as long as that lasts."""
    before = config._attn_implementation
    config._attn_implementation = attention
    try:
        yield
    finally:
        config._attn_implementation = before
