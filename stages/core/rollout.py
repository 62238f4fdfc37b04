"""Sampling responses with a key-value cache.

Sampling is from the model's own distribution at the given temperature, with nothing cut off, so that the
log-probabilities that training computes are those of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from data.tree import Branch, Tree
from stages.core.forward import device_of
from stages.core.likelihood import logits_of

CACHED_TOKENS = 8


@dataclass(frozen=True)
class Sample:
    """A sampled response: its tokens, the stop token included when it ended its turn."""

    tokens: tuple[int, ...]
    ended: bool


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    *,
    stop_id: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    tokens_per_batch: int,
) -> list[Sample]:
    """One response to each prompt, in the prompts' order.

    Prompts of similar length are sampled together; rows leave the batch in bulk once half of them have ended. A batch
    holds `CACHED_TOKENS` times `tokens_per_batch` tokens: keys and values take that much less than activations.
    """
    generator = torch.Generator(device_of(model)).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    widest = max(map(len, prompts), default=0) + max_new_tokens
    rows_per_batch = max(1, CACHED_TOKENS * tokens_per_batch // widest)
    found: dict[int, Sample] = {}
    for start in range(0, len(order), rows_per_batch):
        chosen = order[start : start + rows_per_batch]
        batch = _Batch(model, [prompts[index] for index in chosen], stop_id, temperature, generator)
        found.update(zip(chosen, batch.run(max_new_tokens), strict=True))
    return [found[index] for index in range(len(prompts))]


def trees_of(prompts: Sequence[tuple[int, ...]], samples: Sequence[Sample]) -> list[Tree]:
    """Each prompt with its responses, of which equally many stand side by side, numbered by position."""
    count = len(samples) // max(1, len(prompts))
    branches = [Branch.of(each.tokens) for each in samples]
    return [
        Tree(prompt, tuple(branches[number * count : (number + 1) * count]), number)
        for number, prompt in enumerate(prompts)
    ]


class _Batch:
    """Rows that are sampled together: left-padded prompts, one cache, and the rows still alive."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[tuple[int, ...]],
        stop_id: int,
        temperature: float,
        generator: torch.Generator,
    ) -> None:
        self.model, self.stop_id, self.temperature, self.generator = model, stop_id, temperature, generator
        width = max(len(prompt) for prompt in prompts)
        padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self.step_tokens = torch.tensor(padded, device=generator.device)
        self.mask = torch.tensor(real, device=generator.device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.alive = torch.arange(len(prompts), device=generator.device)
        self.cache = DynamicCache(config=model.config)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.ended = [False] * len(prompts)

    def run(self, max_new_tokens: int) -> list[Sample]:
        """Sample until every row has ended or is full."""
        for count in range(max_new_tokens):
            following = self._sample(self._logits())
            done = self._note(following)
            if all(done) or count + 1 == max_new_tokens:
                break
            self._advance(following, done)
        return [Sample(tuple(tokens), ended) for tokens, ended in zip(self.tokens, self.ended, strict=True)]

    def _logits(self) -> Tensor:
        output = self.model.base_model(
            input_ids=self.step_tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return logits_of(self.model, output.last_hidden_state[:, -1])

    def _sample(self, logits: Tensor) -> Tensor:
        chances = torch.softmax(logits / self.temperature, dim=-1)
        return torch.multinomial(chances, 1, generator=self.generator).squeeze(1)

    def _note(self, following: Tensor) -> list[bool]:
        for row, token in zip(self.alive.tolist(), following.tolist(), strict=True):
            if not self.ended[row]:
                self.tokens[row].append(token)
                self.ended[row] = token == self.stop_id
        return [self.ended[row] for row in self.alive.tolist()]

    def _advance(self, following: Tensor, done: list[bool]) -> None:
        self.step_tokens = following[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        if 2 * sum(done) < len(done):
            return
        kept = torch.tensor([row for row, finished in enumerate(done) if not finished], device=self.mask.device)
        self.cache.batch_select_indices(kept)
        self.step_tokens, self.positions = self.step_tokens[kept], self.positions[kept]
        self.mask, self.alive = self.mask[kept], self.alive[kept]
