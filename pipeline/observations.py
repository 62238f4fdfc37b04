"""What an evaluation wrote down of every prompt and of every row of its suites, by the figures that are made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline import manifest as manifests
from pipeline.errors import ArtifactError
from pipeline.figures import GAIN, SCORE, SETTINGS, SUITE, WIN_RATE
from pipeline.manifest import Metric

ROUNDING = 1e-12


@dataclass
class Column:
    """One figure's observations.

    Attributes:
        of: What each is of.
        values: Prompt, or id of a row -> the number.
        weights: The same -> what it counts in the mean; empty where all count alike.
    """

    of: Literal["prompt", "row"]
    values: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def pairs_with(self, other: Column) -> bool:
        """Whether another column is of the same prompts or rows."""
        return self.values.keys() == other.values.keys() and self.weights == other.weights

    def makes(self, figure: Metric) -> bool:
        """Whether a figure is the mean of these observations, so that none is missing."""
        weights = [self.weights.get(key, 1.0) for key in self.values]
        total = sum(value * weight for value, weight in zip(self.values.values(), weights, strict=True))
        return math.isclose(total / sum(weights), figure.value, rel_tol=ROUNDING, abs_tol=ROUNDING)


def columns(stage: Path) -> dict[str, Column]:
    """Figure -> its observations, of those that are means over prompts or rows; none of a stage that is no evaluation.

    Raises:
        ArtifactError: A file of the evaluation cannot be read.
    """
    if not (stage / "samples.jsonl").is_file():
        return {}
    metrics, parents = manifests.load(stage).metrics, _parents(stage / "evaluation.json")
    found: dict[str, Column] = {}
    for prompt, name, value in _of_prompts(stage / "samples.jsonl", parents):
        found.setdefault(name, Column("prompt")).values[prompt] = value
    for path in sorted((stage / "suites").glob("*.jsonl")):
        for row, name, value, weight in _of_rows(path, parents):
            column = found.setdefault(name, Column("row"))
            column.values[row] = value
            if weight is not None:
                column.weights[row] = weight
    return {name: column for name, column in found.items() if name in metrics and column.makes(metrics[name])}


def _of_prompts(path: Path, parents: Mapping[str, str | None]) -> Iterator[tuple[str, str, float]]:
    """What judges say of each prompt: of each answer by itself, beside the parent's, and which of them they prefer."""
    for place, sample in _lines(path):
        try:
            prompt = json.dumps(sample["prompt"], sort_keys=True)
            given = {judge: sample.get(judge, {}) for judge in SETTINGS}
            given |= {f"{SCORE}{judge}": scores for judge, scores in sample.get("scores", {}).items()}
            given |= {"length": sample.get("length", {}), "accuracy": sample.get("correct", {})}
            if sample.get("task"):
                given[f"accuracy.{sample['task']}"] = given["accuracy"]
            for figure, scores in given.items():
                for name, value in _figures(figure, scores, parents):
                    yield prompt, name, value
            for judge, outcomes in sample.get("outcomes", {}).items():
                for model, outcome in outcomes.items():
                    if outcome is not None:
                        yield prompt, f"{model}.{WIN_RATE}{judge}", float(outcome)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(place, error) from error


def _of_rows(path: Path, parents: Mapping[str, str | None]) -> Iterator[tuple[str, str, float, float | None]]:
    """The numbers of each row of a suite: in the whole, in its category, and under single conditions."""
    suite = f"{SUITE}{path.stem}"
    for place, line in _lines(path):
        try:
            row, weight = str(line["id"]), line.get("weight")
            parts = {suite: line["scores"]} | {f"{suite}.{part}": each for part, each in line.get("parts", {}).items()}
            if "category" in line:
                parts[f"{suite}.{line['category']}"] = line["scores"]
            for figure, scores in parts.items():
                for name, value in _figures(figure, scores, parents):
                    yield row, name, value, None if weight is None else float(weight)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(place, error) from error


def _figures(
    figure: str, scores: Mapping[str, float | None], parents: Mapping[str, str | None]
) -> Iterator[tuple[str, float]]:
    """What the numbers of one observation say of each model, by itself and beside its parent's."""
    known = {model: float(score) for model, score in scores.items() if score is not None}
    for model, score in known.items():
        yield f"{model}.{figure}", score
        other = known.get(parents.get(model) or "")
        if other is not None:
            yield f"{model}.{figure}{GAIN}", score - other


def _parents(path: Path) -> dict[str, str | None]:
    """Model -> parent."""
    try:
        content = json.loads(path.read_bytes())
        return {name: model.get("parent") for name, model in content["models"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line with its place."""
    try:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            yield f"{path}:{number}", json.loads(line)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(place: Path | str, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"not what an evaluation writes: {error!r:.80}", where=place, hint="`baton verify RUN` names damaged files"
    )
