"""Which optimizer gets which weight, how it moves it, and the learning rate over time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.optim.adamw as eight_bit
import models
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from pipeline.config import Optimizer, RunSettings, SftSettings
from pipeline.contract import Context
from pipeline.errors import ConfigError
from stages import sft
from stages.core import muon, optim
from stages.core.muon import Muon, orthogonalise

SHAPES = [(12, 12), (12, 40), (40, 12), (12, 12), (40, 12), (3, 40), (40, 3), (1, 8)]
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


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize(("warmup", "total"), [(0.0, 7), (0.1, 40), (0.05, 3), (0.8, 9), (0.5, 1), (0.03, 1000)])
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
    ("schedule", "halfway", "end"),
    [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0), ("wsd", 1.0, 0.0)],
)
def test_a_schedule_is_halfway_in_the_middle_and_done_after_the_last_step(
    schedule: str, halfway: float, end: float
) -> None:
    settings = Optimizer(schedule=schedule, warmup=0.0)
    assert optim.scale(settings, 50, 100) == pytest.approx(halfway)
    assert optim.scale(settings, 100, 100) == pytest.approx(end)
    quarter = {"cosine": 0.5 + 0.5 * 2**-0.5, "linear": 0.75, "constant": 1.0, "wsd": 1.0}[schedule]
    assert optim.scale(settings, 25, 100) == pytest.approx(quarter)


def test_the_stable_schedule_rises_stays_and_falls_in_a_straight_line() -> None:
    settings = Optimizer(schedule="wsd", warmup=0.2, decay=0.4)
    factors = [optim.scale(settings, step, 10) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert optim.scale(settings, 10, 10) == 0


def test_a_stable_schedule_without_decay_is_constant() -> None:
    settings = Optimizer(schedule="wsd", warmup=0.0, decay=0.0)
    assert {optim.scale(settings, step, 10) for step in range(10)} == {1.0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decay": 0.3}, "`decay` is for schedule=wsd, not cosine"),
        ({"schedule": "linear", "decay": 0.0}, "`decay` is for schedule=wsd, not linear"),
        ({"schedule": "wsd", "warmup": 0.6, "decay": 0.5}, "are more than all steps"),
    ],
)
def test_a_decay_that_does_not_fit_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Optimizer(**options)


def test_settings_are_read_again_as_they_were_written() -> None:
    for settings in (Optimizer(), Optimizer(schedule="wsd", decay=0.5)):
        assert Optimizer(**settings.model_dump()) == settings


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("together", [1, 1000, muon.TOGETHER])
def test_muon_moves_every_matrix_as_torch_does(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(muon, "TOGETHER", together)
    ours, theirs, start = matrices(), matrices(), matrices()
    own = Muon(ours, 0.02, 0.1)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for parameters in (ours, theirs):
            give_gradients(parameters, step)
        own.step()
        other.step()
    for mine, expected, before in zip(ours, theirs, start, strict=True):
        moved = (expected - before).norm()
        assert moved > 0.02
        assert (mine - expected).norm() < 0.02 * moved


def test_muon_leaves_a_matrix_without_a_gradient_alone() -> None:
    parameters, before = matrices(), matrices()
    give_gradients(parameters, 0)
    parameters[3].grad = None
    Muon(parameters, 0.02, 0.1).step()
    moved = [not torch.equal(after, each) for after, each in zip(parameters, before, strict=True)]
    assert moved == [index != 3 for index in range(len(SHAPES))]


def polynomial(matrix: Tensor) -> Tensor:
    """What the iteration does to the singular values, in double precision."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_matrices_come_out_nearly_orthogonal(monkeypatch: pytest.MonkeyPatch, precision: torch.dtype) -> None:
    monkeypatch.setattr(muon, "_precision", lambda device: precision)
    given = torch.randn(5, 8, 30, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(given)
    assert found.dtype == torch.float32
    tolerance = 1e-4 if precision == torch.float32 else 0.03
    for matrix, result in zip(given, found, strict=True):
        expected = polynomial(matrix)
        assert (result - expected).norm() < tolerance * expected.norm()
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not orthogonalise(torch.zeros(2, 4, 6)).any()


def plain_adamw(parameter: Tensor, gradients: list[Tensor], settings: Optimizer) -> Tensor:
    """AdamW by its definition (Loshchilov and Hutter 2019, algorithm 2), in double precision."""
    first, second, weight = (torch.zeros_like(parameter).double() for _ in range(3))
    weight += parameter
    for step, gradient in enumerate(gradients, 1):
        first = settings.betas[0] * first + (1 - settings.betas[0]) * gradient
        second = settings.betas[1] * second + (1 - settings.betas[1]) * gradient.double() ** 2
        corrected = (second / (1 - settings.betas[1] ** step)).sqrt() + 1e-8
        weight *= 1 - settings.learning_rate * settings.weight_decay
        weight -= settings.learning_rate * first / (1 - settings.betas[0] ** step) / corrected
    return weight


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-5), ("adamw8bit", 0.05)])
def test_adamw_moves_weights_by_its_definition(name: str, tolerance: float) -> None:
    settings = Optimizer(name=name, learning_rate=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(80, 64, generator=generator)
    gradients = [torch.randn(80, 64, generator=generator) for _ in range(5)]
    parameter = nn.Parameter(start.clone())
    (optimizer,) = optim.build([("weight", parameter)], settings)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = plain_adamw(start, gradients, settings)
    assert (parameter - expected).norm() < tolerance * (expected - start).norm()


def test_adamw_takes_its_step_in_one_kernel_where_there_is_one() -> None:
    (optimizer,) = optim.build(named("llama"), Optimizer())
    assert isinstance(optimizer, AdamW)
    assert optimizer.defaults["fused"] is True


def test_eight_bit_moments_are_kept_in_eight_bits() -> None:
    parameter = nn.Parameter(torch.zeros(64, 64))
    parameter.grad = torch.ones(64, 64)
    (optimizer,) = optim.build([("weight", parameter)], Optimizer(name="adamw8bit"))
    optimizer.step()
    assert {each.dtype for each in optimizer.state[parameter].values() if getattr(each, "shape", ()) == (64, 64)} == {
        torch.uint8
    }


def test_paged_moments_are_refused_where_there_is_nothing_to_page() -> None:
    with pytest.raises(ConfigError, match="paged_adamw8bit needs a CUDA device, this is cpu"):
        optim.build(named("llama"), Optimizer(name="paged_adamw8bit"))


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_paged_moments_are_refused_when_the_configuration_is_read(device: str) -> None:
    stage = SftSettings(policy="base", data="chats", optimizer=Optimizer(name="paged_adamw8bit"))
    data: Any = {"chats": {"source": "world:demonstrations"}}
    assert RunSettings(output="run", device="cuda", data=data, stages={"sft": stage}).device == "cuda"
    with pytest.raises(
        ValueError, match=rf"stages.sft.optimizer.name: paged_adamw8bit needs device=cuda, not {device}"
    ):
        RunSettings(output="run", device=device, data=data, stages={"sft": stage})


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError])
def test_a_bitsandbytes_that_lacks_the_device_is_refused(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def step(self: object) -> None:
        raise error("no kernel for cpu")

    monkeypatch.setattr(eight_bit.AdamW8bit, "step", step)
    with pytest.raises(ConfigError, match="the installed bitsandbytes has no adamw8bit for cpu: no kernel for cpu"):
        optim.require_support(Optimizer(name="adamw8bit"), torch.device("cpu"))


def test_a_stage_refuses_its_optimizer_before_it_reads_anything(tmp_path: Path) -> None:
    settings = SftSettings(policy="base", data="chats", optimizer=Optimizer(name="paged_adamw8bit"))
    nothing: Any = SimpleNamespace()
    context = Context("sft", settings, {}, {}, tmp_path, nothing, print, device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match="paged_adamw8bit needs a CUDA device"):
        sft.run(context)
