"""What a stage takes: time, and the most memory it held."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.manifest import Cost


class Meter:
    """Measures from its creation on.

    Memory is the accelerator's where the stage used one, else the process's. Linux can start the process's
    peak anew; elsewhere it is the peak since the process began.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        cuda = _cuda()
        if cuda is not None:
            cuda.reset_peak_memory_stats()

    def read(self, tokens: int, earlier: float = 0.0) -> Cost:
        """The cost so far of a stage that has processed this many tokens, and took `earlier` seconds before."""
        seconds = round(time.monotonic() - self._started + earlier, 3)
        return Cost(seconds=seconds, tokens=tokens, peak_memory_bytes=_device_peak() or _process_peak())


def _cuda() -> Any:
    """`torch.cuda` when it is loaded and in use; never loads it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _device_peak() -> int:
    cuda = _cuda()
    return int(cuda.max_memory_allocated()) if cuda is not None else 0


def _process_peak() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
