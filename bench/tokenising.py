"""Speed and memory of tokenising a text corpus into a document store.

`python -m bench.tokenising [--gigabytes 3]` generates documents, trains a tokenizer on the first of them, and streams
them through reading and encoding in one process, which notes its peak memory after 1/8, 1/4, 1/2 and all of the
documents. Beside it stands `datasets.load_dataset`, which only converts 1/8 of such a file to Arrow.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bench import processes
from bench.processes import Measured

WORDS, SENTENCES = 50_000, 20_000
SENTENCE_WORDS = (5, 26)
DOCUMENT_SENTENCES = (1, 60)
VOCABULARY, TRAINED_ON = 8192, 2_000
"""Size of the tokenizer's vocabulary, and documents that it is trained on."""
END = "<|end|>"
PARTS = (8, 4, 2, 1)
"""Memory is noted after a whole divided by each of these."""


def write_corpus(path: Path, gigabytes: float, seed: int = 0) -> int:
    """Write documents of made-up words whose frequencies follow Zipf's law; returns how many."""
    random = np.random.default_rng(seed)
    sentences = _sentences(random)
    written = documents = 0
    with path.open("x", encoding="utf-8") as stream:
        while written < gigabytes * 1e9:
            chosen = random.integers(SENTENCES, size=random.integers(*DOCUMENT_SENTENCES))
            text = " ".join(sentences[number] for number in chosen.tolist())
            written += stream.write(json.dumps({"text": text}) + "\n")
            documents += 1
    return documents


def train(path: Path, directory: Path) -> None:
    """Train a byte-level tokenizer on a corpus' first documents and store it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(islice(_texts(path), TRAINED_ON), trainer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def tokenise(path: Path, tokenizer_directory: Path, documents: int) -> None:
    """Read, encode and write all documents, noting time and memory on the way."""
    from data.document_store import DocumentStore, DocumentWriter, encoded
    from data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_directory)
    places = {documents // part: part for part in PARTS}
    marks: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        store = Path(directory) / "store"
        began = time.perf_counter()
        with DocumentWriter(store, tokenizer.eos_token_id) as writer:
            for number, ids in enumerate(encoded(tokenizer, _texts(path)), 1):
                writer.extend([ids])
                if number in places:
                    marks.append({"part": places[number], **_mark(began, writer.tokens)})
        assert len(DocumentStore(store)) == documents
    processes.report(marks=marks)


def measure(gigabytes: float) -> None:
    """Measure, print and save."""
    with tempfile.TemporaryDirectory() as directory:
        path, head, tokenizer = (Path(directory) / name for name in ("corpus.jsonl", "head.jsonl", "tokenizer"))
        made = processes.run("bench.tokenising", "generate", path, str(gigabytes))
        processes.run("bench.tokenising", "generate", head, str(gigabytes / PARTS[0]))
        sizes = {"corpus": path.stat().st_size, "head": head.stat().st_size}
        processes.run("bench.tokenising", "train", path, tokenizer)
        documents = made.said["documents"]
        tokenised = processes.run("bench.tokenising", "tokenise", path, tokenizer, str(documents))
        loaded = processes.run("bench.data", "datasets-once", head, HF_HUB_OFFLINE="1")
    machine = processes.machine("datasets", "numpy", "tokenizers", "transformers")
    record = {
        "documents": documents,
        "bytes": sizes,
        "machine": machine,
        "marks": tokenised.said["marks"],
        "seconds": tokenised.seconds,
        "datasets": {"seconds": loaded.seconds, "peak_mib": loaded.peak_mib},
    }
    text = _page(documents, sizes, tokenised, loaded, machine)
    sys.stdout.write(text + "\n")
    processes.save("data-tokenising", record, text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tokenising", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    commands = parser.add_subparsers(dest="command")
    for command, arguments in _STEPS.items():
        step = commands.add_parser(command)
        for name, kind in arguments.items():
            step.add_argument(name, type=kind)
    chosen = vars(parser.parse_args())
    command, whole = chosen.pop("command"), chosen.pop("gigabytes")
    if command == "generate":
        processes.report(documents=write_corpus(chosen["path"], chosen["size"]))
    elif command == "train":
        train(chosen["path"], chosen["directory"])
        processes.report()
    elif command == "tokenise":
        tokenise(chosen["path"], chosen["directory"], chosen["documents"])
    else:
        measure(whole)


_STEPS: dict[str, dict[str, Any]] = {
    "generate": {"path": Path, "size": float},
    "train": {"path": Path, "directory": Path},
    "tokenise": {"path": Path, "directory": Path, "documents": int},
}
"""The steps that run in processes of their own, with their arguments."""


def _sentences(random: np.random.Generator) -> list[str]:
    letters = np.array(list("etaoinshrdlucmwfgypbvk"))
    words = ["".join(random.choice(letters, random.integers(2, 11))) for _ in range(WORDS)]
    frequencies = 1 / np.arange(2, WORDS + 2)
    chosen = random.choice(WORDS, (SENTENCES, SENTENCE_WORDS[1]), p=frequencies / frequencies.sum()).tolist()
    lengths = random.integers(*SENTENCE_WORDS, size=SENTENCES).tolist()
    return [
        " ".join(words[number] for number in numbers[:length]).capitalize() + "."
        for numbers, length in zip(chosen, lengths, strict=True)
    ]


def _texts(path: Path) -> Iterator[str]:
    from data.findings import BadRow, Findings
    from data.sources import records
    from pipeline.config import DataSource

    for located in records(DataSource(source=str(path), format="text"), Findings()):
        if isinstance(located, BadRow):
            raise located
        yield str(located.record["text"])


def _mark(began: float, tokens: int) -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": time.perf_counter() - began, "tokens": tokens, "peak_mib": peak}


def _page(documents: int, sizes: dict[str, int], tokenised: Measured, loaded: Measured, machine: dict[str, Any]) -> str:
    rows = [
        (
            f"1/{mark['part']}" if mark["part"] > 1 else "all",
            f"{mark['seconds']:,.1f}",
            f"{sizes['corpus'] / mark['part'] / mark['seconds'] / 1e6:,.1f}",
            f"{mark['tokens'] / mark['seconds']:,.0f}",
            f"{mark['peak_mib']:,.0f}",
        )
        for mark in tokenised.said["marks"]
    ]
    speed = sizes["head"] / loaded.seconds / 1e6
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return "\n\n".join(
        [
            "# Tokenising a generated corpus",
            f"{documents:,} documents, {sizes['corpus'] / 1e6:,.0f} MB of JSONL, a vocabulary of {VOCABULARY}; one "
            "process from the first document on, its start not counted.",
            processes.table(["read", "seconds", "MB/s", "tokens/s", "peak memory in MiB"], rows),
            f"`datasets.load_dataset` alone on {sizes['head'] / 1e6:,.0f} MB, only to Arrow, its start counted: "
            f"{loaded.seconds:,.1f} s, {speed:,.1f} MB/s, peak {loaded.peak_mib:,.0f} MiB.",
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['system']}; "
            f"Python {machine['python']}; {versions}.",
        ]
    )


if __name__ == "__main__":
    main()
