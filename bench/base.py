"""The model that both sides of a comparison start from: a pretrained one, or one of any shape that is made here."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from bench.shape import GGUF
from data.gguf import converted
from data.tokenizer import load_tokenizer
from pipeline.config import DataSource, Optimizer, PretrainSettings, StageSettings, TokenizerSettings
from pipeline.contract import Artifact, Context
from pipeline.fingerprint import file_sha256
from stages import pretrain, tokenizer

PRETRAINING: dict[str, Any] = {"examples_per_step": 16, "max_length": 256, "tokens_per_batch": 1024}
LEARNING_RATE = 2e-3


def make(shape: Path, data: Path, directory: Path, device: str, *, pretrained: bool) -> None:
    """Write a base: a GGUF file converted to a model directory, or a tokenizer trained on the data, and weights.

    The weights are random, and then trained for the shape's `pretraining_steps` on the rows that are not held out.
    """
    work = directory.with_name(directory.name + "-work")
    shutil.rmtree(work, ignore_errors=True)
    if shape.suffix == GGUF:
        shutil.copytree(converted(shape, file_sha256(shape)), work).rename(directory)
        return
    content = yaml.safe_load(shape.read_text(encoding="utf-8"))
    source = DataSource(source=str(data))
    settings = TokenizerSettings(data="rows", vocab_size=content["tokens"])
    tokenizer.run(context(settings, source, {}, work / "tokenizer"))
    random = _random(content, work / "tokenizer", work / "random", device)
    steps = content.get("pretraining_steps", 0) if pretrained else 0
    if steps:
        optimizer = Optimizer(learning_rate=LEARNING_RATE)
        longer = PretrainSettings(policy="random", data="rows", steps=steps, optimizer=optimizer, **PRETRAINING)
        inputs = {"policy": Artifact(random, "model", "random")}
        pretrain.run(context(longer, source, inputs, work / "trained", device=device))
    (work / ("trained" if steps else "random")).rename(directory)
    shutil.rmtree(work)


def context(
    settings: StageSettings, source: DataSource, inputs: Mapping[str, Artifact], directory: Path, **options: Any
) -> Context:
    """What a stage is run with outside of a run: one data source, and a directory that is made for it."""
    directory.mkdir(parents=True)
    return Context(
        name="bench",
        settings=settings,
        inputs=inputs,
        data={"data": source},
        directory=directory,
        say=lambda line: None,
        sources={"rows": source},
        **{"progress": _unfollowed, "device": "cpu", **options},
    )


def _random(content: Mapping[str, Any], tokens: Path, directory: Path, device: str) -> Path:
    """A model with random weights, and the tokenizer beside it; returns its directory."""
    words = load_tokenizer(tokens)
    options = dict(content["architecture"])
    config = AutoConfig.for_model(
        options.pop("model_type"),
        **options,
        vocab_size=content.get("embeddings", len(words)),
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, content.get("dtype", "float32")))
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def _unfollowed(record: Mapping[str, Any], *, done: int, total: int) -> None:
    """Progress that nobody follows."""
