"""Sampling responses with a key-value cache.

Sampling is from the model's own distribution at the given temperature, with nothing cut off, so that the
log-probabilities that training computes are those of the samples. Other ways to choose tokens are
`stages/core/decoding.py`'s, which hands a processor of logits in here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from data.tree import Branch, Tree
from pipeline.errors import NumericalError
from pipeline.memory import CACHED_TOKENS, ROOM
from stages.core import continuous, lora, one_token
from stages.core.forward import device_of
from stages.core.key_values import make_room, take_rows
from stages.core.likelihood import logits_of

GROWTH = 64
"""Tokens of each row for which room is made at a time."""
COPYING = 2
"""What it costs to copy a row of the cache, which reads and writes it, in steps of a row, which read it."""
REMEDY = "train again from an earlier checkpoint with a lower learning rate, or use dtype=float32"

Backend = Literal["native", "continuous"]

Processor = Callable[[Tensor, Tensor], Tensor]
"""What is done to logits before the temperature: tokens so far [rows, any], logits [rows, vocabulary] -> logits."""


@dataclass(frozen=True)
class Sample:
    """A sampled response: its tokens, the stop token included when it ended its turn.

    Attributes:
        tokens: The response.
        ended: Whether the stop token ended it.
        logprobs: Log-probability of each token under the distribution it was drawn from, temperature applied; of the
            likeliest tokens, which are not drawn, under the distribution at temperature 1.
    """

    tokens: tuple[int, ...]
    ended: bool
    logprobs: tuple[float, ...] = ()

    def __add__(self, rest: Sample) -> Sample:
        """This beginning of a response and the rest of it."""
        return Sample(self.tokens + rest.tokens, rest.ended, self.logprobs + rest.logprobs)


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
    per_prompt: int = 1,
    backend: Backend = "native",
    processor: Processor | None = None,
) -> list[Sample]:
    """Responses to each prompt, in the prompts' order, those to one prompt side by side.

    Prompts of similar length are sampled together; a prompt is computed once for all its responses. Rows that have
    ended leave the batch once they have cost as much as it costs to copy the others. A batch holds `CACHED_TOKENS`
    times `tokens_per_batch` tokens: as many rows as it can hold after the first `ROOM` tokens of each, since most end
    before the longest. Rows for which there is no room later are taken up again once the batch has ended.

    Args:
        model: In the role that is to sample.
        prompts: Tokens of the prompts.
        stop_id: The token that ends a response.
        max_new_tokens: Longest response.
        temperature: Of the distribution; 0 takes the likeliest token each time, the first of several.
        seed: Of the samples; the global generators are left alone.
        tokens_per_batch: Tokens that go through the model at once.
        per_prompt: Responses to each prompt.
        backend: `native`, or `continuous` for the continuous batching of `transformers`, which see; that one samples,
            and from the model's own distribution.
        processor: Changes the distribution.

    Raises:
        ConfigError: The continuous backend does not work with this model or within its memory.
        NumericalError: The model's probabilities are not finite.
    """
    cached_tokens = CACHED_TOKENS * tokens_per_batch
    with lora.held(model):
        if backend == "native":
            source = _Source(model, stop_id, temperature, processor)
            draws = list(_uniform(len(prompts) * per_prompt, max_new_tokens, seed))
            with one_token.products(model):
                return _native(source, prompts, draws, cached_tokens)
        if processor is not None or temperature == 0.0:
            raise ValueError("continuous batching samples from the model's own distribution")
        repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
        found = continuous.generate(
            model,
            repeated,
            stop_id=stop_id,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            cached_tokens=cached_tokens,
            tokens_per_batch=tokens_per_batch,
        )
    return [Sample(tokens, tokens[-1] == stop_id, logprobs) for tokens, logprobs in found]


def _native(
    source: _Source, prompts: Sequence[tuple[int, ...]], draws: Sequence[Tensor], cached_tokens: int
) -> list[Sample]:
    """A response for each of `draws`, its uniform numbers, of which it takes one a token; so it does not depend on what
    is sampled together with it. Each prompt gets equally many."""
    per_prompt = len(draws) // max(1, len(prompts))
    samples: dict[int, Sample] = {}
    begun = dict.fromkeys(range(len(prompts)), 0)
    for chosen, copies in together(prompts, min(ROOM, max(map(len, draws), default=0)), cached_tokens, per_prompt):
        places = [index * per_prompt + begun[index] + copy for index in chosen for copy in range(copies)]
        batch = _Batch(source, [prompts[index] for index in chosen], [draws[place] for place in places])
        samples.update(zip(places, batch.run(cached_tokens), strict=True))
        begun.update((index, begun[index] + copies) for index in chosen)
    put_back = [place for place, each in samples.items() if not each.ended and len(each.tokens) < len(draws[place])]
    if put_back:
        so_far = [prompts[place // per_prompt] + samples[place].tokens for place in put_back]
        further = [draws[place][len(samples[place].tokens) :] for place in put_back]
        for place, rest in zip(put_back, _native(source, so_far, further, cached_tokens), strict=True):
            samples[place] += rest
    return [samples[place] for place in range(len(draws))]


def _uniform(responses: int, tokens: int, seed: int) -> Tensor:
    """Uniform numbers [responses, tokens], the same on every device."""
    return torch.rand((responses, tokens), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    prompt: tuple[int, ...],
    *,
    stop_id: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    processor: Processor | None = None,
) -> Iterator[int]:
    """The tokens of one response as they come: those of the `Sample` that `sample` gives for this prompt alone.

    The model has to stay in its role from the first token to the last.
    """
    source = _Source(model, stop_id, temperature, processor)
    with lora.held(model), one_token.products(model):
        batch = _Batch(source, [prompt], list(_uniform(1, max_new_tokens, seed)))
        for _ in batch.steps():
            yield batch.tokens[0][-1]


def together(
    prompts: Sequence[tuple[int, ...]], room: int, cached_tokens: int, per_prompt: int
) -> Iterator[tuple[list[int], int]]:
    """Prompts that are sampled together, and how many responses each of them gets.

    With `room` more tokens each, rows of one width take at most `cached_tokens`; but there always is one.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    start = 0
    for stop in range(1, len(order) + 1):
        if stop < len(order) and (stop + 1 - start) * per_prompt * (len(prompts[order[stop]]) + room) <= cached_tokens:
            continue
        widest = len(prompts[order[stop - 1]]) + room
        copies = max(1, min(cached_tokens // widest, per_prompt))
        for done in range(0, per_prompt, copies):
            yield order[start:stop], min(copies, per_prompt - done)
        start = stop


def padded_with_own(prompts: Sequence[tuple[int, ...]]) -> Tensor:
    """Prompts filled up on the left with tokens of their own, so that each holds the same tokens as before."""
    width = max(map(len, prompts))
    return torch.tensor([[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts])


def not_finite(model: PreTrainedModel) -> NumericalError:
    """The error of a model that gives no probabilities."""
    what = "the probabilities of the next token are not finite"
    return NumericalError(what, where=type(model).__name__, hint=REMEDY)


def trees_of(prompts: Sequence[tuple[int, ...]], samples: Sequence[Sample]) -> list[Tree]:
    """Each prompt with its responses, of which equally many stand side by side, numbered by position."""
    count = len(samples) // max(1, len(prompts))
    branches = [Branch.of(each.tokens) for each in samples]
    return [
        Tree(prompt, tuple(branches[number * count : (number + 1) * count]), number)
        for number, prompt in enumerate(prompts)
    ]


@dataclass(frozen=True)
class _Source:
    """What all batches of a call sample from, and how."""

    model: PreTrainedModel
    stop_id: int
    temperature: float
    processor: Processor | None


class _Batch:
    """Rows that are sampled together: left-padded prompts, one cache, and the rows still alive.

    Up to the first step there is one row a prompt, then as many as it gets responses.
    """

    def __init__(self, source: _Source, prompts: Sequence[tuple[int, ...]], draws: Sequence[Tensor]) -> None:
        self.source, self.copies = source, len(draws) // len(prompts)
        device = device_of(source.model)
        self.limits = [len(numbers) for numbers in draws]
        self.draws = nn.utils.rnn.pad_sequence(list(draws)).to(device)  # [tokens, rows]
        self.width = width = max(len(prompt) for prompt in prompts)
        padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self.step_tokens = torch.tensor(padded, device=device)
        self.mask = torch.tensor(real, device=device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.history = None if source.processor is None else padded_with_own(prompts).to(device)
        self.cache = DynamicCache(config=source.model.config)
        self.alive = list(range(len(draws)))
        self.tokens: list[list[int]] = [[] for _ in self.alive]
        self.logprobs: list[list[float]] = [[] for _ in self.alive]
        self.ended = [False for _ in self.alive]
        self.wasted_steps = 0

    def run(self, cached_tokens: int) -> list[Sample]:
        """Sample until every row has ended, is full or had to leave, since all rows take at most `cached_tokens`."""
        for _ in self.steps(cached_tokens):
            pass
        rows = zip(self.tokens, self.ended, self.logprobs, strict=True)
        return [Sample(tuple(tokens), ended, tuple(logprobs)) for tokens, ended, logprobs in rows]

    def steps(self, cached_tokens: int = 0) -> Iterator[None]:
        """Sample token by token; every row that is left has one more after each. One row always is."""
        longest = max(self.limits)
        logits = self._prefill(min(GROWTH, longest))
        for count in range(1, longest + 1):
            following = self._sample(logits, count - 1)
            yield
            done = [self._is_done(row) for row in self.alive]
            if all(done):
                break
            self._advance(following, done)
            if count % GROWTH == 0:
                self._grow(min(GROWTH, longest - count), cached_tokens)
            logits = self._logits()

    def _is_done(self, row: int) -> bool:
        return self.ended[row] or len(self.tokens[row]) == self.limits[row]

    def _prefill(self, room: int) -> Tensor:
        """Compute the prompts and make a row of each response; logits of the first tokens [rows, vocabulary]."""
        logits = self._logits()
        if self.copies > 1:
            rows = torch.arange(len(logits), device=logits.device).repeat_interleave(self.copies)
            self._take(rows)
            logits = logits.index_select(0, rows)
        self._make_room(room)
        return logits

    def _logits(self) -> Tensor:
        output = self.source.model.base_model(
            input_ids=self.step_tokens,
            attention_mask=self.mask[:, : self.width],
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return logits_of(self.source.model, output.last_hidden_state[:, -1])

    def _sample(self, logits: Tensor, place: int) -> Tensor:
        """Choose every row's next token [rows], at this place of its response; it counts for the rows that go on."""
        source = self.source
        if source.processor is not None:
            assert self.history is not None
            logits = source.processor(self.history, logits)
        greedy = source.temperature == 0.0
        chances = torch.softmax(logits if greedy or source.temperature == 1.0 else logits / source.temperature, dim=-1)
        # Softmax may round two logits to one probability.
        drawn = logits.argmax(-1, keepdim=True) if greedy else _drawn(chances, self.draws[place, self.alive])
        logprobs = chances.gather(1, drawn).log_().flatten()
        following = drawn.flatten()
        if not logprobs.isfinite().all():
            raise not_finite(source.model)
        for row, token, logprob in zip(self.alive, following.tolist(), logprobs.tolist(), strict=True):
            if not self._is_done(row):
                self.tokens[row].append(token)
                self.logprobs[row].append(logprob)
                self.ended[row] = token == source.stop_id
        return following

    def _advance(self, following: Tensor, done: list[bool]) -> None:
        self.step_tokens = following[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.width += 1
        if self.history is not None:
            self.history = torch.cat((self.history, self.step_tokens), dim=1)
        self.wasted_steps += sum(done)
        if self.wasted_steps < COPYING * (len(done) - sum(done)):
            return
        self._keep([place for place, finished in enumerate(done) if not finished])

    def _grow(self, room: int, cached_tokens: int) -> None:
        """Make room for so many more tokens of each row, and let rows leave until all take what they may."""
        going_on = [place for place, row in enumerate(self.alive) if not self._is_done(row)]
        self._keep(going_on[: max(1, cached_tokens // (self.width + room))])
        self._make_room(room)

    def _make_room(self, room: int) -> None:
        make_room(self.cache, room)
        self.mask = functional.pad(self.mask, (0, room), value=1)

    def _keep(self, places: list[int]) -> None:
        self.wasted_steps = 0
        if len(places) == len(self.alive):
            return
        self.alive = [self.alive[place] for place in places]
        self._take(torch.tensor(places, device=self.mask.device))

    def _take(self, rows: Tensor) -> None:
        """Go on with these rows."""
        take_rows(self.cache, rows)
        self.step_tokens, self.positions, self.mask = (
            each.index_select(0, rows) for each in (self.step_tokens, self.positions, self.mask)
        )
        if self.history is not None:
            self.history = self.history.index_select(0, rows)


def _drawn(chances: Tensor, uniform: Tensor) -> Tensor:
    """A draw from each row of probabilities [rows, n], by a uniform number each [rows]: [rows, 1].

    It is the token at which the sum of probabilities passes that number.
    """
    sums = chances.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True).clamp_(max=chances.shape[1] - 1)
