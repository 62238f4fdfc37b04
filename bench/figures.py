"""From what processes noted of themselves to the figures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import processes


@dataclass(frozen=True)
class Passes:
    """What a training must compute: FLOPs for each parameter and token.

    A forward pass takes 2, the gradient by a layer's input 2, the gradient by its weight 2. Left out, on both sides
    alike: attention's products, which grow with the square of the length, the adapters, and the optimizer.
    """

    body: int
    """For each parameter outside of embedding and head, and each token."""
    head: int
    """For each parameter of the head, and each token that is predicted."""


def rates(passes: Passes, counts: Mapping[str, Any], ends: Sequence[float], warmup: int) -> dict[str, float]:
    """Speed over the steps after the warm-up.

    Args:
        passes: What a token needs.
        counts: Per step, `tokens` of plain rows, `reads` of them that are trained on, and the tokens `computed`, which
            are fewer where a prompt is shared by its responses; `body` and `head`, in parameters; and the tokens of a
            mean example, `example`.
        ends: When each step ended, in seconds.
        warmup: Steps to leave out.

    Raises:
        ValueError: There are not as many steps as counts.
    """
    if not len(ends) == len(counts["tokens"]) > warmup:
        raise ValueError(f"{len(ends)} steps were taken of {len(counts['tokens'])}, of which {warmup} do not count")
    seconds = ends[-1] - ends[warmup - 1]
    tokens, reads, computed = (sum(counts[name][warmup:]) for name in ("tokens", "reads", "computed"))
    flops = passes.body * counts["body"] * computed + passes.head * counts["head"] * reads
    return {
        "seconds": seconds,
        "timed_tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "examples_per_second": tokens / seconds / counts["example"],
        "flops_per_second": flops / seconds,
        "first_step_after": ends[0],
    }


def ratios(ours: Sequence[Mapping[str, Any]], peer: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A figure of ours over the peer's, of neighbouring runs."""
    return [one[name] / other[name] for one, other in zip(ours, peer, strict=True)]


def memory(ours: Sequence[Mapping[str, Any]], peer: Sequence[Mapping[str, Any]]) -> str:
    """The ratios of peak memory as text: of the device's, or of the process's in all and above its imports."""
    if "device_mib" in ours[0]:
        return f"{processes.spread(ratios(ours, peer, 'device_mib'), 2)} times the device's peak memory"
    above = [_above_imports(one) / _above_imports(other) for one, other in zip(ours, peer, strict=True)]
    return (
        f"{processes.spread(ratios(ours, peer, 'resident_mib'), 2)} times the peak memory "
        f"({processes.spread(above, 2)} above imports)"
    )


def _above_imports(run: Mapping[str, Any]) -> float:
    return float(run["resident_mib"] - run["imports_mib"])
