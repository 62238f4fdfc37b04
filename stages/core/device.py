"""Where and in which precision to compute."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch

from pipeline.contract import Context
from pipeline.errors import ConfigError

WORTHWHILE_SPEEDUP = 1.2
EMULATED = 0.25
"""A processor whose products are this much slower in bfloat16 than in float32, or more, has no instructions for it."""
SMALL, LARGE = 256, 768
"""Sizes of products to time: the small one tells an emulation, in which the large one takes seconds; of smaller ones,
a call takes as long as the product."""
KERNELS = 128
"""Kernels that oneDNN keeps, of about 0.4 MiB each; by itself it keeps 1,024, and a run grows until it has them."""
KERNELS_KEPT = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")
"""How oneDNN is told; of two that are set it takes the first."""


@dataclass(frozen=True)
class Compute:
    """A device and the precision of frozen weights and matrix products; adapters and losses are always float32."""

    device: torch.device
    dtype: torch.dtype

    @property
    def record(self) -> dict[str, str]:
        """For the manifest."""
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def makes_kernels_by_shape(self) -> bool:
        """Whether the first product of a shape is slow: oneDNN, which processors' bfloat16 goes through, takes
        milliseconds to make a kernel for it."""
        return self.device.type == "cpu" and self.dtype == torch.bfloat16

    def autocast(self) -> torch.autocast:
        """Matrix products of float32 weights in this precision; does nothing where that is float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def available(device: str) -> torch.device:
    """Resolve `auto`.

    Raises:
        ConfigError: The device asked for is not there.
    """
    chosen = torch.device(_best_device() if device == "auto" else device)
    if not _is_available(chosen):
        raise ConfigError(f"device `{device}` is not available", where="device", hint="use device=auto or device=cpu")
    return chosen


def choose(device: str, dtype: str) -> Compute:
    """Resolve `auto`, keep away from what computes wrong numbers there, and keep kernels from filling the memory.

    Raises:
        ConfigError: The device asked for is not there.
    """
    chosen = available(device)
    _limit_kernels()
    if chosen.type == "cuda":
        avoid_broken_attention()
    if dtype == "auto":
        return Compute(chosen, torch.bfloat16 if _bfloat16_pays(chosen) else torch.float32)
    return Compute(chosen, getattr(torch, dtype))


def for_stage(context: Context) -> Compute:
    """What a stage's context asks for; the user is warned of a precision that the processor only emulates.

    Raises:
        ConfigError: The device asked for is not there.
    """
    compute = choose(context.device, context.dtype)
    if compute.device.type == "cpu" and compute.dtype == torch.bfloat16 and _is_emulated():
        slower = f"products take {1 / _bfloat16_gain(SMALL):.0f} times as long as in float32, large ones more"
        context.say(f"warning: this processor emulates bfloat16: {slower}; use dtype=float32 or dtype=auto")
    return compute


def avoid_broken_attention() -> None:
    """Take other kernels than cuDNN's for attention, in the whole process.

    On Hopper devices their gradients with a mask are NaN at lengths of 64 more than a multiple of 128, which a padded
    row is enough for; PyTorch takes them first since 2.11 (pytorch/pytorch#196678, huggingface/trl#7181).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _limit_kernels() -> None:
    """Have oneDNN keep `KERNELS`, unless the user says how many; it asks before the process's first product."""
    if not any(name in os.environ for name in KERNELS_KEPT):
        os.environ[KERNELS_KEPT[0]] = str(KERNELS)


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _is_available(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available()
    return device.type == "cpu" or torch.backends.mps.is_available()


def _bfloat16_pays(device: torch.device) -> bool:
    """Ask an accelerator; time the processor, since it may emulate bfloat16 at a loss."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return False
    return not _is_emulated() and _bfloat16_gain(LARGE) > WORTHWHILE_SPEEDUP


def _is_emulated() -> bool:
    return _bfloat16_gain(SMALL) <= EMULATED


@cache
def _bfloat16_gain(size: int) -> float:
    """How many times as fast as in float32 the processor's products of this size are in bfloat16."""
    return _matmul_seconds(torch.float32, size) / _matmul_seconds(torch.bfloat16, size)


def _matmul_seconds(dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    matrix = torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - begin)
    return median(seconds)
