"""How people choose the tokens of a response: greedy, temperature, top-k, top-p, min-p, repetition penalty, beams.

The changes to a distribution, their order, and beam search are those of `transformers`. Training samples by
`stages/core/rollout.py` alone, from the model's own distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.config import Decoding
from pipeline.memory import CACHED_TOKENS
from stages.core import lora, rollout
from stages.core.forward import device_of
from stages.core.rollout import Sample


def decode(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    decoding: Decoding,
    *,
    stop_id: int,
    max_new_tokens: int,
    seed: int,
    tokens_per_batch: int,
    per_prompt: int = 1,
) -> list[Sample]:
    """Responses to each prompt, in the prompts' order, those to one prompt side by side.

    Args:
        model: In the role that is to answer.
        prompts: Tokens of the prompts.
        decoding: How tokens are chosen.
        stop_id: The token that ends a response.
        max_new_tokens: Longest response.
        seed: Of the samples; the global generators are left alone.
        tokens_per_batch: Tokens that go through the model at once; bounds memory.
        per_prompt: Responses to each prompt; all the same where nothing is random.

    Raises:
        NumericalError: The model's probabilities are not finite.
    """
    if decoding.beams > 1:
        found = _beam_search(model, prompts, decoding, stop_id, max_new_tokens, CACHED_TOKENS * tokens_per_batch)
        return [each for each in found for _ in range(per_prompt)]
    return rollout.sample(
        model,
        prompts,
        stop_id=stop_id,
        max_new_tokens=max_new_tokens,
        seed=seed,
        tokens_per_batch=tokens_per_batch,
        per_prompt=per_prompt,
        **_choice(decoding),
    )


def stream(
    model: PreTrainedModel,
    prompt: tuple[int, ...],
    decoding: Decoding,
    *,
    stop_id: int,
    max_new_tokens: int,
    seed: int,
) -> Iterator[int]:
    """The tokens that `decode` gives for one prompt, as they come; from beams, which know them at the end, all at once.

    The model has to stay in its role from the first token to the last.
    """
    if decoding.beams > 1:
        (found,) = _beam_search(model, [prompt], decoding, stop_id, max_new_tokens, cached_tokens=1)
        yield from found.tokens
        return
    options: dict[str, Any] = {"stop_id": stop_id, "max_new_tokens": max_new_tokens, "seed": seed}
    yield from rollout.stream(model, prompt, **options, **_choice(decoding))


def processors(decoding: Decoding) -> LogitsProcessorList:
    """What is done to the logits before a token is drawn at temperature 1, or the likeliest one is taken."""
    found = LogitsProcessorList()
    if decoding.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.temperature not in (0.0, 1.0):
        found.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k is not None:
        found.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1.0:
        found.append(TopPLogitsWarper(decoding.top_p))
    if decoding.min_p > 0.0:
        found.append(MinPLogitsWarper(decoding.min_p))
    return found


def _choice(decoding: Decoding) -> dict[str, Any]:
    """The same in the words of `rollout`."""
    return {"temperature": 1.0 if decoding.is_random else 0.0, "processor": processors(decoding) or None}


@torch.no_grad()
def _beam_search(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    decoding: Decoding,
    stop_id: int,
    max_new_tokens: int,
    cached_tokens: int,
) -> list[Sample]:
    """One response to each prompt; the library tells no log-probability of its tokens."""
    config = GenerationConfig(
        do_sample=False,
        num_beams=decoding.beams,
        repetition_penalty=decoding.repetition_penalty,
        length_penalty=1.0,
        early_stopping=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_id,
        pad_token_id=stop_id,
    )
    found: dict[int, Sample] = {}
    with lora.held(model), _nothing_but(model, config):
        for chosen, _ in rollout.together(prompts, max_new_tokens, cached_tokens // decoding.beams, 1):
            responses = _generated(model, [prompts[index] for index in chosen], config)
            found |= {index: _sample(tokens, stop_id) for index, tokens in zip(chosen, responses, strict=True)}
    return [found[index] for index in range(len(prompts))]


@contextmanager
def _nothing_but(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """What a model's `generation_config.json` asks for has no say: `transformers` would add it to what is given."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


def _generated(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], config: GenerationConfig) -> list[list[int]]:
    """The new tokens of each prompt, filled up to the same length."""

    def checked(tokens: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise rollout.not_finite(model)
        return scores

    padded, device = rollout.padded_with_own(prompts), device_of(model)
    width = padded.shape[1]
    real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    generate: Any = model.generate
    tokens = generate(
        padded.to(device),
        attention_mask=torch.tensor(real, device=device),
        generation_config=config,
        logits_processor=LogitsProcessorList([checked]),
    )
    responses: list[list[int]] = tokens[:, width:].tolist()
    return responses


def _sample(tokens: list[int], stop_id: int) -> Sample:
    """A response without what stands behind its stop token."""
    ended = stop_id in tokens
    return Sample(tuple(tokens[: tokens.index(stop_id) + 1] if ended else tokens), ended)
