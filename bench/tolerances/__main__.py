"""Every tolerance: the largest difference where nothing is wrong, and what each check sees of a planted fault.

python -m bench.tolerances --model DIRECTORY_OR_GGUF --pairs FILE.jsonl --out FILE.json
python -m bench.tolerances --families --out FILE.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.families import FAMILIES, LAYOUTS, tiny, tokenizer
from bench.tolerances.checks import Line, exports, heads, layouts, normalisations, replays, sampling
from bench.tolerances.subjects import PRECISIONS, RATE, Subject, compute, made, pairs_of, prepare, random_pairs
from data import gguf
from pipeline.contract import Artifact
from pipeline.fingerprint import file_sha256
from stages.core.models import load_model


def measured(subject: Subject) -> Iterator[Line]:
    """All checks in both precisions."""
    for precision in PRECISIONS:
        language_model = load_model(subject.tuned, compute(precision))
        lines = [layouts(language_model, subject.trees, subject.layout), heads(language_model)]
        lines += [normalisations(language_model), replays(subject, precision), sampling(subject, precision)]
        for of_check in lines:
            for each in of_check:
                yield {"model": subject.name, "precision": precision, **each}
    for each in exports(subject):
        yield {"model": subject.name, "precision": "float32", **each}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tolerances", description=__doc__)
    parser.add_argument("--model", type=Path, help="a model directory, or a GGUF file")
    parser.add_argument("--pairs", type=Path, help="JSON lines with prompt, chosen and rejected")
    parser.add_argument("--families", nargs="*", choices=FAMILIES, help="tiny models with random weights instead")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found, began = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if options.families is not None:
            for family in options.families or FAMILIES:
                tiny(family, torch.float32).save(made(work / family / "base"))
                base = Artifact(work / family / "base", "model", "base", source="base")
                trees = random_pairs(40, len(tokenizer()))
                found += measured(prepare(family, base, trees, LAYOUTS[family], work / family, 10 * RATE))
        else:
            path = options.model
            if path.is_file():
                path = gguf.converted(path, file_sha256(path))
            base = Artifact(path, "model", "base", source=str(options.model))
            trees = pairs_of(options.pairs, load_model(base, compute("bfloat16")), 40)
            found += measured(prepare(options.model.stem, base, trees, "packed", work))
    record = {"seconds": round(time.perf_counter() - began), "threads": torch.get_num_threads(), "lines": found}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
