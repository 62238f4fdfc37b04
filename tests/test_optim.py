"""Which optimizer gets which weight, and the learning rate over time."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from pipeline.config import Optimizer
from stages.core import optim

EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "wpe")


def named(kind: str) -> list[tuple[str, nn.Parameter]]:
    return list(models.model(kind).requires_grad_(True).named_parameters())


def owned(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(each) for group in optimizer.param_groups for each in group["params"]}


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_trained_weight_has_one_optimizer_and_no_frozen_one_has_any(kind: str, name: str) -> None:
    parameters = named(kind)
    for _, frozen in parameters[::3]:
        frozen.requires_grad_(False)
    built = optim.build(parameters, Optimizer(name=name))
    owners = [owned(each) for each in built]
    assert sum(map(len, owners)) == len(set().union(*owners))
    assert set().union(*owners) == {id(each) for _, each in parameters if each.requires_grad}


@pytest.mark.parametrize("kind", models.KINDS)
def test_muon_gets_the_inner_matrices_only(kind: str) -> None:
    parameters = named(kind)
    muon, adamw = optim.build(parameters, Optimizer(name="muon"))
    assert isinstance(muon, Muon)
    assert isinstance(adamw, AdamW)
    for name, parameter in parameters:
        inner = parameter.ndim == 2 and not any(part in name for part in EMBEDDINGS)
        assert (id(parameter) in owned(muon)) == inner, name
        assert (id(parameter) in owned(adamw)) == (not inner), name


def test_muon_orthogonalises_adapters_but_not_the_scalar_head() -> None:
    roles = models.roles("reward")
    roles.add_head("reward")
    parameters = roles.parameters("reward")
    muon, adamw = optim.build(parameters, Optimizer(name="muon"))
    assert owned(muon) == {id(each) for name, each in parameters if "lora_" in name}
    assert owned(adamw) == {id(each) for name, each in parameters if name.startswith("head.")}


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_is_for_matrices_only(kind: str, name: str) -> None:
    for optimizer in optim.build(named(kind), Optimizer(name=name, weight_decay=0.3)):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert group["weight_decay"] == (0.3 if parameter.ndim >= 2 else 0.0)


def test_nothing_to_train_needs_no_optimizer() -> None:
    assert optim.build([], Optimizer()) == []


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0.0, 7), (0.1, 40), (0.05, 3), (1.0, 9), (0.5, 1), (0.03, 1000)])
def test_the_rate_rises_to_its_peak_then_never_rises_again(schedule: str, warmup: float, total: int) -> None:
    settings = Optimizer(schedule=schedule, warmup=warmup)
    factors = [optim.scale(settings, step, total) for step in range(total)]
    peak = factors.index(max(factors))
    assert max(factors) == pytest.approx(1)
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_the_warm_up_is_a_straight_line_of_its_share_of_the_steps() -> None:
    settings = Optimizer(warmup=0.25)
    assert [optim.scale(settings, step, 16) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_a_schedule_is_halfway_in_the_middle_and_done_after_the_last_step(
    schedule: str, halfway: float, end: float
) -> None:
    settings = Optimizer(schedule=schedule, warmup=0.0)
    assert optim.scale(settings, 50, 100) == pytest.approx(halfway)
    assert optim.scale(settings, 100, 100) == pytest.approx(end)
    quarter = {"cosine": 0.5 + 0.5 * 2**-0.5, "linear": 0.75, "constant": 1.0}[schedule]
    assert optim.scale(settings, 25, 100) == pytest.approx(quarter)
