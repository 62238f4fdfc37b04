"""No step with a loss or gradient that is not finite ever reaches the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pipeline.config import Optimizer
from pipeline.errors import ArtifactError, NumericalError
from stages.core.guards import require_finite_gradient, require_finite_loss, require_finite_weights
from stages.core.loop import Part, Updater

ROWS = ["chats:9", "chats:3", "chats:3", ""]
BAD = [math.nan, math.inf, -math.inf]


class SquareRoot(torch.autograd.Function):
    """Finite forward, a given gradient backward."""

    @staticmethod
    def forward(context: torch.autograd.function.FunctionCtx, value: torch.Tensor, gradient: float) -> torch.Tensor:
        context.gradient = gradient  # type: ignore[attr-defined]
        return value.sum() * 0

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, above: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.full((3, 3), context.gradient), None  # type: ignore[attr-defined]


def updater(name: str) -> tuple[nn.Parameter, Updater]:
    weight = nn.Parameter(torch.arange(9.0).view(3, 3))
    made = Updater([("weight", weight)], Optimizer(name=name, learning_rate=0.1, weight_decay=0.1), 10)
    for _ in range(2):
        made.step([Part(weight.square().sum())])
    return weight, made


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_loss_stops_before_any_weight_moves_and_names_step_and_rows(name: str, bad: float) -> None:
    weight, made = updater(name)
    before = weight.detach().clone()
    with pytest.raises(NumericalError) as caught:
        made.step([Part(weight.sum()), Part(weight.sum() * bad)], ROWS)
    assert torch.equal(weight, before)
    assert caught.value.where == "step 3 (rows chats:3, chats:9)"
    assert "loss" in caught.value.what


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_gradient_stops_before_any_weight_moves_and_names_step_and_rows(name: str, bad: float) -> None:
    weight, made = updater(name)
    before = weight.detach().clone()
    with pytest.raises(NumericalError) as caught:
        made.step([Part(SquareRoot.apply(weight, bad))], ROWS)
    assert torch.equal(weight, before)
    assert caught.value.where == "step 3 (rows chats:3, chats:9)"
    assert "gradient" in caught.value.what


def test_no_later_part_is_computed_after_a_bad_one() -> None:
    weight, made = updater("adamw")
    computed = []

    def parts() -> Iterator[Part]:
        for bad in (1.0, math.nan, 1.0):
            computed.append(bad)
            yield Part(weight.sum() * bad)

    with pytest.raises(NumericalError):
        made.step(parts())
    assert len(computed) == 2


def test_finite_values_pass() -> None:
    require_finite_loss(torch.tensor(1e30), 1, [])
    require_finite_gradient(torch.tensor(0.0), 1, [])
    require_finite_weights([("weight", torch.ones(2)), ("count", torch.tensor(3))])


def test_many_rows_are_cut_short_and_nothing_is_said_of_none() -> None:
    with pytest.raises(NumericalError) as caught:
        require_finite_loss(torch.tensor(math.nan), 7, [f"row {number}" for number in range(10)])
    assert caught.value.where == "step 7 (rows row 0, row 1, row 2, row 3 and 6 more)"
    with pytest.raises(NumericalError) as caught:
        require_finite_gradient(torch.tensor(math.nan), 8, ["", ""])
    assert caught.value.where == "step 8"


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_whose_norm_overflows_are_finite(precision: torch.dtype) -> None:
    weight = torch.full((1000,), torch.finfo(precision).max, dtype=precision)
    require_finite_weights([("weight", weight), ("empty", weight[:0])])
    weight[500] = math.inf
    with pytest.raises(ArtifactError, match="1 of its 1,000 numbers"):
        require_finite_weights([("weight", weight)])


def test_ordinary_weights_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    is_finite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda tensor: looked_at.append(tensor.numel()) or is_finite(tensor))
    require_finite_weights([("weight", torch.full((1000,), 60_000.0, dtype=torch.float16))])
    assert looked_at == [1]


@pytest.mark.parametrize("bad", BAD)
def test_the_first_weight_that_is_not_finite_is_named(bad: float) -> None:
    good, spoiled = torch.ones(3), torch.tensor([1.0, bad])
    with pytest.raises(ArtifactError, match="`second` is not finite"):
        require_finite_weights([("first", good), ("second", spoiled), ("third", spoiled)])
