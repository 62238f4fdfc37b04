"""Speed and memory of reading data.

`python -m bench.data doctor [--pairs 160000] [--repeats 3]` generates preference pairs, about 300 MB at the default
number, and measures the doctor beside `datasets.load_dataset`, which only converts the file to Arrow. Every
measurement is a process of its own; the two take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import processes
from bench.processes import Measured

WORDS = 8_000
PROMPT_WORDS = (60, 150)
RESPONSE_WORDS = (80, 196)
SENTENCE = 12
FAULTY = 0.01
"""Share of the rows that repeat an earlier row, and as much again that contradict one."""
SIDES = ("doctor", "datasets")


def write_pairs(path: Path, count: int, seed: int = 0) -> None:
    """Write preference pairs of made-up words whose frequencies follow Zipf's law."""
    random = np.random.default_rng(seed)
    vocabulary = _vocabulary(random)
    frequencies = np.cumsum(1 / np.arange(2, WORDS + 2))
    frequencies /= frequencies[-1]
    earlier: dict[str, str] = {}
    with path.open("x", encoding="utf-8") as stream:
        for _ in range(count):
            fault = random.random()
            if earlier and fault < FAULTY:
                row = earlier
            elif earlier and fault < 2 * FAULTY:
                row = {**earlier, "chosen": earlier["rejected"], "rejected": earlier["chosen"]}
            else:
                lengths = [random.integers(*bounds) for bounds in (PROMPT_WORDS, RESPONSE_WORDS, RESPONSE_WORDS)]
                texts = [_text(vocabulary[np.searchsorted(frequencies, random.random(length))]) for length in lengths]
                row = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
                earlier = row if fault > 0.5 else earlier
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def examine(path: Path) -> None:
    """Read and examine a file, as `baton doctor` does."""
    from data.doctor import Examination
    from data.read import scan
    from pipeline.config import DataSource

    source = DataSource(source=str(path))
    examination = Examination(source.name, held_out=source.held_out)
    for reading in scan(source, examination.findings):
        examination.see(reading)
    diagnosis = examination.diagnose()
    processes.report(rows=diagnosis.rows, findings=diagnosis.findings.counts())


def load(path: Path) -> None:
    """Read a file with `datasets`, into a new cache."""
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        processes.report(rows=len(loaded))


def measure_doctor(pairs: int, repeats: int) -> None:
    """Measure, print and save."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pairs.jsonl"
        processes.run("bench.data", "generate", path, "--pairs", str(pairs))
        size = path.stat().st_size
        measured: dict[str, list[Measured]] = {side: [] for side in SIDES}
        for _ in range(repeats):
            for side in SIDES:
                measured[side].append(processes.run("bench.data", side + "-once", path, HF_HUB_OFFLINE="1"))
    packages = processes.machine("datasets", "numpy", "pyarrow")
    record = {"pairs": pairs, "bytes": size, "machine": packages, **{side: _record(measured[side]) for side in SIDES}}
    text = _page(pairs, size, measured, packages)
    sys.stdout.write(text + "\n")
    processes.save("data-doctor", record, text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor")
    doctor.add_argument("--pairs", type=int, default=160_000)
    doctor.add_argument("--repeats", type=int, default=3)
    generate = commands.add_parser("generate")
    generate.add_argument("path", type=Path)
    generate.add_argument("--pairs", type=int, default=160_000)
    for side in SIDES:
        commands.add_parser(side + "-once").add_argument("path", type=Path)
    chosen = parser.parse_args()
    if chosen.command == "doctor":
        measure_doctor(chosen.pairs, chosen.repeats)
    elif chosen.command == "generate":
        write_pairs(chosen.path, chosen.pairs)
        processes.report()
    else:
        (examine if chosen.command == "doctor-once" else load)(chosen.path)


def _vocabulary(random: np.random.Generator) -> np.ndarray[Any, np.dtype[Any]]:
    """Words of two to ten letters, the frequent ones short; some rare ones with a letter that is not ASCII."""
    letters = np.array(list("etaoinshrdlucmwfgypbvk"))
    words = []
    for rank in range(WORDS):
        longest = 4 + min(7, rank // 150)
        word = "".join(random.choice(letters, random.integers(2, longest)))
        words.append(word + "é" if rank % 400 == 399 else word)
    return np.array(words, dtype=object)


def _text(words: np.ndarray[Any, np.dtype[Any]]) -> str:
    return " ".join(_sentences(words.tolist()))


def _sentences(words: list[str]) -> Iterator[str]:
    for start in range(0, len(words), SENTENCE):
        yield " ".join(words[start : start + SENTENCE]).capitalize() + "."


def _record(measured: list[Measured]) -> dict[str, Any]:
    return {
        "seconds": [each.seconds for each in measured],
        "processor_seconds": [each.processor_seconds for each in measured],
        "peak_mib": [each.peak_mib for each in measured],
        "said": measured[0].said,
    }


def _page(pairs: int, size: int, measured: dict[str, list[Measured]], machine: dict[str, Any]) -> str:
    names = {"doctor": "the doctor", "datasets": "`datasets.load_dataset` alone"}
    rows = [
        (
            names[side],
            processes.spread([each.seconds for each in runs]),
            processes.spread([each.processor_seconds for each in runs]),
            processes.spread([pairs / each.seconds for each in runs], 0),
            processes.spread([each.peak_mib for each in runs], 0),
        )
        for side, runs in measured.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return "\n\n".join(
        [
            "# The doctor on generated preference pairs",
            f"{pairs:,} pairs, {size / 1e6:,.0f} MB of JSONL; median [least, most] of {len(measured['doctor'])} runs, "
            "each in a process of its own, imports included, taking turns.",
            processes.table(["", "seconds", "processor seconds", "rows per second", "peak memory in MiB"], rows),
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['system']}; "
            f"Python {machine['python']}; {versions}.",
        ]
    )


if __name__ == "__main__":
    main()
