"""Attention of one token a row to the keys and values of those before it, as sampling needs it on a processor.

There, torch's fused attention takes two to four times as long as two products in bfloat16. Products copy what does not
lie in one piece; so they go over all the room that a row has, filled or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stages.core import attention
from stages.core.forward import device_of

NAME = "one_token"


@contextmanager
def products(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model that uses fused attention on a processor attends in products where a row has one token."""
    if device_of(model).type != "cpu" or model.config.get_text_config()._attn_implementation != "sdpa":
        yield
        return
    with attention.replaced(model, NAME):
        yield


def one_token_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as `transformers` calls it; fused, where it is of more than one token or another one than the plain.

    Args:
        module: The layer.
        query: [rows, heads, 1, size].
        key: [rows, key heads, width, size], the beginning of a `RoomyLayer`'s; a key head serves as many heads as it
            takes.
        value: [rows, key heads, width, size].
        attention_mask: [rows, 1, 1, width], true where a token is seen; None where all are.
        options: What attentions take.

    Returns:
        [rows, 1, heads, size], and None for the weights.
    """
    keys, values = _whole(key), _whole(value)
    one_kind = query.dtype == key.dtype == value.dtype and (
        attention_mask is None or attention_mask.dtype == torch.bool
    )
    other = options.get("dropout") or any(options.get(name) is not None for name in attention.OTHERWISE)
    if query.shape[2] != 1 or keys is None or values is None or not one_kind or other:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows, key_heads, width, size = key.shape
    scaling = options.get("scaling")
    asking = query * (size**-0.5 if scaling is None else scaling)
    scores = torch.bmm(asking.reshape(rows * key_heads, -1, size), keys.transpose(1, 2))
    scores = scores.view(rows, key_heads, -1, keys.shape[1])
    scores[..., width:] = -torch.inf
    if attention_mask is not None:
        scores[..., :width].masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).view(rows * key_heads, -1, keys.shape[1])
    return torch.bmm(weights, values).view(rows, 1, -1, size), None


def _whole(states: Tensor) -> Tensor | None:
    """[rows x heads, room, size] all of what [rows, heads, width, size] is the beginning of in its third dimension;
    None where that does not lie in one piece."""
    rows, heads, _, size = states.shape
    room = states.stride(1) // size
    in_order = states.stride() == (heads * room * size, room * size, size, 1) and states.storage_offset() == 0
    if not in_order or states.untyped_storage().nbytes() != rows * heads * room * size * states.element_size():
        return None
    return states.as_strided((rows * heads, room, size), (room * size, size, 1))


AttentionInterface.register(NAME, one_token_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
