"""Models that a comparison starts from: shapes, and pretrained models.

A shape is a file in `bench/models` with `architecture` as transformers calls it, and

tokens              vocabulary of the tokenizer, which is trained on the data
embeddings          rows of the embedding where they are more
dtype               precision the weights are stored in; `float32` if not given
pretraining_steps   steps of 16 blocks of 256 tokens that the base is trained for; random weights if not given

A pretrained model is a GGUF file or a model directory, and is used as it is: its weights, tokenizer and chat template.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

MODELS = Path(__file__).parent / "models"
SHAPE, GGUF = ".yaml", ".gguf"
WEIGHTS = re.compile(r"[._-](bf16|f16|f32|i?q\d\w*)$|-(instruct|chat|it)$")
"""Endings of a model's name that say how its weights are stored and what it was trained for."""


def find(model: str) -> Path:
    """The file of a shape by its name, the user's own by its path, or a pretrained model."""
    path = Path(model)
    if (path.suffix == GGUF and path.is_file()) or (path / "config.json").is_file():
        return path
    path = path if path.suffix == SHAPE else MODELS / f"{model}{SHAPE}"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in MODELS.glob(f"*{SHAPE}")))
        raise SystemExit(
            f"no model `{model}`: give one of {known}, a path to a `{SHAPE}` of the same layout, a GGUF file, or a "
            "model directory"
        )
    return path


def find_untrained(model: str) -> Path:
    """The file of a shape, where a pretrained model cannot be the beginning."""
    path = find(model)
    if path.suffix != SHAPE:
        raise SystemExit(f"--model {model}: pretraining starts from random weights, give the name or file of a shape")
    return path


def label(model: str) -> str:
    """The model's name in pages and in names of results: `SmolLM2-135M-Instruct.Q4_1.gguf` is `smollm2-135m`."""
    path = Path(model)
    if path.suffix == SHAPE or not (path.suffix == GGUF or path.is_dir()):
        return path.stem if path.suffix == SHAPE else path.name
    name = (path.stem if path.suffix == GGUF else path.resolve().name).lower()
    while (shorter := WEIGHTS.sub("", name)) != name:
        name = shorter
    return name


def place(kept: Path, found: Path, data: Path, *, pretrained: bool) -> Path:
    """The directory of the base: the model directory that was given, or one in the cache."""
    return found if found.is_dir() else kept / base_name(found, data, pretrained=pretrained)


def base_name(found: Path, data: Path, *, pretrained: bool) -> str:
    """A name that tells bases apart: GGUF files by content; shapes also by data, and whether they were trained."""
    if found.suffix == GGUF:
        return f"{label(str(found))}-{hashlib.sha256(found.read_bytes()).hexdigest()[:8]}"
    digest = hashlib.sha256(found.read_bytes() + data.read_bytes()).hexdigest()[:8]
    return f"{found.stem}-{'trained' if pretrained else 'random'}-{digest}"
