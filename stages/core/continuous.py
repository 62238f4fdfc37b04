"""Sampling by the continuous batching of `transformers`: a response that ends makes place for another one at once.

Keys and values lie in pages. Nothing is shared between requests and nothing is kept from one call to the next, so that
none of it is of older weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from pipeline.errors import ConfigError
from stages.core.forward import device_of

PAGE = 256
"""Tokens of a page, as both the library and flash attention have it by default."""
MEMORY = 0.4
"""The share of free memory that pages may take."""

Response = tuple[tuple[int, ...], tuple[float, ...]]
"""Tokens and their log-probabilities."""


def generate(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    *,
    stop_id: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    tokens_per_batch: int,
    cached_tokens: int,
) -> list[Response]:
    """One response to each prompt, in the prompts' order.

    The library computes a prompt that is given several times anew each time, and draws from the device's global
    generator, which is as before afterwards. The same seed gives the same samples where requests are put together in
    the same way: it does for the same prompts and settings on a processor, but does not promise to. It computes in a
    thread of its own, which autocast does not reach: weights have to be in the precision to compute in.

    Args:
        model: With the role in use that is to sample.
        prompts: Tokens of the prompts.
        stop_id: The token that ends a response.
        max_new_tokens: Longest response.
        temperature: Of the distribution, from which nothing is cut off.
        seed: Of the samples.
        tokens_per_batch: Tokens that go through the model at once.
        cached_tokens: Tokens whose keys and values are kept at once, where no single response needs more.

    Raises:
        ConfigError: The library does not support the model's attention, the memory does not suffice, or a request
            failed.
    """
    if not prompts:
        return []
    _require_attention(model)
    device = device_of(model)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            generate_batch: Any = model.generate_batch
            outputs = generate_batch(
                [list(prompt) for prompt in prompts],
                generation_config=_distribution(stop_id, max_new_tokens, temperature),
                continuous_batching_config=_batching(
                    seed,
                    _pages(prompts, max_new_tokens, cached_tokens),
                    min(tokens_per_batch, sum(map(len, prompts))),  # masks grow with its square
                ),
                progress_bar=False,
                persistent_manager=False,
            )
    except (MemoryError, ValueError) as error:
        raise _failure(len(prompts), len(prompts), str(error)) from error
    return _checked(outputs, len(prompts))


def _pages(prompts: Sequence[tuple[int, ...]], max_new_tokens: int, cached_tokens: int) -> int:
    """Pages for `cached_tokens`, for no more than all responses need, and for at least the longest one."""
    needed = [-(-(len(prompt) + max_new_tokens) // PAGE) + 1 for prompt in prompts]
    return max(min(-(-cached_tokens // PAGE), sum(needed)), max(needed))


def _distribution(stop_id: int, max_new_tokens: int, temperature: float) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=stop_id,
        max_new_tokens=max_new_tokens,
    )


def _batching(seed: int, pages: int, batch_tokens: int) -> ContinuousBatchingConfig:
    options: dict[str, Any] = {
        "num_blocks": pages,
        "max_batch_tokens": batch_tokens,
        "max_memory_percent": MEMORY,
        "allow_block_sharing": False,
        "return_logprobs": True,
        "seed": seed,
        "auto_switch_to_flash": False,  # unknown to transformers 5.17
    }
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    return ContinuousBatchingConfig(**{name: value for name, value in options.items() if name in known})


def _require_attention(model: PreTrainedModel) -> None:
    """Its attention in pages leaves out what makes others eager, such as capped scores."""
    implementation = model.config.get_text_config()._attn_implementation
    if implementation == "sdpa" or implementation.startswith("flash"):
        return
    raise ConfigError(
        f"continuous batching does not compute the `{implementation}` attention of {type(model).__name__}",
        where="sampler",
        hint="use sampler: native",
    )


def _checked(outputs: dict[str, Any], expected: int) -> list[Response]:
    errors = [output.error for output in outputs.values() if output.error is not None]
    failed = expected - len(outputs) + len(errors)
    if failed:
        raise _failure(failed, expected, errors[0] if errors else "no response came")
    return [(tuple(output.generated_tokens), tuple(output.logprobs)) for output in outputs.values()]


def _failure(failed: int, expected: int, reason: str) -> ConfigError:
    return ConfigError(
        f"continuous batching failed for {failed} of {expected} prompts: {reason}",
        where="sampler",
        hint="use sampler: native, or lower tokens_per_batch",
    )
