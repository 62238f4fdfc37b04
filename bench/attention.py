"""Attention within packed trees, and the same with one dense mask over the whole row.

Forward and backward of one layer's attention, for rows of more and more pairs: a prompt and two responses each. On CUDA
flash attention over branches stands beside it.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench import processes
from bench.comparison import count
from data.batch import one_row
from data.packing import Packing
from data.tree import Branch, Tree
from stages.core.attention import flash_attention, padded_attention

PAIRS = (1, 2, 4, 8)
PROMPT, RESPONSE = (20, 300), (20, 200)
"""Bounds of the tokens of a prompt and of a response."""
PACKAGES = ("torch",)


def ways(device: str) -> dict[str, Callable[[list[Tensor], Packing, Tensor], Tensor]]:
    """What the device can compute with, of query, key and value, the packing, and a dense mask to add to scores."""

    def dense(states: list[Tensor], packing: Packing, mask: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(*states, attn_mask=mask).transpose(1, 2)

    def padded(states: list[Tensor], packing: Packing, mask: Tensor) -> Tensor:
        return padded_attention(*states, packing, states[0].shape[-1] ** -0.5)

    def flash(states: list[Tensor], packing: Packing, mask: Tensor) -> Tensor:
        return flash_attention(*states, packing, states[0].shape[-1] ** -0.5)

    found = {"dense mask": dense, "tree by tree": padded}
    return found | {"flash attention": flash} if device == "cuda" else found


def measure(pairs: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every repeat by way, and by how much gradients differ from those of the dense mask."""
    trees = _trees(pairs)
    packing, mask = Packing.of(trees), one_row(trees).mask
    assert mask is not None
    generator = torch.Generator().manual_seed(0)
    shape = (4, 1, chosen.heads, packing.width, chosen.size)
    *states, weighting = torch.randn(shape, generator=generator).to(chosen.device, getattr(torch, chosen.dtype))
    leaves = [each.detach().requires_grad_() for each in states]
    compute = ways(chosen.device)
    on_device = torch.zeros(mask.shape, dtype=states[0].dtype).masked_fill_(~mask, -torch.inf).to(chosen.device)
    results: dict[str, list[Tensor]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in compute}
    for _ in range(chosen.warmup + chosen.repeats):
        for name, way in compute.items():
            for leaf in leaves:
                leaf.grad = None
            seconds[name].append(_timed(lambda way=way: way(leaves, packing, on_device), weighting, chosen.device))
            results[name] = [leaf.grad.float() for leaf in leaves if leaf.grad is not None]
    return {
        "pairs": pairs,
        "tokens": packing.width,
        "first": {name: taken[0] for name, taken in seconds.items()},
        "seconds": {name: taken[chosen.warmup :] for name, taken in seconds.items()},
        "gaps": {name: _gap(each, results["dense mask"]) for name, each in results.items()},
    }


def page(found: list[dict[str, Any]], chosen: argparse.Namespace, command: str, machine: dict[str, Any]) -> str:
    """The result in Markdown."""
    names = list(found[0]["seconds"])
    rows = []
    for each in found:
        middle = {name: 1e3 * median(each["seconds"][name]) for name in names}
        cells = [f"{middle[name]:,.2f} ({middle['dense mask'] / middle[name]:.2f}x)" for name in names]
        rows.append([f"{each['pairs']}", f"{each['tokens']:,}", *cells, f"{max(each['gaps'].values()):.1e}"])
    return "\n\n".join(
        [
            "# Attention within trees",
            f"Milliseconds of one layer's attention, forward and backward: median of {chosen.repeats}, the ways taking "
            f"turns, after {chosen.warmup} that are dropped; in brackets how many times as fast as the dense mask. "
            f"{chosen.heads} heads of {chosen.size}, {chosen.dtype}. A pair is a prompt of {PROMPT[0]} to {PROMPT[1]} "
            f"tokens and two responses of {RESPONSE[0]} to {RESPONSE[1]}.",
            processes.table(["pairs", "tokens", *names, "largest relative difference of a gradient"], rows),
            f"    {command}",
            f"On {_device(chosen.device)}. {processes.sentence(machine)}",
        ]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__)
    option = parser.add_argument
    option("--device", choices=("cpu", "cuda"), default="cpu")
    option("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    option("--pairs", type=count, nargs="+", default=list(PAIRS), help="pairs in a row")
    option("--heads", type=count, default=6)
    option("--size", type=count, default=64, help="of a head")
    option("--repeats", type=count, default=15)
    option("--warmup", type=count, default=3)
    option("--output", type=Path, default=processes.RESULTS, help="where to write the results")
    chosen = parser.parse_args()
    found = [measure(pairs, chosen) for pairs in chosen.pairs]
    machine = processes.machine(*PACKAGES)
    command = shlex.join(["python", "-m", "bench.attention", *sys.argv[1:]])
    text = page(found, chosen, command, machine)
    sys.stdout.write(text + "\n")
    record = {"command": command, "options": processes.options(chosen), "machine": machine, "found": found}
    processes.save("attention" if chosen.device == "cpu" else f"attention-{chosen.device}", record, text, chosen.output)


def _trees(pairs: int) -> list[Tree]:
    """Pairs of random lengths, the same at every call."""
    drawn = random.Random(0)

    def tokens(bounds: tuple[int, int]) -> tuple[int, ...]:
        return (1,) * drawn.randint(*bounds)

    branches = [(Branch.of(tokens(RESPONSE)), Branch.of(tokens(RESPONSE))) for _ in range(pairs)]
    return [Tree(tokens(PROMPT), each, number) for number, each in enumerate(branches)]


def _gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative difference of query's, key's or value's gradient."""
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))


def _timed(compute: Callable[[], Tensor], weighting: Tensor, device: str) -> float:
    """Seconds of a forward and a backward pass."""
    began = time.perf_counter()
    compute().backward(weighting.transpose(1, 2))
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _device(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}"
    return f"the processor, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
