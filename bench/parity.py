"""lm-eval-harness beside a suite of Baton, row by row: `python -m bench.parity SUITE_FILE EVAL_FILE`.

The first is what an `evaluate` stage keeps of a suite, `stages/NAME/suites/SUITE.jsonl`; the second what `baton eval`
keeps of a task with the same rows, `evals/STAGE-DIGEST/TASK.json`. Prints of how many rows the responses are the same
text, and of how many the verdicts are the same. Rows are matched by their lines in the file that both read, which the
suite knows by their ids: it asks the same row once, where the task asks it twice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import suite_rows
from pipeline import loader
from pipeline.suites import Suite


@dataclass(frozen=True)
class Parity:
    """A model's rows on both sides.

    Attributes:
        rows: Compared, in the order of the file that both read.
        alone: Rows that lm-eval took and the suite did not.
        right: In the suite, and in lm-eval.
        texts: Ids of the rows whose responses differ.
        verdicts: Ids of those whose verdicts differ.
    """

    rows: int
    alone: int
    right: tuple[float, float]
    texts: tuple[str, ...]
    verdicts: tuple[str, ...]

    def sentence(self, model: str) -> str:
        """What was found, in a line."""
        alike = f"{self.rows - len(self.texts):,} responses and {self.rows - len(self.verdicts):,} verdicts are alike"
        right = f"right are {self.right[0]:g} in the suite, {self.right[1]:g} in lm-eval"
        differ = "".join(f"\n  differs: {each}" for each in dict.fromkeys(self.texts + self.verdicts))
        alone = f"; {self.alone:,} more in lm-eval alone" if self.alone else ""
        return f"{model}: of {self.rows:,} rows {alike}; {right}{alone}{differ}"


def compare(lines: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any], places: Mapping[str, int]) -> Parity:
    """Compare the rows that lm-eval took with the same rows of a suite.

    Args:
        lines: Observations of a suite with one response each.
        evaluation: What `baton eval` kept.
        places: Id of a row of the suite -> its place in the file, from 0.
    """
    model, (metric, *_) = evaluation["stage"], [name.partition(",")[0] for name in evaluation["figures"]]
    ours = {places[line["id"]]: line for line in lines}
    samples = sorted(evaluation["samples"], key=lambda sample: sample["doc_id"])
    pairs = [(ours[sample["doc_id"]], sample) for sample in samples if sample["doc_id"] in ours]
    return Parity(
        len(pairs),
        len(samples) - len(pairs),
        (sum(line["scores"][model] for line, _ in pairs), sum(sample[metric] for _, sample in pairs)),
        tuple(line["id"] for line, sample in pairs if line["responses"][model] != sample["resps"][0][0]),
        tuple(line["id"] for line, sample in pairs if line["scores"][model] != sample[metric]),
    )


def places_of(suite: Suite) -> dict[str, int]:
    """Id of each row of a suite -> its place among the rows of the suite's file, from 0; blank lines are none."""
    lines = Path(suite.source).read_bytes().splitlines()  # of text it would also split at U+2028, within a row
    places = {number: place for place, number in enumerate(n for n, line in enumerate(lines, 1) if line.strip())}
    return {item.id: places[int(item.row.origin.rpartition(":")[2])] for item in suite_rows.read(suite).chosen}


def read(suite: Path, evaluation: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The two files."""
    lines = suite.read_bytes().splitlines()
    return [json.loads(line) for line in lines], json.loads(evaluation.read_text(encoding="utf-8"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=__doc__)
    parser.add_argument("suite", type=Path, help="stages/NAME/suites/SUITE.jsonl of a run")
    parser.add_argument("evaluation", type=Path, help="evals/STAGE-DIGEST/TASK.json of a run")
    parser.add_argument("--definition", help="the suite's YAML file (default: Baton's own suite of that name)")
    chosen = parser.parse_args()
    lines, evaluation = read(chosen.suite, chosen.evaluation)
    _, suite = loader.suite(chosen.definition or chosen.suite.stem)
    places = places_of(suite)
    if unknown := [line["id"] for line in lines if line["id"] not in places]:
        raise SystemExit(
            f"{chosen.suite} has rows that {suite.source} has not: {unknown[0]} and {len(unknown) - 1} more"
        )
    sys.stdout.write(compare(lines, evaluation, places).sentence(evaluation["stage"]) + "\n")


if __name__ == "__main__":
    main()
