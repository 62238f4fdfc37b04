"""Loading models: complete, frozen, with their own tokenizer, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from transformers import LlamaForCausalLM

from bench import families
from data.batch import batches
from data.template import tokenizer_record
from data.tokenizer import load_tokenizer
from pipeline.errors import ArtifactError, ConfigError
from stages.core.forward import token_logprobs
from stages.core.models import load_model, require_plain_head
from stages.core.roles import POLICY, Roles
from stages.pretrain import from_nothing


def edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("kind", [*models.KINDS, "mistral"])
def test_a_stored_model_has_exactly_its_weights_and_tokenizer_again(tmp_path: Path, kind: str) -> None:
    base = models.save_base(tmp_path / "base", kind)
    loaded = load_model(base, models.CPU)
    assert not models.changed(loaded.model, models.snapshot(models.model(kind)))
    assert len(loaded.tokenizer) == len(models.tokenizer())
    assert tokenizer_record(loaded.tokenizer) == tokenizer_record(models.tokenizer())


def test_a_tokenizer_alone_is_loaded_as_it_was_stored(tmp_path: Path) -> None:
    models.tokenizer().save_pretrained(tmp_path)
    assert tokenizer_record(load_tokenizer(tmp_path)) == tokenizer_record(models.tokenizer())


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        (3, r"base: tensors missing: model\.layers\.2\."),
        (1, r"base: tensors not of this model: model\.layers\.1\."),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path, layers: int, problem: str) -> None:
    base = models.save_base(tmp_path / "base")
    edit_config(base.directory, num_hidden_layers=layers)
    with pytest.raises(ArtifactError, match=problem):
        load_model(base, models.CPU)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    base = models.save_base(tmp_path / "base")
    edit_config(base.directory, intermediate_size=40)
    named = r"of another shape: .*down_proj.weight \(32, 48\) in the file, \(32, 40\) in the model"
    with pytest.raises(ArtifactError, match=named):
        load_model(base, models.CPU)


def test_fewer_embedding_rows_than_tokens_are_refused(tmp_path: Path) -> None:
    base = models.save_base(tmp_path / "base")
    tokenizer = models.tokenizer.__wrapped__()
    tokenizer.add_tokens([f"extra {number}" for number in range(3)])
    tokenizer.save_pretrained(base.directory)
    with pytest.raises(ArtifactError, match="the tokenizer has"):
        load_model(base, models.CPU)


def test_a_loaded_model_is_frozen_and_in_the_precision_asked_for(tmp_path: Path) -> None:
    base = models.save_base(tmp_path / "base")
    half = load_model(base, models.HALF)
    assert {each.dtype for each in half.model.parameters()} == {torch.bfloat16}
    assert not any(each.requires_grad for each in half.model.parameters())
    assert not half.model.training
    assert {each.dtype for each in load_model(base, models.HALF, dtype="auto").model.parameters()} == {torch.float32}


def test_adapters_on_a_bfloat16_base_are_float32(tmp_path: Path) -> None:
    roles = Roles(load_model(models.save_base(tmp_path / "base"), models.HALF))
    roles.add(POLICY, models.LORA)
    assert {each.dtype for _, each in roles.parameters(POLICY)} == {torch.float32}


def test_weights_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    language_model = models.language_model()
    language_model.model.lm_head.weight.data[3, 3] = torch.inf
    with pytest.raises(ArtifactError, match=r"lm_head.weight"):
        language_model.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_logits_that_are_the_heads_pass(family: str, dtype: torch.dtype) -> None:
    require_plain_head(families.tiny(family, dtype).model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.5, 1.05, 8.0])
def test_logits_that_are_changed_after_the_head_are_refused(
    monkeypatch: pytest.MonkeyPatch, factor: float, dtype: torch.dtype
) -> None:
    model = models.model(dtype=dtype)
    forward = model.forward

    def scaled(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits * factor
        return output

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(ConfigError, match="changes its logits"):
        require_plain_head(model)


def test_a_stored_model_whose_logits_are_changed_after_the_head_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = models.save_base(tmp_path / "base")
    forward = LlamaForCausalLM.forward

    def scaled(self: LlamaForCausalLM, **inputs: Any) -> Any:
        output = forward(self, **inputs)
        output.logits = output.logits * 8
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ConfigError, match="changes its logits"):
        load_model(base, models.CPU)


def test_examples_are_no_longer_than_the_models_positions() -> None:
    language_model = models.language_model()
    positions = language_model.model.config.max_position_embeddings
    assert language_model.longest(positions + 1) == positions
    assert language_model.longest(positions - 1) == positions - 1


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "granite", "logits_scaling": 8.0},
        {"model_type": "cohere", "logit_scale": 0.25},
        {"model_type": "gemma2", "final_logit_softcapping": 3.0, "head_dim": 8},
        {"model_type": "mixtral", "num_local_experts": 2},
        {"model_type": "olmo2"},
    ],
    ids=lambda options: options["model_type"],
)
def test_architectures_of_many_kinds_are_built_and_read_as_they_compute(options: dict[str, Any]) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    positions = {"num_key_value_heads": 2, "max_position_embeddings": 64}
    made = from_nothing({**options, **shape, **positions}, models.tokenizer(), models.CPU, 32).model.eval()
    tree = models.responses(1)[0]
    tokens = [*tree.prompt, *tree.branches[0].tokens]
    logs = made(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    expected = [logs[at - 1, tokens[at]] for at in range(len(tree.prompt), len(tokens))]
    (batch,) = batches([tree], 1000, "plain")
    assert torch.allclose(token_logprobs(made, batch), torch.stack(expected), atol=1e-5)
