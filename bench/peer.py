"""The peer's side of a comparison: TRL's trainers, and for pretraining the Trainer of transformers.

`python -m bench.peer JOB` trains on `drawn.jsonl` in its order, given as conversations, and refuses to run when the
trainer has made other tokens of them than Baton. What a chat template writes after the last stop token is dropped, and
rows are padded with a token that ends no turn, as by Baton: TRL's reward trainer would otherwise read the token before
the end. Where a chat template does not mark the assistant's turns, which TRL's SFT trainer needs, that trainer is given
the tokens of `apply_chat_template` and the turns' places in them. A job's `variant` says which of the trainer's
ways to compute is taken:

padding-WEIGHTS       rows are padded to the longest of the step
padding_free-WEIGHTS  sft: the step's rows are laid end to end
bfd-WEIGHTS           sft: rows are packed beforehand, each kept whole; a step takes one packed row
wrapped-WEIGHTS       sft: as `bfd`, but rows are cut where a packed row ends, and attend to the rows before them
eager, compiled       pretrain: with `torch_compile` or without

WEIGHTS is the precision that the frozen base is held in, `float32` or `bfloat16`; matrix products are in the job's
precision by autocast. `-plain` behind it is without autocast: they are in the precision of the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.chat_template_utils import has_generation_markers

from bench import processes
from bench.job import Job
from bench.material import applied
from bench.rows import IGNORED, Row, by_step, labels, paths, plain_counts, read, until_stop
from bench.watch import Watch
from data.template import ChatTemplate
from data.tokenizer import load_tokenizer
from stages.core.device import avoid_broken_attention

Rows = Sequence[Row]
PACKED = ("bfd", "wrapped")
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


class Steps(TrainerCallback):
    """Follows the steps of a trainer."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has moved."""
        self._watch.step()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """A step's figures; the last ones are of the whole training and have no `loss`."""
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def train(job: Job, watch: Watch) -> dict[str, Any]:
    """Train; returns the losses and what each step trains on."""
    rows = read(job.directory / "drawn.jsonl")[: job.steps * job.examples_per_step]
    trainer = MAKE[job.kind](job, rows)
    trainer.train_dataset = _without_closing(job, trainer.train_dataset)
    counts = CHECK[job.kind](job, rows, trainer.train_dataset)
    steps = Steps(watch)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(steps)
    trainer.train()
    if job.result:
        trainer.save_model(job.result)
    return {"losses": steps.losses, **counts}


def make_sft(job: Job, rows: Rows) -> Trainer:
    """Every assistant turn is trained on, as by Baton."""
    way = _way(job)
    longest = max(len(path) for row in rows for path in paths(row))
    mean = sum(len(path) for row in rows for path in paths(row)) / len(rows)
    options = {
        "padding": {"max_length": job.max_length},
        "padding_free": {"max_length": None, "padding_free": True},
    }.get(way, {"max_length": max(longest, round(mean * job.examples_per_step)), "packing": True})
    tokenizer = padded_tokenizer(job)
    marked = has_generation_markers(tokenizer.get_chat_template())
    conversations = [row["prompt"] + row["chosen"] for row in rows]
    if marked:
        dataset = [{"messages": messages} for messages in conversations]
    else:
        stop_id = ChatTemplate(tokenizer).stop_id
        dataset = [labelled(tokenizer, stop_id, messages) for messages in conversations]
    arguments = _arguments(SFTConfig, job, assistant_only_loss=marked, **options)
    if way in PACKED:
        arguments.packing_strategy = way
        arguments.per_device_train_batch_size = 1
        arguments.max_steps, arguments.num_train_epochs = -1, 1
    return SFTTrainer(
        model=_causal(job, _weights(job)),
        args=arguments,
        train_dataset=Dataset.from_list(dataset),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
    )


def make_reward(job: Job, rows: Rows) -> Trainer:
    """The head is trained with the adapter, in float32."""
    model = AutoModelForSequenceClassification.from_pretrained(job.base, num_labels=1, dtype=_weights(job))
    model.score.float()
    return RewardTrainer(
        model=model,
        args=_arguments(RewardConfig, job, max_length=job.max_length),
        train_dataset=_pairs(rows),
        processing_class=padded_tokenizer(job),
        peft_config=LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **LORA),
    )


def make_dpo(job: Job, rows: Rows) -> Trainer:
    """The reference is the base with the adapter off, computed in every step."""
    return DPOTrainer(
        model=_causal(job, _weights(job)),
        args=_arguments(DPOConfig, job, max_length=job.max_length, beta=0.1, precompute_ref_log_probs=False),
        train_dataset=_pairs(rows),
        processing_class=padded_tokenizer(job),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
    )


def make_pretrain(job: Job, rows: Rows) -> Trainer:
    """All weights are trained, and held in float32."""
    blocks = [path for row in rows for path in paths(row)]
    return Trainer(
        model=_causal(job, torch.float32),
        args=_arguments(TrainingArguments, job, torch_compile=job.variant == "compiled"),
        train_dataset=Dataset.from_list([{"input_ids": block, "labels": block} for block in blocks]),
        data_collator=default_data_collator,
    )


def check_sft(job: Job, rows: Rows, made: Dataset) -> dict[str, list[int]]:
    """Tokens, trained tokens and examples of every step."""
    wanted = [(path, label) for row in rows for path, label in zip(paths(row), labels(row), strict=True)]
    packed = _way(job) in PACKED
    size = 1 if packed else job.examples_per_step
    if _way(job) == "wrapped":
        laid = list(chain.from_iterable(made["input_ids"]))
        _require_same(list(chain.from_iterable(ids for ids, _ in wanted))[: len(laid)], laid)
    elif packed:
        _require_same(sorted(wanted), sorted(_unpacked(made)))
    else:
        _require_same(wanted, list(zip(made["input_ids"], made["labels"], strict=True)))
    tokens = [len(ids) for ids in made["input_ids"]]
    reads = [sum(label != IGNORED for label in row) for row in made["labels"]]
    return {"tokens": by_step(tokens, size), "reads": by_step(reads, size)}


def check_reward(job: Job, rows: Rows, made: Dataset) -> dict[str, list[int]]:
    """Tokens and scored tokens of every step."""
    columns = (made["chosen_ids"], made["rejected_ids"])
    _require_same([paths(row) for row in rows], [list(each) for each in zip(*columns, strict=True)])
    return plain_counts(rows, job.examples_per_step)


def check_dpo(job: Job, rows: Rows, made: Dataset) -> dict[str, list[int]]:
    """Tokens and trained tokens of every step."""
    wanted = [[row["prompt_tokens"], *(each["tokens"] for each in row["responses"])] for row in rows]
    columns = (made["prompt_ids"], made["chosen_ids"], made["rejected_ids"])
    _require_same(wanted, [list(each) for each in zip(*columns, strict=True)])
    return plain_counts(rows, job.examples_per_step)


def check_pretrain(job: Job, rows: Rows, made: Dataset) -> dict[str, list[int]]:
    """Tokens and predicted tokens of every step; the blocks were given as tokens."""
    _require_same([path for row in rows for path in paths(row)], list(made["input_ids"]))
    return plain_counts(rows, job.examples_per_step)


MAKE = {"sft": make_sft, "reward": make_reward, "dpo": make_dpo, "pretrain": make_pretrain}
CHECK = {"sft": check_sft, "reward": check_reward, "dpo": check_dpo, "pretrain": check_pretrain}


def main() -> None:
    """Run one job; a variant that does not run here says why."""
    job = Job.read(Path(sys.argv[1]))
    disable_progress_bars()
    avoid_broken_attention()
    watch = Watch(job)
    try:
        found = train(job, watch)
    except Exception as error:  # whatever it is, it is the answer to whether this variant runs
        processes.report(failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    watch.report(**found)


def padded_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """The base's tokenizer; it pads with what Baton pads with, never with the token that ends a turn."""
    tokenizer = load_tokenizer(job.base)
    tokenizer.pad_token_id = ChatTemplate(tokenizer).padding_id
    return tokenizer


def labelled(tokenizer: PreTrainedTokenizerBase, stop_id: int, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """`input_ids` of a conversation, and `labels` where an assistant's turn is: from the header to the stop token."""
    tokens = until_stop(applied(tokenizer, messages), stop_id)
    labels = [IGNORED] * len(tokens)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(applied(tokenizer, messages[:number], prompt=True))
            stop = len(until_stop(applied(tokenizer, messages[: number + 1]), stop_id))
            labels[start:stop] = tokens[start:stop]
    return {"input_ids": tokens, "labels": labels}


def _without_closing(job: Job, made: Dataset) -> Dataset:
    """The trainer's rows of pairs, each response up to its stop token."""
    if job.kind not in ("dpo", "reward"):
        return made
    stop_id = ChatTemplate(load_tokenizer(job.base)).stop_id
    columns = ("chosen_ids", "rejected_ids")
    return made.map(lambda row: {name: until_stop(row[name], stop_id) for name in columns})


def _arguments(kind: type[TrainingArguments], job: Job, **options: Any) -> Any:
    """The trainer's arguments: what Baton's stage is given, no evaluation, nothing stored in between."""
    arguments = kind(
        output_dir=str(job.directory / "peer"),
        max_steps=job.steps,
        per_device_train_batch_size=job.examples_per_step,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=job.seed,
        bf16=job.dtype == "bfloat16" and not job.variant.endswith("-plain"),
        use_cpu=job.device == "cpu",
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=job.device == "cuda",
        **options,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # as Baton; asking counts them, once
    return arguments


def _causal(job: Job, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype)


def _pairs(rows: Rows) -> Dataset:
    return Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])


def _way(job: Job) -> str:
    return job.variant.partition("-")[0]


def _weights(job: Job) -> torch.dtype:
    return getattr(torch, job.variant.split("-")[1])


def _unpacked(made: Dataset) -> list[tuple[list[int], list[int]]]:
    """The rows within packed rows."""
    found = []
    for row in made:
        start = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    return found


def _require_same(ours: list[Any], theirs: list[Any]) -> None:
    if ours == theirs:
        return
    differing = sum(one != other for one, other in zip(ours, theirs, strict=False))
    raise ValueError(f"other tokens than Baton's: {len(theirs)} rows for {len(ours)}, {differing} of them differ")


if __name__ == "__main__":
    main()
