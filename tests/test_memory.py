"""Memory of stages: shapes against real models, properties of the estimate, and what `auto` chooses."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import models
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline import memory, shape
from pipeline.config import (
    DpoSettings,
    EvaluateSettings,
    Lora,
    Optimizer,
    PpoSettings,
    PretrainSettings,
    RewardSettings,
    RunSettings,
    SftSettings,
)
from pipeline.contract import Artifact, Context, NoCheckpoints
from pipeline.memory import Task, choose, estimate
from pipeline.shape import Base, Shape, UnknownShape
from stages.core import memory as fitting
from stages.core.roles import POLICY

SMOL = shape.planned(
    {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    49152,
)
"""SmolLM2-135M's."""
STAGES: dict[str, Any] = {
    "pretrain": PretrainSettings(policy="p", data="d", max_length=1024),
    "sft": SftSettings(policy="p", data="d"),
    "full": SftSettings(policy="p", data="d", lora=None),
    "reward": RewardSettings(policy="p", data="d"),
    "dpo": DpoSettings(policy="p", data="d"),
    "ppo": PpoSettings(policy="p", reward="r", data="d"),
    "evaluate": EvaluateSettings(models=["p"], prompts="d"),
}


def task(kind: str, device: str = "cpu", precision: str = "bfloat16", **changes: Any) -> Task:
    settings = STAGES[kind].model_copy(update=changes)
    return Task(settings, (Base(SMOL, "p"),), Lora() if kind == "ppo" else None, device, precision)


@pytest.mark.parametrize("kind", architectures._KINDS)
def test_the_weights_are_those_of_the_real_model(kind: str, tmp_path: Path) -> None:
    model = architectures.model(kind)
    model.save_pretrained(tmp_path)
    found = shape.of_directory(tmp_path)
    assert found.parameters == sum(each.numel() for each in model.parameters())
    whole = Task(STAGES["dpo"], (Base(found, "p"),), None, "cpu", "float32")
    assert estimate(whole, 256).weights == sum(each.nbytes for each in model.parameters())


@pytest.mark.parametrize("top", [None, 1])
@pytest.mark.parametrize("kind", ["llama", "grouped", "gpt2", "qwen2", "qwen3", "granite", "gemma2"])
def test_the_adapter_is_as_large_as_a_real_one(kind: str, top: int | None, tmp_path: Path) -> None:
    from stages.core.models import LanguageModel
    from stages.core.roles import Roles

    model, lora = architectures.model(kind), Lora(rank=4, top_layers=top)
    model.save_pretrained(tmp_path)
    roles = Roles(LanguageModel(model.requires_grad_(False), models.tokenizer(), models.CPU))
    roles.add(POLICY, lora)
    real = sum(each.numel() for _, each in roles.parameters(POLICY))
    assert shape.of_directory(tmp_path).adapter(lora) == real


def test_adapters_on_named_layers_are_smaller() -> None:
    named = SMOL.adapter(Lora(rank=8, targets=["q_proj", "v_proj"]))
    assert named == 30 * 8 * ((576 + 576) + (576 + 192))
    assert SMOL.adapter(Lora(targets=["no_such_layer"])) == 0


@pytest.mark.parametrize("kind", shape.PLANNED)
def test_the_tensors_of_an_architecture_are_known_before_it_is_trained(kind: str) -> None:
    sizes: dict[str, Any] = (
        {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
        if kind == "gpt2"
        else {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": kind == "qwen2",
        }
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, vocab_size=300))
    found = shape.planned({"model_type": kind, **sizes}, 300)
    assert found.parameters == sum(each.numel() for each in model.parameters())
    real = {name: tuple(each.shape) for name, each in model.named_parameters()}
    assert found == shape.of_tensors(model.config.to_dict(), real)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ({"model_type": "mamba"}, "`mamba` are not known"),
        ({"model_type": "gpt2", "n_embd": "abc", "n_layer": 2}, "cannot be read: ValueError"),
        ({"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": [3]}, "cannot be read: TypeError"),
        ({"model_type": ["llama"]}, "are not known"),
        ({"model_type": "llama"}, "does not give `hidden_size`"),
        ({"model_type": "gpt2"}, "does not give `hidden_size`"),
        ({"model_type": "qwen2", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}, "num_key_value"),
    ],
)
def test_what_an_architecture_leaves_open_is_named(architecture: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnknownShape, match=reason):
        shape.planned(architecture, 300)


def test_a_directory_without_weights_has_no_shape(tmp_path: Path) -> None:
    with pytest.raises(UnknownShape):
        shape.of_directory(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "num_hidden_layers": 1}')
    with pytest.raises(UnknownShape, match="no weights"):
        shape.of_directory(tmp_path)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", STAGES)
def test_the_estimate_grows_with_tokens_and_its_parts_add_up(kind: str, device: str, precision: str) -> None:
    found = [estimate(task(kind, device, precision), 2**power) for power in range(8, 17)]
    for before, after in itertools.pairwise(found):
        assert after.total >= before.total
        assert after.activations + after.cache >= before.activations + before.cache
        assert all(size >= before.parts[name] for name, size in after.parts.items() if name != "activations")
    for each in found:
        assert sum(each.parts.values()) == each.total
        assert min(each.parts.values()) >= 0
        assert (each.fixed > memory.IMPORTS) == (device == "cpu")
    assert found[-1].total > found[0].total


def test_what_saves_memory_lowers_the_estimate() -> None:
    whole = estimate(task("dpo"), 4096)
    assert estimate(task("dpo", gradient_checkpointing=True), 4096).activations < whole.activations / 8
    assert estimate(task("dpo", lora=Lora(top_layers=3)), 4096).activations < whole.activations / 5
    assert estimate(task("dpo", lora=Lora(rank=4)), 4096).adapters == pytest.approx(whole.adapters / 4)
    assert estimate(task("full", optimizer=Optimizer(name="adamw8bit")), 4096).optimizer == SMOL.parameters * 6
    assert estimate(task("dpo", precision="float32"), 4096).weights == 2 * whole.weights
    quantized = [estimate(task("sft", "cuda", quantization=bits), 512).weights for bits in ("none", "8bit", "4bit")]
    assert quantized == sorted(quantized, reverse=True)


def test_a_step_of_few_examples_fills_no_large_batch() -> None:
    short = task("sft", examples_per_step=2, max_length=256)
    assert estimate(short, 8192).activations == estimate(short, 512).activations


def test_ppo_holds_four_roles_on_one_base() -> None:
    found, own = estimate(task("ppo"), 1024), SMOL.adapter(Lora()) * 4
    assert found.weights == SMOL.parameters * 2
    assert found.adapters == 4 * own  # policy, reward model, value function, the best policy so far
    assert found.optimizer == 2 * own * 3
    assert estimate(task("ppo", value="head"), 1024).adapters == 3 * own
    begun = dataclasses.replace(task("ppo"), bases=(Base(SMOL, "p", adapter=Lora()),))
    assert estimate(begun, 1024).adapters == 5 * own  # the reference too


def test_models_on_one_base_count_once() -> None:
    several = (Base(SMOL, "p"), Base(SMOL, "p", Lora()), Base(SMOL, "q"))
    found = estimate(dataclasses.replace(task("evaluate"), bases=several, reward=Lora()), 1024)
    assert found.weights == 2 * SMOL.parameters * 2
    assert found.adapters == 2 * SMOL.adapter(Lora()) * 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", STAGES)
def test_auto_chooses_the_largest_batch_within_its_share(kind: str, device: str) -> None:
    stage = task(kind, device)
    part, largest = memory.share(stage), memory.LARGEST.get(device, 8192)
    allowed = [tokens for tokens in (1024 << power for power in range(10)) if tokens <= largest]
    for free in (10**8, 10**9, 3 * 10**9, 10**10, 3 * 10**10, 10**11, 10**13):
        fitting = [each for each in allowed if estimate(stage, each, imports=0).total <= part * free]
        assert choose(stage, free) == max(fitting, default=1024)
    assert choose(stage, None) == 8192


def test_auto_is_not_below_the_longest_example() -> None:
    assert choose(task("sft", max_length=700), 1) == 1024
    assert choose(task("sft", max_length=20), 1) == memory.SMALLEST
    assert choose(task("sft", max_length=100_000), 1) == 8192


def test_a_pair_of_smollm2_takes_three_gigabytes_of_eight() -> None:
    pairs = task("dpo", examples_per_step=16)
    tokens = choose(pairs, 8 * 10**9 - memory.IMPORTS)
    assert estimate(pairs, tokens).total <= 3 * 10**9
    assert estimate(pairs, 8192).total > 6 * 10**9


@pytest.mark.parametrize(
    ("given", "limit"), [("auto", None), ("8GB", 8 * 10**9), ("500MB", 5 * 10**8), ("1.5 GB", 15 * 10**8)]
)
def test_a_limit_is_a_size(given: str, limit: int | None) -> None:
    settings = RunSettings(
        output="o",
        memory=given,
        stages={"s": STAGES["dpo"].model_copy(update={"data": "d"})},
        data={"d": {"source": "x.jsonl"}},
    )
    assert settings.memory_limit == limit


def test_sizes_are_told_in_words() -> None:
    assert memory.in_words(2_312_345_678) == "2.31 GB"
    assert memory.in_words(412_000_000) == "412 MB"
    said = memory.parts_in_words(estimate(task("dpo"), 1024))
    assert said.startswith("2.")
    assert "cache" not in said


class Earlier(NoCheckpoints):
    """A checkpoint that was made with batches of so many tokens."""

    def __init__(self, tokens: int | None) -> None:
        self.tokens, self.told = tokens, 0

    def tokens_per_batch(self) -> int | None:  # type: ignore[override]
        return self.tokens

    def made_with(self, tokens_per_batch: int) -> None:
        self.told = tokens_per_batch


def started(tmp_path: Path, *, tokens: Any = "auto", limit: int | None = None, earlier: int | None = None) -> Any:
    """A stage that starts on a tiny model: its context, what it said, and its checkpoints."""
    if not (tmp_path / "config.json").exists():
        models.language_model().save(tmp_path)
    said: list[str] = []
    checkpoints = Earlier(earlier)
    context = Context(
        name="dpo",
        settings=DpoSettings(policy="p", data="d", max_length=64, tokens_per_batch=tokens),
        inputs={"policy": Artifact(tmp_path, "model", "digest")},
        data={},
        directory=tmp_path,
        progress=lambda record, *, done, total: None,
        say=said.append,
        memory=limit,
        checkpoints=checkpoints,
    )
    return SimpleNamespace(fitted=fitting.fit(context, models.CPU), said=said, checkpoints=checkpoints)


def test_a_stage_resolves_auto_says_so_and_records_what_it_expects(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fitting.available, "memory", lambda limit: 10**10)
    begun = started(tmp_path)
    assert begun.fitted.context.settings.tokens_per_batch == 8192
    assert begun.fitted.expected.tokens_per_batch == 8192
    assert begun.said == ["tokens_per_batch auto: 8,192, of 10.00 GB that are free"]
    assert begun.checkpoints.told == 8192


def test_a_number_is_kept_and_not_told(tmp_path: Path) -> None:
    begun = started(tmp_path, tokens=77)
    assert begun.fitted.context.settings.tokens_per_batch == 77
    assert begun.fitted.expected.tokens_per_batch == 77
    assert begun.said == []


def test_too_little_memory_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fitting.available, "memory", lambda limit: 3 * 10**7)
    begun = started(tmp_path)
    assert begun.fitted.context.settings.tokens_per_batch == memory.SMALLEST
    assert begun.said[-1].startswith("warning: about ")
    assert "30 MB are free" in begun.said[-1]


@pytest.mark.parametrize(
    ("free", "earlier", "chosen"),
    [(10**13, 1024, 1024), (10**13, None, 8192), (5 * 10**7, 8192, 256), (8 * 10**7, 512, 512)],
    ids=["more memory now", "no checkpoint", "no room any more", "room, though not a third"],
)
def test_a_stage_that_goes_on_keeps_its_batches_where_they_fit(
    tmp_path: Path, monkeypatch: Any, free: int, earlier: int | None, chosen: int
) -> None:
    monkeypatch.setattr(fitting.available, "memory", lambda limit: free)
    begun = started(tmp_path, earlier=earlier)
    assert begun.fitted.context.settings.tokens_per_batch == chosen
    assert any("no longer fits" in line for line in begun.said) == (earlier == 8192)


def test_without_a_shape_the_default_is_taken_and_the_reason_told(tmp_path: Path) -> None:
    models.language_model().save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    begun = started(tmp_path)
    assert begun.fitted.context.settings.tokens_per_batch == 8192
    assert begun.fitted.expected is None
    assert "memory not estimated: the configuration does not give `hidden_size`" in begun.said[0]


@pytest.mark.parametrize(
    "config",
    [
        '{"hidden_size": "large", "num_hidden_layers": 1}',
        '{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": -9, "text_config": 3}',
        "[]",
        "{",
    ],
)
def test_a_configuration_that_cannot_be_read_makes_no_estimate(config: str, tmp_path: Path) -> None:
    models.language_model().save(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UnknownShape):
        shape.of_directory(tmp_path)


def test_a_shape_counts_layers_without_attention_too() -> None:
    found = shape.of_tensors({"hidden_size": 8, "num_hidden_layers": 1}, {"layers.0.mixer.in_proj.weight": (16, 8)})
    assert found == Shape(128, 128, 1, 8, 1, 1, 8, 32, 16, {"layers.0.mixer.in_proj": 24})


@pytest.mark.parametrize("given", ["0GB", "lots", "8", 8, "8GiB", "-1GB", None])
def test_what_is_no_size_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="should be `auto` or a size such as `8GB`"):
        RunSettings.model_validate(
            {
                "output": "o",
                "memory": given,
                "data": {"d": {"source": "x.txt"}},
                "stages": {"s": {"kind": "tokenizer", "data": "d"}},
            }
        )


@pytest.mark.parametrize("given", [0, -5, 1.5, True, "many", "8192", None])
def test_what_is_no_number_of_tokens_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="should be `auto` or a whole number above 0"):
        DpoSettings(policy="p", data="d", tokens_per_batch=given)
