"""Probes: a few fixed inputs with a stage's own outputs on them, replayed by the stage that receives it.

A second of work catches a wrong base, an adapter applied twice, a random head, a lost weight tie, a swapped tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.tree import Branch, Tree
from pipeline.errors import ArtifactError
from pipeline.manifest import FILE_NAME as MANIFEST
from stages.core.device import Compute

FILE_NAME = "probes.json"
COUNT = 8
SAME_FLOAT32, SAME_HALF, OTHER_COMPUTE = 1e-3, 0.02, 0.25
"""Largest accepted difference on the device and precision of the recording, and on another. In lower precisions the
last digits depend on the processor and the versions of libraries too."""

_AGAIN = "run the stage again with `--force`: its model cannot be checked"

Scorer = Callable[[Sequence[Tree]], list[float]]
"""One number per single-branch tree: the mean log-probability of its tokens, or its score."""


def choose(trees: Sequence[Tree]) -> list[Tree]:
    """The first branch of the first few trees, renumbered."""
    return [
        Tree(tree.prompt, (Branch.of(tree.branches[0].tokens),), number) for number, tree in enumerate(trees[:COUNT])
    ]


def record(directory: Path, trees: Sequence[Tree], score: Scorer, compute: Compute) -> None:
    """Write `probes.json`."""
    chosen = choose(trees)
    inputs = [{"prompt": list(tree.prompt), "response": list(tree.branches[0].tokens)} for tree in chosen]
    content = {**compute.record, "inputs": inputs, "outputs": score(chosen)}
    (directory / FILE_NAME).write_text(json.dumps(content))


def trees(directory: Path) -> list[Tree]:
    """The inputs that a stage recorded.

    Raises:
        ArtifactError: It recorded none, or none that can be read.
    """
    return _trees(_read(directory / FILE_NAME))


def replay(directory: Path, score: Scorer, compute: Compute) -> None:
    """Compute the probes again and compare.

    Does nothing for a foreign model directory, which has none.

    Raises:
        ArtifactError: A stage's probes are missing or unreadable, or an output differs by more than rounding.
    """
    path = directory / FILE_NAME
    if not path.is_file() and not (directory / MANIFEST).is_file():
        return
    content = _read(path)
    same = {name: content[name] for name in compute.record} == compute.record
    tolerance = tolerance_of(content["dtype"]) if same else OTHER_COMPUTE
    require_same(content["outputs"], score(_trees(content)), tolerance, path)


def tolerance_of(dtype: str) -> float:
    """Largest accepted difference in a precision, on one device."""
    return SAME_FLOAT32 if dtype == "float32" else SAME_HALF


def require_same(recorded: Sequence[float], found: Sequence[float], tolerance: float, where: Path | str) -> None:
    """Raise ArtifactError at the first outputs that differ by more than the tolerance, or are not finite."""
    for number, (old, new) in enumerate(zip(recorded, found, strict=True)):
        if not abs(old - new) <= tolerance:
            raise ArtifactError(
                f"probe {number}: recorded {old:.6f}, found {new:.6f} (tolerance {tolerance:g})",
                where=where,
                hint="the base, the adapter, the head or the tokenizer is not the one that was trained",
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        inputs, outputs = content["inputs"], content["outputs"]
        complete = all(each["prompt"] and each["response"] for each in inputs) and len(inputs) == len(outputs) > 0
    except FileNotFoundError:
        raise ArtifactError("a stage without its probes", where=path, hint=_AGAIN) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"no readable probes: {error!r}", where=path, hint=_AGAIN) from None
    if not complete:
        what = f"{len(inputs)} inputs with {len(outputs)} outputs: probes are one output for each of some inputs"
        raise ArtifactError(what, where=path, hint=_AGAIN)
    return content


def _trees(content: dict[str, Any]) -> list[Tree]:
    return [
        Tree(tuple(each["prompt"]), (Branch.of(each["response"]),), number)
        for number, each in enumerate(content["inputs"])
    ]
