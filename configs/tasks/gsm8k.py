"""What `gsm8k.yaml` calls: the local file, and Baton's own rule of what is right."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from datasets import Dataset

from pipeline.errors import DataError
from reward.rules import verdict


def rows(**_: Any) -> dict[str, Dataset]:
    """The test split of the folder that `BATON_DATA` names."""
    path = Path(os.environ.get("BATON_DATA", ".")) / "gsm8k" / "test.jsonl"
    if not path.is_file():
        raise DataError("no such file", where=path, hint="set BATON_DATA to the folder with gsm8k/test.jsonl")
    return {"test": Dataset.from_json(str(path))}


def right(row: dict[str, Any], responses: list[str]) -> dict[str, float]:
    """1 when the last number is the answer's."""
    return {"correct": verdict("numeric", row, responses[0], "gsm8k").correct}
