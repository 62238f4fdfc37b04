"""Keys and values with room for the tokens to come, so that a step of sampling copies no more than its own token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """What one attention layer keeps of the tokens so far: keys and values [rows, heads, width, size], of which the
    first `length` places are taken."""

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.is_initialized = True
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.length = layer.get_seq_length()
        self.keys, self.values = (_extended(states[:, :, : self.length], room) for states in (layer.keys, layer.values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write further tokens down; returns the keys and values of all so far."""
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Consist of these rows, in this order, copying no more than the tokens so far."""
        self.keys, self.values = (self._taken(states, beam_idx) for states in (self.keys, self.values))

    def _taken(self, states: Tensor, rows: Tensor) -> Tensor:
        so_far = states[:, :, : self.length].index_select(0, rows.to(self.device))
        return _extended(so_far, states.shape[2] - self.length)

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length


def make_room(cache: DynamicCache, room: int) -> None:
    """Give a cache room for `room` more tokens; layers that hold something else than plain keys and values, such as
    windows or recurrent states, stay as they are."""
    for place, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer) and type(layer) in (DynamicLayer, RoomyLayer):
            cache.layers[place] = RoomyLayer(layer, room)


def take_rows(cache: Any, rows: Tensor) -> None:
    """Let a cache consist of these of its rows, in this order; a row may be taken several times or not at all."""
    # The one way that all layers know, those with recurrent states too; a beam's rows are chosen like that.
    cache.reorder_cache(rows)


def _extended(states: Tensor, room: int) -> Tensor:
    rows, heads, length, size = states.shape
    extended = states.new_zeros(rows, heads, length + room, size)  # products go over all of it, with weights of 0
    extended[:, :, :length] = states
    return extended
