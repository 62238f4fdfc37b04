"""Tokenizers of stages and models, as they are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.model_files import unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERAL_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes that are exactly what `tokenizer.json` says."""


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a stage or model directory.

    For some model types `AutoTokenizer` puts a class of its own, with other tokens, in the place of a general one.

    Raises:
        ArtifactError: There is none that can be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = directory / "tokenizer_config.json"
    with unreadable(directory, "tokenizer"):
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        general = config.get("tokenizer_class") in GENERAL_TOKENIZERS
        kind: Any = PreTrainedTokenizerFast if general else AutoTokenizer
        found: PreTrainedTokenizerBase = kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return found
