"""From hidden states to log-probabilities, without ever holding logits for all positions.

Positions go through the language-model head in chunks. A token's log-probability depends on its own hidden state
alone, so the gradient with respect to the states can be computed together with the value, chunk by chunk, and the
logits forgotten: what is kept is one vector a position instead of a row of logits. For a sum of log-probabilities the
same holds for the gradient of the head itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from data.packing import rounded_up

CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Logits computed at once: 8 MiB in float32 stay in a processor's cache."""


def logits_of(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits at hidden states [n, hidden]: [n, vocabulary], float32, scaled or capped as the architecture does."""
    logits: Tensor = model.get_output_embeddings()(states).float()
    config = model.config.get_text_config()
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    if factor := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * factor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


def logprobs_of(model: PreTrainedModel, states: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of `targets` [n] at hidden states [n, hidden]: [n], float32.

    Where the head is trained, a chunk's logits are computed again in the backward pass instead.
    """
    chunks = list(_chunks(model, states, targets))
    if not torch.is_grad_enabled():
        return torch.cat([_logprobs(model, *chunk, temperature) for chunk in chunks])
    if not _trained(model):
        found: Tensor = _WithStateGradients.apply(states, targets, model, temperature)
        return found
    parts = [checkpoint(_logprobs, model, *chunk, temperature, use_reentrant=False) for chunk in chunks]
    return torch.cat(parts)


def summed_logprobs(model: PreTrainedModel, states: Tensor, targets: Tensor) -> Tensor:
    """The sum of the log-probabilities of `targets` [n] at hidden states [n, hidden]: [], float32."""
    if not torch.is_grad_enabled():
        return logprobs_of(model, states, targets).sum()
    found: Tensor = _Summed.apply(states, targets, model, *_trained(model))
    return found


def entropies(model: PreTrainedModel, states: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of the next-token distribution at hidden states [n, hidden]: [n], float32, no gradient."""
    found = []
    with torch.no_grad():
        for some, _ in _chunks(model, states, states):
            logs = functional.log_softmax(_tempered(model, some, temperature), dim=-1)
            found.append(-(logs.exp() * logs).sum(-1))
    return torch.cat(found)


def _chunks(model: PreTrainedModel, states: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and targets of so many positions as are computed at once; one empty chunk where there are none."""
    size = _chunk_size(model, states)
    return zip(states.split(size), targets.split(size), strict=True)


def _chunk_size(model: PreTrainedModel, states: Tensor) -> int:
    logits = CHUNK_LOGITS.get(states.device.type, CHUNK_LOGITS["cuda"])
    return max(1, logits // model.get_output_embeddings().weight.shape[0])


def _differentiated(
    model: PreTrainedModel, states: Tensor, targets: Tensor, temperature: float, trained: Sequence[nn.Parameter] = ()
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of one chunk: its log-probabilities, and the gradients of their sum in the states and in trained parameters.

    With logits l and p = softmax(l), the gradient in l is the target's unit vector less p, which takes l's place.
    On processors a chunk is rounded up by zeros, since products of a new shape are slow there.
    """
    count = len(targets)
    extra = min(rounded_up(count), _chunk_size(model, states)) - count if states.device.type == "cpu" else 0
    with torch.enable_grad():
        leaf = functional.pad(states.detach(), (0, 0, 0, extra)).requires_grad_()
        logits = _tempered(model, leaf, temperature)
    values, gradient = _log_softmax_(logits.detach()[:count], targets), logits.detach()
    gradient[count:] = 0.0
    of_states, *of_trained = torch.autograd.grad(logits, [leaf, *trained], gradient)
    return values, of_states[:count], list(of_trained)


def _log_softmax_(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-softmax of `logits` [n, vocabulary] at `targets` [n]: [n]. The logits become its gradient in them."""
    places = targets[:, None]
    logits.sub_(logits.amax(-1, keepdim=True))
    chosen = logits.gather(1, places)
    total = logits.exp_().sum(-1, keepdim=True)
    logits.div_(-total).scatter_add_(1, places, torch.ones_like(total))
    return (chosen - total.log()).squeeze(1)


def _logprobs(model: PreTrainedModel, states: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return -functional.cross_entropy(_tempered(model, states, temperature), targets, reduction="none")


def _tempered(model: PreTrainedModel, states: Tensor, temperature: float) -> Tensor:
    logits = logits_of(model, states)
    return logits if temperature == 1.0 else logits / temperature


def _trained(model: PreTrainedModel) -> list[nn.Parameter]:
    """The head's parameters that are trained."""
    return [parameter for parameter in model.get_output_embeddings().parameters() if parameter.requires_grad]


class _WithStateGradients(torch.autograd.Function):
    """Log-probabilities under a frozen head; the gradient of each with respect to its state is computed forward."""

    @staticmethod
    def forward(context: Any, states: Tensor, targets: Tensor, model: PreTrainedModel, temperature: float) -> Tensor:
        values, gradients = [], []
        for some, wanted in _chunks(model, states, targets):
            found, of_states, _ = _differentiated(model, some, wanted, temperature)
            values.append(found)
            gradients.append(of_states)
        context.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = context.saved_tensors
        return (gradient[:, None] * gradients).to(gradients.dtype), None, None, None


class _Summed(torch.autograd.Function):
    """The sum of log-probabilities; the gradients of states and head are computed forward."""

    @staticmethod
    def forward(
        context: Any, states: Tensor, targets: Tensor, model: PreTrainedModel, *trained: nn.Parameter
    ) -> Tensor:
        total = torch.zeros((), device=states.device)
        gradients = []
        of_head = [torch.zeros_like(parameter) for parameter in trained]
        for some, wanted in _chunks(model, states, targets):
            found, of_states, of_parameters = _differentiated(model, some, wanted, 1.0, trained)
            total += found.sum()
            gradients.append(of_states)
            for summed, each in zip(of_head, of_parameters, strict=True):
                summed += each
        context.save_for_backward(torch.cat(gradients), *of_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_states, *of_head = context.saved_tensors
        return gradient.to(of_states.dtype) * of_states, None, None, *(gradient * each for each in of_head)
