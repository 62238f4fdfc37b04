"""What both sides of a comparison are given: rows in one file, and the tokens and order in which Baton draws them.

`python -m bench.material JOB SHAPE BASE HELD-OUT` writes into the job's directory:

base/            a link to BASE, which is made if it is not there
rows.jsonl       preference pairs in conversational layout, for Baton's stage; some of their prompts are held out; for
                 pretraining there are none, since the stage reads the data itself, as text. A row is left out where
                 `apply_chat_template` makes other tokens of it, as happens where contents merge with control text
drawn.jsonl      the training rows in the order in which the stage takes them, with the tokens that it makes of them
held-out.jsonl   the held-out rows likewise
material.json    counts
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench import base, processes
from bench.job import Job
from bench.ours import stage_context
from bench.rows import read, until_stop
from data.findings import Findings
from data.mixture import stream
from data.read import scan
from data.schema import Preference
from data.split import is_held_out
from data.template import ChatTemplate
from data.tokenizer import load_tokenizer
from data.tree import Tree, conversation_tree, pair_tree, preference_tree
from pipeline.config import DataSource
from stages.core import rows
from stages.core.device import Compute
from stages.core.models import LanguageModel

HELD_OUT = DataSource.model_fields["held_out"].default
TREES = {"sft": conversation_tree, "reward": preference_tree, "dpo": pair_tree}


def make(job: Job, held_out: int) -> dict[str, Any]:
    """Write the material; returns counts.

    Args:
        job: The longest training that will be asked for.
        held_out: Held-out rows to keep.
    """
    counts = {} if job.kind == "pretrain" else _write_rows(job, held_out)
    model = without_weights(job)
    train, kept = _blocks(job, model, held_out) if job.kind == "pretrain" else examples(job, model)
    records = read(job.source) if counts else []
    write(job.directory / "drawn.jsonl", (_with_tokens(records, tree) for tree in train))
    write(job.directory / "held-out.jsonl", (_with_tokens(records, tree) for tree in kept))
    embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    every = sum(parameter.numel() for parameter in model.model.parameters())
    outside = {id(each.weight): each.weight.numel() for each in (embedding, head)}
    found = {
        **counts,
        "drawn": len(train),
        "held_out": len(kept),
        "parameters": every,
        "body": every - sum(outside.values()),
        "head": head.weight.numel(),
    }
    (job.directory / "material.json").write_text(json.dumps(found), encoding="utf-8")
    return found


def link_base(job: Job, shape: Path, stored: Path) -> None:
    """Give the material its base; one that is to be pretrained from nothing is not trained before."""
    if not stored.is_dir():
        base.make(shape, Path(job.data), stored, job.device, pretrained=job.kind != "pretrain")
    job.directory.mkdir(exist_ok=True)
    job.base.symlink_to(stored.resolve(), target_is_directory=True)


def main() -> None:
    """Run one job's preparation."""
    path, shape, stored = map(Path, sys.argv[1:4])
    job = Job.read(path)
    link_base(job, shape, stored)
    processes.report(**make(job, held_out=int(sys.argv[4])))


def _write_rows(job: Job, held_out: int) -> dict[str, int]:
    """As many rows as are drawn, and those that are held out; only such as both sides take whole."""
    template = ChatTemplate(load_tokenizer(job.base))
    wanted = {False: job.steps * job.examples_per_step, True: held_out}
    taken = {False: 0, True: 0}
    left_out = 0
    with (job.directory / "rows.jsonl").open("x", encoding="utf-8") as written:
        for row in pairs(Path(job.data)):
            side = is_held_out(row, HELD_OUT)
            if taken[side] == wanted[side]:
                continue
            tree = pair_tree(template, row, 0, job.max_length)
            if isinstance(tree, str) or tree.cut or not takes_turns(row) or not _is_rendered(template, row, tree):
                left_out += 1
                continue
            taken[side] += 1
            written.write(json.dumps(_record(row)) + "\n")
    return {"rows": sum(taken.values()), "left_out": left_out}


def pairs(data: Path) -> Iterator[Preference]:
    """The preferences of a file; what cannot be read as one is left out."""
    for reading in scan(DataSource(source=str(data)), Findings()):
        if isinstance(reading.row, Preference):
            yield reading.row


def takes_turns(row: Preference) -> bool:
    """Some dialogues of hh-rlhf have two turns of the assistant in a row, which conversational layout has not."""
    roles = [message.role for message in row.prompt]
    return roles == (["user", "assistant"] * len(roles))[: len(roles)] and roles[-1:] == ["user"]


def _is_rendered(template: ChatTemplate, row: Preference, tree: Tree) -> bool:
    """Whether `apply_chat_template`, which the peers call, makes the tree's tokens of the same row."""
    record = _record(row)
    prompt = applied(template.tokenizer, record["prompt"], prompt=True)
    conversations = [applied(template.tokenizer, record["prompt"] + record[key]) for key in ("chosen", "rejected")]
    expected = [[*tree.prompt, *branch.tokens] for branch in tree.branches]
    ended = [until_stop(tokens, template.stop_id) for tokens in conversations]
    return prompt == list(tree.prompt) and ended == expected


def applied(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool = False) -> list[int]:
    """The tokens that transformers makes of a conversation, or of a prompt with the assistant's header."""
    tokens: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    return tokens


def _record(row: Preference) -> dict[str, Any]:
    chosen, rejected = ([{"role": "assistant", "content": row.responses[index]}] for index in (0, -1))
    return {"prompt": turns(row), "chosen": chosen, "rejected": rejected}


def turns(row: Preference) -> list[dict[str, str]]:
    """The prompt in conversational layout."""
    return [{"role": message.role, "content": message.content} for message in row.prompt]


def without_weights(job: Job) -> LanguageModel:
    """The base as far as making tokens needs it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.base))
    return LanguageModel(model, load_tokenizer(job.base), Compute(torch.device("cpu"), torch.float32))


def examples(job: Job, model: LanguageModel) -> tuple[list[Tree], Sequence[Tree]]:
    """The trees that the stage draws, in its order, and the held-out ones."""
    found = rows.examples(stage_context(job, "tokens"), "data", TREES[job.kind], model)
    return list(islice(stream(found.passes, job.seed), job.steps * job.examples_per_step)), found.held_out


def _blocks(job: Job, model: LanguageModel, held_out: int) -> tuple[list[Tree], Sequence[Tree]]:
    found = rows.documents(stage_context(job, "tokens"), "data", model.tokenizer)
    passes, kept = (side.blocks(job.max_length) for side in (found.train, found.held_out))
    return list(islice(stream(passes, job.seed), job.steps * job.examples_per_step)), kept.pass_(0)[:held_out]


def _with_tokens(records: Sequence[dict[str, Any]], tree: Tree) -> dict[str, Any]:
    """A tree with the row that it was made of; a block of text, of which there are no records, has none."""
    row = records[int(tree.origin.rpartition(":")[2]) - 1] if records else {}
    responses = [{"tokens": branch.tokens, "read": branch.read} for branch in tree.branches]
    return {**row, "prompt_tokens": tree.prompt, "responses": responses}


def write(path: Path, written: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")


if __name__ == "__main__":
    main()
