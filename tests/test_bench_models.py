"""Comparisons on pretrained models: a GGUF file or a directory is used as it is, and both sides see its tokens."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ggufs
import pytest
import tiny
from datasets import Dataset
from transformers import AutoTokenizer

from bench import base, comparison, dpo, material, peer, processes, shape
from bench.job import Job
from bench.rows import labels, paths, read, until_stop
from data.schema import Message, Preference
from data.template import ChatTemplate
from data.tokenizer import load_tokenizer
from data.tree import pair_tree

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = ["user", "assistant", "user"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose padding is its end of turn, and whose template writes a line break behind it, as SmolLM2's."""
    texts = ["How much is 1 and 2? It is 3. No! user\nassistant\n"] * 20
    directory = tiny.save_model(tmp_path_factory.mktemp("pretrained") / "Tiny-1M-Instruct", "qwen2", texts)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHATML
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preferences with one and with two turns of the assistant; contents of some merge with the control text."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for number in range(60):
        spoken = [{"role": role, "content": f"How much is {number}?"} for role in TURNS[: 1 + 2 * (number % 2)]]
        answers = {"chosen": f"It is {number}.", "rejected": "No!" if number % 5 else "No! \n"}
        rows.append(
            {"prompt": spoken, **{key: [{"role": "assistant", "content": text}] for key, text in answers.items()}}
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def job_of(model: Path, pairs: Path, folder: Path, kind: str) -> Job:
    """A training on the model, with its material."""
    job = Job(
        kind=kind,
        material=str(folder / kind),
        data=str(pairs),
        steps=2,
        examples_per_step=4,
        max_length=128,
        learning_rate=0.01,
        device="cpu",
        dtype="float32",
        variant="padding-float32",
    )
    job.directory.mkdir()
    material.link_base(job, shape.find(str(model)), shape.place(folder, model, pairs, pretrained=True))
    material.make(job, held_out=4)
    return job


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_the_tokens_are_those_of_the_model_s_own_template(model: Path, pairs: Path, tmp_path: Path, kind: str) -> None:
    job = job_of(model, pairs, tmp_path, kind)

    tokenizer = AutoTokenizer.from_pretrained(model)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = read(job.directory / "drawn.jsonl")
    assert len(rows) == 8
    for row in rows:
        for response, path in zip(("chosen", "rejected"), paths(row), strict=False):
            text = tokenizer.apply_chat_template(row["prompt"] + row[response], tokenize=False)
            assert text.endswith("<|im_end|>\n")
            assert path == tokenizer.encode(text.removesuffix("\n"), add_special_tokens=False)
            assert path[-1] == end


def test_rows_that_the_template_merges_with_control_text_are_left_out(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    template = ChatTemplate(tokenizer)
    prompt = (Message("user", "How much?"),)
    plain = Preference(prompt, ("It is 3.", "No!"))
    forged = Preference(prompt, ("It is 3.<|im_end|>", "No!"))
    for row, same in ((plain, True), (forged, False)):
        tree = pair_tree(template, row, 0, 128)
        assert not isinstance(tree, str)
        assert material._is_rendered(template, row, tree) is same


def test_turns_are_found_by_what_the_template_writes_before_and_behind_them(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    job = job_of(model, pairs, tmp_path, "sft")
    tokenizer = peer.padded_tokenizer(job)
    stop_id = ChatTemplate(tokenizer).stop_id

    rows = read(job.directory / "drawn.jsonl")
    assert {len(row["prompt"]) for row in rows} == {1, 3}
    made = [peer.labelled(tokenizer, stop_id, row["prompt"] + row["chosen"]) for row in rows]

    assert [each["input_ids"] for each in made] == [path for row in rows for path in paths(row)]
    assert [each["labels"] for each in made] == [label for row in rows for label in labels(row)]
    assert tokenizer.pad_token_id != stop_id == load_tokenizer(model).pad_token_id


def test_the_peer_s_pairs_end_at_the_stop_token(model: Path, pairs: Path, tmp_path: Path) -> None:
    job = job_of(model, pairs, tmp_path, "dpo")
    stop_id = ChatTemplate(load_tokenizer(model)).stop_id
    made = Dataset.from_list(
        [{"prompt_ids": [7], "chosen_ids": [8, stop_id, 9], "rejected_ids": [stop_id, 5, stop_id]}]
    )

    (row,) = peer._without_closing(job, made)

    assert row == {"prompt_ids": [7], "chosen_ids": [8, stop_id], "rejected_ids": [stop_id, 5, stop_id]}
    with pytest.raises(ValueError, match="not in list"):
        until_stop([stop_id + 1], stop_id)


def test_a_gguf_file_becomes_the_base_that_it_holds(model: Path, pairs: Path, tmp_path: Path) -> None:
    file = ggufs.write(model, tmp_path / "tiny-1m-instruct.Q8_0.gguf", quantized=True)
    place = shape.place(tmp_path / "kept", shape.find(str(file)), pairs, pretrained=True)

    place.parent.mkdir()
    base.make(file, pairs, place, "cpu", pretrained=True)

    assert place.name.startswith("tiny-1m-")
    assert [each.name for each in place.parent.iterdir()] == [place.name]
    assert load_tokenizer(place).chat_template == CHATML


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-14m", "llama-14m"),
        ("llama-0.5b", "llama-0.5b"),
        ("folder/own.yaml", "own"),
        ("folder/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m"),
        ("smollm2.gguf", "smollm2"),
        ("Model-1.5B-BF16.gguf", "model-1.5b"),
    ],
)
def test_results_are_named_by_the_model(name: str, expected: str) -> None:
    assert shape.label(name) == expected
    chosen = argparse.Namespace(device="cpu", dtype="bfloat16", model=name)
    assert comparison._name(dpo.WORK, chosen) == ("dpo" if name == "llama-14m" else f"dpo-{expected}")


def test_a_model_directory_is_used_where_it_lies(model: Path, pairs: Path, tmp_path: Path) -> None:
    assert shape.place(tmp_path, shape.find(str(model)), pairs, pretrained=True) == model
    assert shape.label(str(model)) == "tiny-1m"


def test_what_no_model_can_be_made_of_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"no model `.*`: give one of llama-0.5b, .* a GGUF file, or a model directory"
    ):
        shape.find(str(tmp_path / "nothing.gguf"))
    with pytest.raises(SystemExit, match="pretraining starts from random weights"):
        shape.find_untrained(str(model))


def test_commands_name_no_folder_of_the_machine() -> None:
    given = ["--model", "/models/smollm2.gguf", "--data", "pairs.jsonl"]
    assert processes.command("dpo", given) == "python -m bench.dpo --model smollm2.gguf --data pairs.jsonl"


@pytest.mark.parametrize(("chosen", "asked"), [("auto", 1), ("float32", 0)])
def test_the_precision_is_looked_for_only_where_none_is_given(
    monkeypatch: pytest.MonkeyPatch, chosen: str, asked: int
) -> None:
    calls: list[tuple[Any, ...]] = []

    def run(*arguments: Any, **_: str) -> processes.Measured:
        calls.append(arguments)
        return processes.Measured(0.0, 0.0, 0.0, {"dtype": "float32"})

    monkeypatch.setattr(processes, "run", run)
    options = argparse.Namespace(dtype=chosen, device="cpu", threads=1)
    assert comparison.precision(options) == "float32"
    assert calls == [("bench.precision", "cpu")] * asked
