"""The one forward: hidden states of a batch, and log-probabilities of the tokens that are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.batch import TreeBatch
from stages.core import attention
from stages.core.likelihood import logprobs_of, summed_logprobs


def hidden_states(model: PreTrainedModel, batch: TreeBatch, embedded: Tensor | None = None) -> Tensor:
    """Final hidden states of a batch, flattened: [rows * width, hidden].

    Args:
        model: The model.
        batch: The batch.
        embedded: [rows, width, hidden] what stands in the place of the tokens' embeddings.
    """
    inputs: dict[str, Any] = {"position_ids": batch.positions, "use_cache": False}
    inputs |= {"input_ids": batch.tokens} if embedded is None else {"inputs_embeds": embedded}
    if batch.packing is None:
        output = model.base_model(**inputs, attention_mask=_mask(model, batch))
    else:
        with attention.replaced(model):
            output = model.base_model(**inputs, packing=batch.packing)
    states: Tensor = output.last_hidden_state.flatten(0, 1)
    return states


def _mask(model: PreTrainedModel, batch: TreeBatch) -> Tensor | None:
    """The mask as the model takes it: attention that is not fused, as with capped scores, adds it to them."""
    if batch.mask is None or model.config.get_text_config()._attn_implementation != "eager":
        return batch.mask
    lowest = torch.finfo(model.dtype).min
    return torch.zeros_like(batch.mask, dtype=model.dtype).masked_fill_(~batch.mask, lowest)


def token_logprobs(model: PreTrainedModel, batch: TreeBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability of every read token given what precedes it on its path: [reads], float32."""
    states = hidden_states(model, batch).index_select(0, batch.sources)
    return logprobs_of(model, states, batch.targets, temperature)


def summed_token_logprobs(model: PreTrainedModel, batch: TreeBatch) -> Tensor:
    """The sum of `token_logprobs`: []. Cheaper than summing them where the head is trained."""
    states = hidden_states(model, batch).index_select(0, batch.sources)
    return summed_logprobs(model, states, batch.targets)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model computes."""
    return next(model.parameters()).device
