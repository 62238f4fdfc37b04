"""Probes: a few fixed inputs with a stage's own outputs on them, replayed by the stage that receives it.

A second of work catches a wrong base, an adapter applied twice, a random head, a lost weight tie, a swapped tokenizer.

Outputs are compared in float32, where they agree to 1e-6 and an adapter of one training step moves them by 0.006 nats.
In bfloat16 rounding moves them by up to 0.08. What is computed in float32 still depends on the precision that the
weights were loaded in. A stage in float32 therefore records a second set of outputs, of its base rounded to bfloat16,
and a receiver in float32 rounds its base when the stage had it in bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from data.tree import Branch, Tree
from pipeline.errors import ArtifactError
from pipeline.manifest import FILE_NAME as MANIFEST
from stages.core.device import Compute
from stages.core.float32 import in_float32
from stages.core.models import LanguageModel, is_quantized

FILE_NAME = "probes.json"
COUNT = 8
SAME = 1e-3
"""Largest accepted difference of outputs in float32, whatever the run's precision."""
ROUNDED, OTHER_PRECISION = 0.25, 2.0
"""The same in the run's own precision, if the stage had it too, and if not: bounds on broken kernels, since `SAME`
decides. In bfloat16 an adapter of a few steps has half of its effect, the rest is less than the last digit of what it
is added to."""
RECORDED_HALF, RECORDED_OTHERWISE = 0.02, 0.6
"""The same for probes without outputs in float32, which older versions recorded: in bfloat16 on the device of the
recording, and in another precision or on another device."""
KEPT = 0.05
"""Largest difference of log-probabilities a token that were kept in bfloat16 from the same computed again: root mean
square."""
IN_FLOAT32 = "float32"
"""Where outputs in float32 are in the file, by the precision that the base's weights had."""

_AGAIN = "run the stage again with `--force`: its model cannot be checked"

Scorer = Callable[[Sequence[Tree]], list[float]]
"""One number per single-branch tree: the mean log-probability of its tokens, or its score."""


def choose(trees: Sequence[Tree]) -> list[Tree]:
    """The first branch of the first few trees, renumbered."""
    return [
        Tree(tree.prompt, (Branch.of(tree.branches[0].tokens),), number) for number, tree in enumerate(trees[:COUNT])
    ]


def record(directory: Path, trees: Sequence[Tree], score: Scorer, language_model: LanguageModel) -> None:
    """Write `probes.json`."""
    chosen, own = choose(trees), language_model.compute.dtype
    inputs = [{"prompt": list(tree.prompt), "response": list(tree.branches[0].tokens)} for tree in chosen]
    precisions = dict.fromkeys((own, torch.bfloat16))
    exact = {_name(weights): computed_in_float32(language_model, chosen, score, weights) for weights in precisions}
    content = {**language_model.compute.record, "inputs": inputs, "outputs": score(chosen), IN_FLOAT32: exact}
    (directory / FILE_NAME).write_text(json.dumps(content))


def computed_in_float32(
    language_model: LanguageModel, trees: Sequence[Tree], score: Scorer, weights: torch.dtype | None = None
) -> list[float]:
    """Outputs in float32, of a base whose weights are rounded to a precision if one is given."""
    with in_float32(language_model.model, weights):
        return score(trees)


def trees(directory: Path) -> list[Tree]:
    """The inputs that a stage recorded.

    Raises:
        ArtifactError: It recorded none, or none that can be read.
    """
    return _trees(_read(directory / FILE_NAME))


def replay(directory: Path, score: Scorer, language_model: LanguageModel) -> None:
    """Compute the probes again and compare.

    Does nothing for a foreign model directory, which has none.

    Raises:
        ArtifactError: A stage's probes are missing or unreadable, or an output differs by more than rounding.
    """
    path = directory / FILE_NAME
    if not path.is_file() and not (directory / MANIFEST).is_file():
        return
    content, compute = _read(path), language_model.compute
    inputs = _trees(content)
    same = {name: content[name] for name in compute.record} == compute.record
    exact = content.get(IN_FLOAT32)
    # Another device or precision may quantize weights differently.
    if exact is None or (not same and any(map(is_quantized, language_model.model.modules()))):
        require_same(content["outputs"], score(inputs), _tolerance(compute) if same else RECORDED_OTHERWISE, path)
        return
    bound = ROUNDED if content["dtype"] == _name(compute.dtype) else OTHER_PRECISION
    require_same(content["outputs"], score(inputs), bound, path)
    weights = compute.dtype if _name(compute.dtype) in exact else torch.bfloat16
    require_same(exact[_name(weights)], computed_in_float32(language_model, inputs, score, weights), SAME, path)


def _tolerance(compute: Compute) -> float:
    return SAME if compute.dtype == torch.float32 else RECORDED_HALF


def _name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


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
