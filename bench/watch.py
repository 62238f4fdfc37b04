"""What a training process notes of itself, the same way on both sides."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import wraps
from statistics import median
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from bench import processes
from bench.job import Job

MATRIX = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product is the measure of what the machine can do."""
PRODUCTS = 5
Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


class Watch:
    """Made when everything is imported and nothing is loaded; `step` is called at the end of every optimizer step."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._began = time.perf_counter()
        self._imports_mib = processes.resident_mib()
        self._ends: list[float] = []
        self._memory: dict[str, float] = {}

    def step(self) -> None:
        """Note the time and the memory, after the device has done all that it was given."""
        if self._job.device == "cuda":
            torch.cuda.synchronize()
            self._memory["device_mib"] = torch.cuda.max_memory_allocated() / 2**20
        self._ends.append(time.perf_counter() - self._began)
        self._memory["resident_mib"] = processes.resident_mib()

    def report(self, losses: list[float], **figures: Any) -> None:
        """Print what was noted, with the losses of the steps and what the machine can do."""
        processes.report(
            ends=self._ends,
            losses=losses,
            imports_mib=self._imports_mib,
            **self._memory,
            peak=matmul_peak(self._job.device, self._job.dtype),
            device=f"on {torch.cuda.get_device_name()}" if self._job.device == "cuda" else "on the processor",
            **figures,
        )


class Phases:
    """Seconds that each phase of every step takes: a phase lasts from the end of the one before to its own."""

    def __init__(self, job: Job) -> None:
        self._device = job.device
        self._last = time.perf_counter()
        self._current: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []

    def mark(self, name: str) -> None:
        """A phase, or a part of it, has ended."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._current[name] = self._current.get(name, 0.0) + now - self._last
        self._last = now

    def end(self, name: str) -> None:
        """The last phase of a step has ended."""
        self.mark(name)
        self.steps.append(self._current)
        self._current = {}

    def marking(self, name: str, function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
        """The function, at whose end a phase ends."""

        @wraps(function)
        def marked(*arguments: Arguments.args, **options: Arguments.kwargs) -> Returned:
            found = function(*arguments, **options)
            self.mark(name)
            return found

        return marked


def live_parameters() -> dict[str, int]:
    """What all models in the process hold: `parameters`, `trained` ones and `parameter_bytes`, each storage once."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), nn.Parameter) and each.device.type != "meta"]
    once = {each.untyped_storage().data_ptr(): each for each in found}.values()
    return {
        "parameters": sum(each.numel() for each in once),
        "trained": sum(each.numel() for each in once if each.requires_grad),
        "parameter_bytes": sum(each.nbytes for each in once),
    }


def matmul_peak(device: str, dtype: str) -> float:
    """FLOP/s of the product of two large square matrices in this process: the median of several."""
    size = MATRIX[device]
    matrix = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    rates = []
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * size**3 / (time.perf_counter() - began))
    return median(rates)
