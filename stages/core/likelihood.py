"""From hidden states to log-probabilities, without ever holding logits for all positions.

Positions go through the language-model head in chunks. A token's log-probability depends on its own hidden state
alone, so the gradient with respect to the states can be computed together with the value, chunk by chunk, and the
logits forgotten: what is kept is one vector a position instead of a row of logits. For a sum of log-probabilities the
same holds for the gradient of the head itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from data.packing import rounded_up
from pipeline.memory import CHUNK_LOGITS


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
        # The very numbers that training adapters computes: a policy that equals its reference has ratio 1 to it.
        return torch.cat([_Chunk(model, *chunk, temperature).values for chunk in chunks])
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


@torch.no_grad()
def logprobs_and_entropies(
    model: PreTrainedModel, states: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`logprobs_of`, and the entropy in nats of the distributions that `targets` are of: [n] each, no gradient."""
    chunks = [_Chunk(model, *each, temperature, entropy=True) for each in _chunks(model, states, targets)]
    return torch.cat([each.values for each in chunks]), torch.cat([each.entropies for each in chunks])


def _chunks(model: PreTrainedModel, states: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and targets of so many positions as are computed at once; one empty chunk where there are none."""
    size = _chunk_size(model, states)
    return zip(states.split(size), targets.split(size), strict=True)


def _chunk_size(model: PreTrainedModel, states: Tensor) -> int:
    logits = CHUNK_LOGITS.get(states.device.type, CHUNK_LOGITS["cuda"])
    return max(1, logits // model.get_output_embeddings().weight.shape[0])


def _rounded(model: PreTrainedModel, states: Tensor) -> Tensor:
    """A chunk's states with zeros behind, where the head's product is slow for a new shape (see `data.packing`)."""
    precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else states.dtype
    if states.device.type != "cpu" or precision != torch.bfloat16:
        return states
    whole = min(rounded_up(len(states)), _chunk_size(model, states))
    return functional.pad(states, (0, 0, 0, whole - len(states)))


class _Chunk:
    """One chunk's log-probabilities [n], and the gradients of their sum, computed in the place of the logits.

    With logits l and p = softmax(l), the gradient in l is the target's unit vector less p. What the head returns is
    changed, so nobody else may keep it.
    """

    entropies: Tensor

    def __init__(
        self, model: PreTrainedModel, states: Tensor, targets: Tensor, temperature: float, *, entropy: bool = False
    ) -> None:
        self._count = len(targets)
        with torch.enable_grad():
            self._states = _rounded(model, states.detach()).requires_grad_()
            self._logits = _tempered(model, self._states, temperature)
        self._targets = targets[:, None]
        logits = self._logits.detach()
        self._exponentials = logits.sub_(logits.amax(-1, keepdim=True))[: self._count]
        chosen = self._exponentials.gather(1, self._targets)
        # An impossible token's -inf times its chance of 0 would be NaN.
        exponents = self._exponentials.clamp(min=-1e4) if entropy else None
        self._total = self._exponentials.exp_().sum(-1, keepdim=True)
        self.values = (chosen - self._total.log()).squeeze(1)
        if exponents is not None:
            weighted = torch.linalg.vecdot(self._exponentials, exponents)[:, None]
            self.entropies = (self._total.log() - weighted / self._total).squeeze(1)

    def gradients(self, *trained: nn.Parameter) -> tuple[Tensor, ...]:
        """In the states [n, hidden] and in trained parameters; can be asked for once."""
        gradient = self._logits.detach()
        self._exponentials.div_(-self._total).scatter_add_(1, self._targets, torch.ones_like(self._total))
        gradient[self._count :] = 0.0
        of_states, *of_trained = torch.autograd.grad(self._logits, [self._states, *trained], gradient)
        return of_states[: self._count], *of_trained


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
            chunk = _Chunk(model, some, wanted, temperature)
            values.append(chunk.values)
            gradients.append(chunk.gradients()[0])
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
            chunk = _Chunk(model, some, wanted, 1.0)
            total += chunk.values.sum()
            of_states, *of_parameters = chunk.gradients(*trained)
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
