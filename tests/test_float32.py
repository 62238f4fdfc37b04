"""A model in float32, layer by layer: the numbers of a copy in float32, and the weights afterwards as they were."""

from __future__ import annotations

import copy
from pathlib import Path

import architectures
import models
import pytest
import torch
from torch import Tensor, nn

from data.batch import batches
from pipeline.config import Lora
from stages.core.device import Compute
from stages.core.float32 import in_float32
from stages.core.forward import token_logprobs
from stages.core.lora import held
from stages.core.models import decoder_layers
from stages.core.roles import POLICY, open_role

BFLOAT16 = Compute(torch.device("cpu"), torch.bfloat16)


@torch.no_grad()
def logprobs(model: nn.Module, layout: str = "plain") -> Tensor:
    (batch,) = batches(architectures.ragged(6), 10_000, layout)
    return token_logprobs(model, batch)


@pytest.mark.parametrize("kind", ["grouped", "gpt2", "qwen2", "qwen3", "gemma2", "granite", "cohere", "deepseek_v3"])
def test_the_numbers_are_those_of_a_copy_in_float32(kind: str) -> None:
    model = architectures.model(kind, torch.bfloat16)
    expected, rounded = logprobs(copy.deepcopy(model).float()), logprobs(model)
    with in_float32(model), BFLOAT16.autocast(), in_float32(model):
        found = logprobs(model)
    assert (found - expected).abs().max() < 1e-5 < (rounded - expected).abs().max()
    assert torch.equal(logprobs(model), rounded)


def test_one_layer_is_held_twice_and_no_more() -> None:
    model, wide = architectures.model("grouped", torch.bfloat16), []
    for layer in decoder_layers(model):
        layer.mlp.register_forward_hook(
            lambda *_: wide.append(sum(each.numel() for each in model.parameters() if each.dtype == torch.float32))
        )
    with in_float32(model):
        logprobs(model)
    assert wide == [sum(each.numel() for each in layer.parameters()) for layer in decoder_layers(model)]
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}


def test_weights_are_given_back_after_an_error_too() -> None:
    model = architectures.model("grouped", torch.bfloat16)
    before = {name: each.data_ptr() for name, each in model.named_parameters()}

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    handle = decoder_layers(model)[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"), in_float32(model):
        logprobs(model)
    handle.remove()
    assert {name: each.data_ptr() for name, each in model.named_parameters()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_adapter_in_use_is_computed_too(tmp_path: Path) -> None:
    stored = models.save_base(tmp_path / "base")
    exact, rounded = (open_role(stored, POLICY, Lora(rank=4), compute) for compute in (models.CPU, BFLOAT16))
    for roles in (exact, rounded):
        models.disturb(roles, POLICY)
    with exact.use(POLICY), rounded.use(POLICY), in_float32(rounded.base.model):
        # The base is float32 on disk; in bfloat16 it is another, which is what both shall compute with.
        weights = dict(rounded.base.model.named_parameters())
        for name, parameter in exact.base.model.named_parameters():
            parameter.data.copy_(weights[name].data.float())
        assert (logprobs(rounded.base.model) - logprobs(exact.base.model)).abs().max() < 1e-5


def test_autocast_inside_changes_nothing() -> None:
    model = architectures.model("grouped", torch.bfloat16)
    with in_float32(model):
        expected = logprobs(model)
        with BFLOAT16.autocast():
            assert torch.equal(logprobs(model), expected)


def test_a_base_in_float32_is_rounded_to_what_it_is_in_bfloat16(tmp_path: Path) -> None:
    stored = models.save_base(tmp_path / "base")
    wide, narrow = (open_role(stored, POLICY, Lora(rank=4), compute) for compute in (models.CPU, BFLOAT16))
    for roles in (wide, narrow):
        models.disturb(roles, POLICY)
    before = models.snapshot(wide.base.model)
    with wide.use(POLICY), in_float32(wide.base.model, torch.bfloat16):
        found = logprobs(wide.base.model)
    with narrow.use(POLICY), in_float32(narrow.base.model):
        assert (logprobs(narrow.base.model) - found).abs().max() < 1e-5
    with wide.use(POLICY):
        assert (logprobs(wide.base.model) - found).abs().max() > 1e-4
    assert models.changed(wide.base.model, before) == set()


@torch.no_grad()
def test_adapters_that_are_held_for_sampling_are_computed_in_float32_too() -> None:
    roles = models.roles(POLICY, compute=BFLOAT16)
    models.disturb(roles, POLICY)
    with roles.use(POLICY), in_float32(roles.base.model):
        expected = logprobs(roles.base.model)
    with roles.use(POLICY), held(roles.base.model):
        before = logprobs(roles.base.model)
        with in_float32(roles.base.model):
            assert torch.equal(logprobs(roles.base.model), expected)
        assert torch.equal(logprobs(roles.base.model), before)
