"""Decoder layers below the lowest adapted one: every role computes the same there, so they are computed once.

Where adapters sit on the top layers only (`lora.top_layers`), the states that enter the lowest adapted layer are kept
for each batch of a rollout, and all roles and all passes of updates start from them. That is possible only because the
roles share one base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.batch import Layout, TreeBatch
from data.tree import Tree
from stages.core.forward import hidden_states
from stages.core.models import LanguageModel, decoder_layers
from stages.core.scoring import on_device


class Trunk:
    """The layers of a model below its adapters.

    Attributes:
        depth: How many they are; 0 where every layer is adapted.
    """

    def __init__(self, model: PreTrainedModel, depth: int) -> None:
        self._model, self.depth = model, depth

    @classmethod
    def of(cls, base: LanguageModel, examples: list[Tree], layout: Layout) -> Trunk:
        """The trunk under all adapters that are on the model, or none where states taken up there come out otherwise
        than the whole model's, as with embeddings that are scaled or layers that look at their own number."""
        trunk = cls(base.model, _depth(base.model))
        if trunk.depth == 0 or not examples or not _can_be_cut(base.model):
            return cls(base.model, 0)
        return trunk if trunk._agrees(base, examples, layout) else cls(base.model, 0)

    def states(self, batch: TreeBatch) -> tuple[Tensor, Tensor | None]:
        """Final hidden states as of `hidden_states`, and what entered the lowest adapted layer, [rows, width, hidden]:
        None where every layer is adapted."""
        if self.depth == 0:
            return hidden_states(self._model, batch), None
        kept: list[Tensor] = []
        layer = decoder_layers(self._model)[self.depth]
        handle = layer.register_forward_pre_hook(
            lambda module, given, named: kept.append(given[0] if given else named["hidden_states"]), with_kwargs=True
        )
        try:
            return hidden_states(self._model, batch), kept[0].detach()
        finally:
            handle.remove()

    def resumed(self, batch: TreeBatch, below: Tensor | None) -> Tensor:
        """Final hidden states from what entered the lowest adapted layer; of the whole model without that."""
        if below is None:
            return hidden_states(self._model, batch)
        with self._upper_layers():
            return hidden_states(self._model, batch, below)

    @contextmanager
    def _upper_layers(self) -> Iterator[None]:
        body: Any = self._model.base_model
        layers: nn.ModuleList = body.layers
        body.layers = layers[self.depth :]
        try:
            yield
        finally:
            body.layers = layers

    @torch.no_grad()
    def _agrees(self, base: LanguageModel, examples: list[Tree], layout: Layout) -> bool:
        (batch, *_) = on_device(base, examples[:2], 1 << 30, layout)
        with base.compute.autocast():
            whole, below = self.states(batch)
            return torch.equal(whole, self.resumed(batch, below))


def _depth(model: PreTrainedModel) -> int:
    """Layers below the lowest that carries an adapter."""
    for depth, layer in enumerate(decoder_layers(model)):
        if any(isinstance(module, LoraLayer) for module in layer.modules()):
            return depth
    return 0


def _can_be_cut(model: PreTrainedModel) -> bool:
    """Whether the decoder keeps its layers as most do, all of one kind, so that it can be given the upper ones."""
    if len(set(getattr(model.config.get_text_config(), "layer_types", None) or ())) > 1:
        return False
    layers = getattr(model.base_model, "layers", None)
    return isinstance(layers, nn.ModuleList) and list(layers) == decoder_layers(model)
