"""The drawn rows with their tokens, and what a step of them holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
IGNORED = -100


def read(path: Path) -> list[Row]:
    """The rows of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def paths(row: Row) -> list[list[int]]:
    """The tokens of a row as they stand in plain rows: each response behind a copy of the prompt."""
    return [row["prompt_tokens"] + response["tokens"] for response in row["responses"]]


def until_stop(tokens: Sequence[int], stop_id: int) -> list[int]:
    """The tokens without those that a chat template writes after the last stop token, on which nothing depends."""
    return list(tokens[: len(tokens) - tokens[::-1].index(stop_id)])


def labels(row: Row) -> list[list[int]]:
    """For each path, the token where it is trained on and -100 elsewhere."""
    before = [IGNORED] * len(row["prompt_tokens"])
    return [
        before + [token if read else IGNORED for token, read in zip(each["tokens"], each["read"], strict=True)]
        for each in row["responses"]
    ]


def plain_counts(rows: Sequence[Row], size: int) -> dict[str, list[int]]:
    """Tokens of plain rows, and trained tokens, of every step of `size` examples."""
    tokens = [sum(map(len, paths(row))) for row in rows]
    reads = [sum(sum(each["read"]) for each in row["responses"]) for row in rows]
    return {"tokens": by_step(tokens, size), "reads": by_step(reads, size)}


def shared_counts(rows: Sequence[Row], size: int) -> list[int]:
    """Tokens of every step where a prompt stands once before all its responses."""
    tokens = [len(row["prompt_tokens"]) + sum(len(each["tokens"]) for each in row["responses"]) for row in rows]
    return by_step(tokens, size)


def by_step(values: Sequence[int], size: int) -> list[int]:
    """Sums of `size` values each."""
    return [sum(values[start : start + size]) for start in range(0, len(values), size)]
