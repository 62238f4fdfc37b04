"""The memory of a stage, estimated from the model's shape and the stage's settings before anything is loaded.

The weights are in memory once for all roles, beside an adapter for each role, gradients and moments of what is trained,
the states that the backward pass reads, a piece of logits, and the keys and values of sampling. All of these count as
if they were there at once, but that training takes over the memory of sampling's cache. What a layer keeps is counted
as this code keeps it (`stages/core/lora.py`, `norms.py`, `attention.py`), in the way of Korthikanti et al. 2022 (arXiv
2205.05198, section 4.1). `docs/memory.md` compares the estimates with measured peaks. Left out: routed experts and
recurrent states, which count as dense layers of the same size, dropout's masks, and what DoRA keeps beyond LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pipeline.config import (
    LARGEST_BATCH,
    Batched,
    Batching,
    DpoSettings,
    EvaluateSettings,
    Lora,
    PpoSettings,
    PretrainSettings,
    Rewarded,
    RewardSettings,
    SftSettings,
)
from pipeline.manifest import Cost, MemoryEstimate
from pipeline.shape import Base, Shape

CACHED_TOKENS = 8
"""Sampling caches that many times `tokens_per_batch` tokens: keys and values take that much less memory than
activations."""
ROOM = 256
"""Tokens of each response that sampling counts on when it chooses how many rows a batch has."""
CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Logits computed at once in training: 8 MiB in float32 stay in a processor's cache."""
CENTRING_SAMPLES = 128
"""Responses that a reward stage samples to centre its scores, at most."""

IMPORTS = 465_000_000
"""Bytes of a process that has imported what a stage needs; those of an accelerator are not counted."""
LIBRARIES = 30_000_000
"""Bytes that a process takes for what libraries set up when they are first used, rows and a small tokenizer."""
TOKEN = 2_500
"""Bytes that a process takes for every token of the vocabulary: the tokenizer's tables."""
KERNELS = 130_000_000
"""Bytes of the kernels that are compiled for products in bfloat16 on a processor."""
SCATTERED = 1.15
"""Times the activations that a process grows by on a processor: freed memory between other blocks is not reused."""
IN_FLIGHT = 2
"""Layers whose states and gradients exist beside what is kept while the backward pass is in one of them."""
FULL = 4
"""Bytes of a number in float32, in which everything that is trained is held."""
BYTES = {"float32": 4, "bfloat16": 2}
QUANTIZED = {"4bit": 0.53, "8bit": 1.01}
"""Bytes of a number in a quantized layer, scales included."""
MOMENTS = {"adamw": 8, "muon": 8, "adamw8bit": 2, "paged_adamw8bit": 2}
"""Bytes that an optimizer remembers of a trained number; Muon remembers half of that of matrices."""
PRODUCTS_WIDTH = 512
"""Longest tree whose attention is products of matrices, on a processor in bfloat16: they beat its fused attention,
backward above all. The weights are kept for the backward pass."""
WIDENED = 16
"""Bytes that a layer of trained weights keeps for each hidden number in float32 beside the lower precision."""
CHUNK_COPIES = 4
"""Arrays of a chunk's size at once: logits in two precisions, exponentials and gradients."""
SAMPLED_BYTES = 20
"""Bytes of a logit in sampling: in two precisions, as probabilities and as their sums in double precision."""

SMALLEST = 256
"""Tokens of the smallest batch that `auto` chooses."""
LARGEST = {"cuda": 65_536}
"""Tokens of the largest one; `LARGEST_BATCH` on other devices."""
SHARE = {"cuda": 0.5}
"""Share of the free memory that `auto` plans with; `SHARE_ELSEWHERE` on other devices."""
SHARE_ELSEWHERE = 1 / 3
"""A processor is as fast with small batches as with large ones, its memory serves other programs too, and it kills a
process that takes too much."""


@dataclass(frozen=True)
class Task:
    """A stage as far as its memory depends on it.

    Attributes:
        settings: The stage's.
        bases: The models it computes with, the policy's first, the one below a reward model last.
        reward: The reward model's adapter.
        device: `cpu`, `cuda` or `mps`.
        precision: Of frozen weights and matrix products.
        longest: Tokens of the longest example; `max_length` where that is not known.
    """

    settings: Batched
    bases: tuple[Base, ...]
    reward: Lora | None
    device: str
    precision: str
    longest: int | None = None

    @classmethod
    def of(cls, settings: Batched, inputs: Mapping[str, Base], device: str, precision: str) -> Task:
        """The task of a stage with these models by role."""
        models = [base for role, base in inputs.items() if role != "reward"]
        reward = inputs.get("reward")
        if reward is None:
            return cls(settings, tuple(models), None, device, precision)
        return cls(settings, (*models, replace(reward, adapter=None)), reward.adapter, device, precision)

    @property
    def shape(self) -> Shape:
        """That of the largest model."""
        return max((base.shape for base in self.bases), key=lambda shape: shape.parameters)

    @property
    def trains_weights(self) -> bool:
        """Whether all weights are trained and there is no adapter."""
        is_trained = isinstance(self.settings, Batching)
        return is_trained and (isinstance(self.settings, PretrainSettings) or self.adapter is None)

    @property
    def adapter(self) -> Lora | None:
        """What the trained adapter is like; one that continues an adapter keeps its shape."""
        return self.bases[0].adapter or getattr(self.settings, "lora", None)

    @property
    def bytes(self) -> int:
        """Of a number in the precision of matrix products."""
        return BYTES[self.precision]


def estimate(task: Task, tokens: int, imports: int = IMPORTS) -> MemoryEstimate:
    """The memory of a stage with batches of so many tokens.

    Args:
        task: The stage.
        tokens: `tokens_per_batch`.
        imports: Bytes of the process before the stage begins, on a processor.
    """
    adapters, trained = sum(_adapters(task)), _trained(task)
    moments = MOMENTS[task.settings.optimizer.name] if isinstance(task.settings, Batching) else 0
    return MemoryEstimate(
        tokens_per_batch=tokens,
        weights=_weights(task),
        adapters=adapters * FULL,
        optimizer=trained * (FULL + moments),
        activations=_activations(task, tokens),
        logits=_logits(task, tokens),
        cache=_cached(task, tokens) * _of_cached_token(task),
        fixed=_fixed(task) + imports if task.device == "cpu" else 0,
    )


def choose(task: Task, free: int | None) -> int:
    """The power of two for `tokens_per_batch: auto`: the largest one whose estimate is within a share of what is free,
    not below the longest example and not above what gains speed.

    Args:
        task: The stage.
        free: Bytes that the process may still take, beside its imports; None where that is not known.
    """
    smallest = _smallest(task)
    largest = max(smallest, LARGEST.get(task.device, LARGEST_BATCH))
    if free is None:
        return max(smallest, LARGEST_BATCH)
    tokens = largest
    while tokens > smallest and estimate(task, tokens, imports=0).total > share(task) * free:
        tokens //= 2
    return tokens


def share(task: Task) -> float:
    """The share of the free memory that `auto` plans with."""
    return SHARE.get(task.device, SHARE_ELSEWHERE)


def in_words(size: float) -> str:
    """Bytes for reading: 2.31 GB or 412 MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def peak_in_words(cost: Cost) -> str:
    """The most memory that was held, beside what was expected."""
    expected = f" (expected {in_words(cost.expected_memory.total)})" if cost.expected_memory else ""
    return f"at most {in_words(cost.peak_memory_bytes)}{expected}"


def parts_in_words(expected: MemoryEstimate) -> str:
    """The total and its parts, those of no account left out: `2.31 GB: weights 0.27, adapters 0.02`."""
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in expected.parts.items() if size >= 5e6)
    return f"{in_words(expected.total)}: {parts}" if parts else in_words(expected.total)


def _smallest(task: Task) -> int:
    """Tokens of the longest example, as a power of two: a smaller batch would not bound memory."""
    longest = min(_longest(task), LARGEST_BATCH)
    return max(SMALLEST, 1 << (longest - 1).bit_length())


def _longest(task: Task) -> int:
    return task.longest or task.settings.max_length


def _weights(task: Task) -> int:
    if task.trains_weights:
        copies = FULL + (task.bytes if task.bytes < FULL else 0)  # autocast keeps what it converted during a step
        return task.bases[0].shape.parameters * copies
    merged = isinstance(task.settings, SftSettings) and task.settings.quantization == "none" and task.device == "cpu"
    shared = {(base.identity, _quantization(task, base)): base for base in task.bases}
    held = sum(_of_base(task, base) for base in shared.values())
    return 2 * held if merged else held  # an adapter is merged into the stored weights, which are read again


def _of_base(task: Task, base: Base) -> int:
    shape, quantized = base.shape, QUANTIZED.get(_quantization(task, base), task.bytes)
    return round(shape.quantizable * quantized) + (shape.parameters - shape.quantizable) * task.bytes


def _fixed(task: Task) -> int:
    """What a process takes beside imports and tensors."""
    kernels = KERNELS if task.precision == "bfloat16" else 0
    return LIBRARIES + TOKEN * task.shape.vocabulary + kernels


def _quantization(task: Task, base: Base) -> str:
    return task.settings.quantization if isinstance(task.settings, SftSettings) else base.quantization


def _adapters(task: Task) -> Iterator[int]:
    """Numbers of every adapter in memory."""
    settings, policy = task.settings, task.bases[0]
    if isinstance(settings, EvaluateSettings):
        yield from (base.shape.adapter(base.adapter) for base in task.bases if base.adapter)
    elif not task.trains_weights:
        assert task.adapter is not None
        own = policy.shape.adapter(task.adapter)
        yield own
        if policy.adapter:
            yield own  # the reference
        if isinstance(settings, Rewarded):
            yield own  # the best policy so far
        if _value(task):
            yield policy.shape.adapter(_value(task) or task.adapter)
    if task.reward:
        yield policy.shape.adapter(task.reward)


def _value(task: Task) -> Lora | None:
    """The adapter of the value function, which begins as the reward model's."""
    settings = task.settings
    if not isinstance(settings, PpoSettings) or settings.advantage != "gae" or settings.value != "adapter":
        return None
    return task.reward or task.adapter


def _trained(task: Task) -> int:
    """Numbers that have gradients and moments."""
    if not isinstance(task.settings, Batching):
        return 0
    shape = task.bases[0].shape
    if task.trains_weights:
        return shape.parameters
    return sum(shape.adapter(each) for each in (task.adapter, _value(task)) if each)


def _at_once(task: Task, tokens: int) -> int:
    """Tokens of the largest batch that trains."""
    settings = task.settings
    if not isinstance(settings, Batching):
        return 0
    return min(max(tokens, _longest(task)), settings.examples_per_step * _branches(task) * _longest(task))


def _branches(task: Task) -> int:
    """Responses to a prompt."""
    if isinstance(task.settings, Rewarded):
        return task.settings.samples_per_prompt
    return 2 if isinstance(task.settings, RewardSettings | DpoSettings) else 1


def _activations(task: Task, tokens: int) -> int:
    """What the backward pass reads, gradients in flight included, beyond the cache, whose memory it takes over; or else
    what sampling's first pass over prompts takes at once, whichever is more."""
    shape, settings = task.shape, task.settings
    passing = max(_cached(task, tokens), tokens if isinstance(settings, EvaluateSettings) else 0)
    without = passing * (4 * shape.hidden + 3 * shape.intermediate) * task.bytes
    if not isinstance(settings, Batching):
        return without
    cache = _cached(task, tokens) * _of_cached_token(task)
    tokens, layers = _at_once(task, tokens), shape.layers
    if not task.trains_weights and task.adapter:
        layers = shape.adapted_layers(task.adapter)
    whole, scattered = _of_layer(task), SCATTERED if task.device == "cpu" else 1.0
    kept = layers * whole
    if settings.gradient_checkpointing:
        kept = layers * shape.hidden * (FULL if task.trains_weights else task.bytes)
    training = round(tokens * (kept + IN_FLIGHT * whole) * scattered)
    return max(training - cache, without)


def _of_layer(task: Task) -> float:
    """Bytes that a layer keeps of a token: inputs and results of two normalisations; queries, keys, values and what is
    attended to; four numbers for each inner one of a gated layer; what is between an adapter's matrices."""
    shape = task.shape
    outer, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
    numbers: float = 4 * shape.hidden + 3 * outer + 2 * keys + 4 * shape.intermediate
    if task.adapter and not task.trains_weights:
        numbers += task.adapter.rank * shape.adapted_matrices(task.adapter)
    if task.device == "cpu" and task.precision == "bfloat16":
        numbers += shape.heads * min(_longest(task), PRODUCTS_WIDTH)
    widened = WIDENED * shape.hidden if task.trains_weights and task.bytes < FULL else 0
    return numbers * task.bytes + widened


def _logits(task: Task, tokens: int) -> int:
    vocabulary = task.shape.vocabulary
    chunk = CHUNK_LOGITS.get(task.device, CHUNK_LOGITS["cuda"])
    computed = min(max(chunk, vocabulary), max(_at_once(task, tokens), tokens) * vocabulary) * FULL * CHUNK_COPIES
    head = 2 * vocabulary * task.shape.hidden * FULL if task.trains_weights and _trained(task) else 0
    return max(computed + head, _rows(task, tokens) * vocabulary * SAMPLED_BYTES)


def _rows(task: Task, tokens: int) -> int:
    """Responses that are sampled together, at most: those to short prompts."""
    shortest = min(ROOM, getattr(task.settings, "max_new_tokens", ROOM))
    return min(_samples(task), max(1, CACHED_TOKENS * tokens // shortest))


def _cached(task: Task, tokens: int) -> int:
    """Tokens whose keys and values sampling holds."""
    return min(_samples(task) * _longest(task), CACHED_TOKENS * max(tokens, _longest(task)))


def _samples(task: Task) -> int:
    """Responses that are sampled in a round, in a look or at the end."""
    settings = task.settings
    if isinstance(settings, RewardSettings):
        return CENTRING_SAMPLES
    if isinstance(settings, EvaluateSettings):
        return settings.rows * (settings.best_of or 1)
    if not isinstance(settings, Rewarded):
        return 0
    looks = getattr(settings, "evaluate_rows", 0) * getattr(settings, "evaluate_samples", 0)
    return int(max(settings.examples_per_step * settings.samples_per_prompt, looks))


def _of_cached_token(task: Task) -> int:
    shape = task.shape
    return 2 * shape.layers * shape.key_heads * shape.head_size * task.bytes
