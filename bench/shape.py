"""The shapes of models in `bench/models`: `architecture` as transformers calls it, and

tokens              vocabulary of the tokenizer, which is trained on the data
embeddings          rows of the embedding where they are more
dtype               precision the weights are stored in; `float32` if not given
pretraining_steps   steps of 16 blocks of 256 tokens that the base is trained for; random weights if not given
"""

from __future__ import annotations

import hashlib
from pathlib import Path

MODELS = Path(__file__).parent / "models"


def find(model: str) -> Path:
    """The file of a shape by its name, or of the user's own by its path."""
    path = Path(model) if model.endswith(".yaml") else MODELS / f"{model}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in MODELS.glob("*.yaml")))
        raise SystemExit(f"no model `{model}`: give one of {known}, or a path to a `.yaml` of the same layout")
    return path


def base_name(shape: Path, data: Path, *, pretrained: bool) -> str:
    """A name that tells bases apart: by shape, data, and whether they were trained."""
    digest = hashlib.sha256(shape.read_bytes() + data.read_bytes()).hexdigest()[:8]
    return f"{shape.stem}-{'trained' if pretrained else 'random'}-{digest}"
