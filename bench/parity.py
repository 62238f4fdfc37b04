"""lm-eval-harness beside a suite of Baton, row by row: `python -m bench.parity SUITE_FILE EVAL_FILE`.

The first is what an `evaluate` stage keeps of a suite, `stages/NAME/suites/SUITE.jsonl`; the second what `baton eval`
keeps of a task with the same rows, `evals/STAGE-DIGEST/TASK.json`. Prints of how many rows the responses are the same
text, and of how many the verdicts are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Parity:
    """A model's rows on both sides.

    Attributes:
        rows: Compared, in the order of the file that both read.
        right: In the suite, and in lm-eval.
        texts: Ids of the rows whose responses differ.
        verdicts: Ids of those whose verdicts differ.
    """

    rows: int
    right: tuple[float, float]
    texts: tuple[str, ...]
    verdicts: tuple[str, ...]

    def sentence(self, model: str) -> str:
        """What was found, in a line."""
        alike = f"{self.rows - len(self.texts):,} responses and {self.rows - len(self.verdicts):,} verdicts are alike"
        right = f"right are {self.right[0]:g} in the suite, {self.right[1]:g} in lm-eval"
        differ = "".join(f"\n  differs: {each}" for each in dict.fromkeys(self.texts + self.verdicts))
        return f"{model}: of {self.rows:,} rows {alike}; {right}{differ}"


def compare(lines: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> Parity:
    """Compare the rows that lm-eval took, its first ones, with the same rows of a suite.

    Args:
        lines: Observations of a suite with one response each.
        evaluation: What `baton eval` kept.
    """
    model, (metric, *_) = evaluation["stage"], [name.partition(",")[0] for name in evaluation["figures"]]
    samples = sorted(evaluation["samples"], key=lambda sample: sample["doc_id"])
    pairs = list(zip(lines[: len(samples)], samples, strict=True))
    return Parity(
        len(pairs),
        (sum(line["scores"][model] for line, _ in pairs), sum(sample[metric] for _, sample in pairs)),
        tuple(line["id"] for line, sample in pairs if line["responses"][model] != sample["resps"][0][0]),
        tuple(line["id"] for line, sample in pairs if line["scores"][model] != sample[metric]),
    )


def read(suite: Path, evaluation: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The two files."""
    lines = suite.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], json.loads(evaluation.read_text(encoding="utf-8"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=__doc__)
    parser.add_argument("suite", type=Path, help="stages/NAME/suites/SUITE.jsonl of a run")
    parser.add_argument("evaluation", type=Path, help="evals/STAGE-DIGEST/TASK.json of a run")
    chosen = parser.parse_args()
    lines, evaluation = read(chosen.suite, chosen.evaluation)
    sys.stdout.write(compare(lines, evaluation).sentence(evaluation["stage"]) + "\n")


if __name__ == "__main__":
    main()
