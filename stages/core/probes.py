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
from stages.core.device import Compute

FILE_NAME = "probes.json"
COUNT = 8
SAME_FLOAT32, SAME_HALF, OTHER_COMPUTE = 1e-3, 0.02, 0.25
"""Largest accepted difference on the device and precision of the recording, and on another. In lower precisions the
last digits depend on the processor and the versions of libraries too."""

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
        ArtifactError: It recorded none.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise ArtifactError("the stage has no probes", where=path, hint="run the stage again")
    return _trees(json.loads(path.read_text()))


def replay(directory: Path, score: Scorer, compute: Compute) -> None:
    """Compute the probes again and compare.

    Does nothing for a foreign model directory, which has none.

    Raises:
        ArtifactError: An output differs by more than rounding.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return
    content = json.loads(path.read_text())
    same = {name: content[name] for name in compute.record} == compute.record
    rounding = SAME_FLOAT32 if content["dtype"] == "float32" else SAME_HALF
    tolerance = rounding if same else OTHER_COMPUTE
    for number, (expected, found) in enumerate(zip(content["outputs"], score(_trees(content)), strict=True)):
        if not abs(expected - found) <= tolerance:
            raise ArtifactError(
                f"probe {number}: recorded {expected:.6f}, found {found:.6f} (tolerance {tolerance:g})",
                where=path,
                hint="the base, the adapter, the head or the tokenizer is not the one that was trained",
            )


def _trees(content: dict[str, Any]) -> list[Tree]:
    return [
        Tree(tuple(each["prompt"]), (Branch.of(each["response"]),), number)
        for number, each in enumerate(content["inputs"])
    ]
