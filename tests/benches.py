"""What benchmarks are tried on: the shape of a tiny model, and pairs that are short."""

from __future__ import annotations

import json
from pathlib import Path

SHAPE = """\
architecture: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
  num_key_value_heads: 2, max_position_embeddings: 2048, tie_word_embeddings: true}
tokens: 300
"""


def write_folder(folder: Path) -> None:
    """Write `shape.yaml` and `pairs.jsonl`."""
    (folder / "shape.yaml").write_text(SHAPE)
    rows = [
        {
            "prompt": f"How much is {number} and {number % 7}?",
            "chosen": f"It is {number + number % 7}.",
            "rejected": "No!",
        }
        for number in range(80)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
