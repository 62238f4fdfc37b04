"""Resolving `tokens_per_batch: auto` when a stage starts, and the memory that the stage is expected to take.

A stage that goes on from a checkpoint keeps the batches with which that was made, since other batches round
differently, unless these no longer fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline import available, memory, shape
from pipeline.contract import Context
from pipeline.manifest import MemoryEstimate
from pipeline.memory import Task
from pipeline.shape import UnknownShape
from stages.core.device import Compute


@dataclass(frozen=True)
class Fitted:
    """A stage's context in which `tokens_per_batch` is a number.

    Attributes:
        context: The context.
        task: The stage as far as its memory depends on it; None where the shape of the model is not known.
        expected: The estimate for it.
    """

    context: Context
    task: Task | None
    expected: MemoryEstimate | None


def fit(context: Context, compute: Compute) -> Fitted:
    """Resolve `tokens_per_batch: auto`, telling what was chosen, and estimate the memory of the stage."""
    is_auto = context.settings.tokens_per_batch == "auto"
    left = free(compute.device, context.memory)
    try:
        task = _task(context, compute)
    except UnknownShape as error:
        if is_auto:
            context.say(f"tokens_per_batch auto: {context.settings.batch_tokens:,}, memory not estimated: {error}")
        return Fitted(_with(context, context.settings.batch_tokens), None, None)
    tokens = _tokens(context, task, left) if is_auto else context.settings.batch_tokens
    imports = available.resident() if compute.device.type == "cpu" else None
    expected = memory.estimate(task, tokens, memory.IMPORTS if imports is None else imports)
    if is_auto:
        context.say(f"tokens_per_batch auto: {tokens:,}{_of(left)}")
    needed = expected.total - (imports or 0)
    if left is not None and needed > left:
        ways = ["lower max_length"]
        if getattr(context.settings, "gradient_checkpointing", None) is False:
            ways.append("set gradient_checkpointing: true")
        hint = " or ".join(ways)
        context.say(f"warning: about {memory.in_words(needed)} needed, {memory.in_words(left)} are free: {hint}")
    return Fitted(_with(context, tokens), task, expected)


def free(device: torch.device, limit: int | None = None) -> int | None:
    """Bytes that can still be had on a device, at most what a limit on all of the process's leaves; None where neither
    is known."""
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        left = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - allocated
        return left if limit is None else max(0, min(left, limit - allocated))
    return available.memory(limit) if device.type == "cpu" else limit


def _tokens(context: Context, task: Task, left: int | None) -> int:
    chosen, before = memory.choose(task, left), context.checkpoints.tokens_per_batch()
    if before is None or before == chosen:
        return chosen
    if left is None or memory.estimate(task, before, imports=0).total <= left:
        return before
    context.say(f"tokens_per_batch was {before:,} before the checkpoint, which no longer fits: rounding will differ")
    return chosen


def _with(context: Context, tokens: int) -> Context:
    settings = context.settings.model_copy(update={"tokens_per_batch": tokens})
    context.checkpoints.made_with(tokens)
    return replace(context, settings=settings)


def _of(left: int | None) -> str:
    return "" if left is None else f", of {memory.in_words(left)} that are free"


def _task(context: Context, compute: Compute) -> Task:
    """The stage with the shapes of its inputs.

    Raises:
        UnknownShape: An input does not say.
    """
    settings: Any = context.settings
    bases = {role: shape.of_artifact(each) for role, each in context.inputs.items() if role != "tokenizer"}
    if not bases:
        bases["policy"] = shape.from_nothing(settings.architecture, context.inputs["tokenizer"])
    return Task.of(settings, bases, compute.device.type, compute.record["dtype"])
