"""The normalisation's forward and gradient against the modules' own."""

from __future__ import annotations

import copy

import architectures
import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from data.batch import packed
from stages.core import norms
from stages.core.forward import token_logprobs

WIDTH = 24
SHAPES = [(7, WIDTH), (2, 5, WIDTH), (2, 3, 4, WIDTH)]
ODD_SHAPES = [(WIDTH,), (0, WIDTH)]


def norm(dtype: torch.dtype = torch.float32, kind: type[nn.Module] = LlamaRMSNorm) -> nn.Module:
    module = kind(WIDTH, eps=1e-5)
    torch.manual_seed(3)
    nn.init.normal_(module.weight, 1.0, 0.5)
    return module.to(dtype)


def is_replaced(module: nn.Module) -> bool:
    return "forward" in vars(module)


def faster(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module)
    norms.speed_up(made)
    assert is_replaced(made)
    return made


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """States, some rows of them very large, very small or zero, and the weighting of the result."""
    torch.manual_seed(4)
    states = torch.randn(shape)
    states.view(-1, WIDTH)[:3] *= torch.tensor([1e3, 1e-4, 0.0])[:, None]
    return states.to(dtype), torch.randn(shape)


def with_gradients(module: nn.Module, states: Tensor, weighting: Tensor) -> list[Tensor]:
    leaf = states.detach().clone().requires_grad_()
    module.zero_grad()
    result = module(leaf)
    (result * weighting.to(result.dtype)).sum().backward()
    assert leaf.grad is not None
    assert module.weight.grad.dtype == module.weight.dtype
    return [result.detach(), leaf.grad, module.weight.grad]


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_the_modules_own(shape: tuple[int, ...], kind: type[nn.Module]) -> None:
    module, (states, weighting) = norm(kind=kind), inputs(shape)
    expected = with_gradients(module, states, weighting)
    for found, exact in zip(with_gradients(faster(module), states, weighting), expected, strict=True):
        assert torch.allclose(found, exact, rtol=1e-5, atol=1e-5 * exact.abs().median().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_as_exact_as_the_modules_own(shape: tuple[int, ...]) -> None:
    module, (states, weighting) = norm(torch.bfloat16), inputs(shape, torch.bfloat16)
    exact = with_gradients(copy.deepcopy(module).double(), states.double(), weighting)
    own, found = (with_gradients(each, states, weighting) for each in (module, faster(module)))
    for mine, its, truth in zip(found, own, exact, strict=True):
        assert mine.dtype == its.dtype == torch.bfloat16
        assert (mine.double() - truth).norm() <= 1.5 * (its.double() - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.parametrize(
    ("states_in", "weight_in"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
)
def test_under_autocast_the_result_has_its_precision_and_gradients_their_own(
    states_in: torch.dtype, weight_in: torch.dtype
) -> None:
    module, (states, weighting) = norm(weight_in), inputs((5, WIDTH), states_in)
    with torch.autocast("cpu", torch.bfloat16):
        own, found = (with_gradients(each, states, weighting) for each in (module, faster(module)))
    assert [each.dtype for each in found] == [torch.bfloat16, states_in, weight_in]
    for mine, its in zip(found, own, strict=True):
        assert (mine - its).double().norm() < 0.01 * its.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_digits_are_the_same(dtype: torch.dtype) -> None:
    module, states = faster(norm(dtype)), torch.randn(2, 5, WIDTH, dtype=dtype)
    with torch.no_grad():
        found = module(states)
    assert torch.equal(found, module(states.requires_grad_()))


def test_a_frozen_weight_gets_no_gradient_and_the_states_theirs() -> None:
    module, (states, weighting) = norm().requires_grad_(False), inputs((4, WIDTH))
    leaves = [states.clone().requires_grad_() for _ in range(2)]
    for each, leaf in zip((module, faster(module)), leaves, strict=True):
        (each(leaf) * weighting).sum().backward()
    assert torch.allclose(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-6)


class ShiftedRMSNorm(LlamaRMSNorm):
    """Named and shaped as one, but with 1 + w."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        plain: Tensor = super().forward(hidden_states)
        return plain + plain / self.weight


class UnweightedRMSNorm(nn.Module):
    variance_epsilon = 1e-5

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


@pytest.mark.parametrize(
    "module", [Gemma2RMSNorm(WIDTH), ShiftedRMSNorm(WIDTH), UnweightedRMSNorm(), nn.LayerNorm(WIDTH)]
)
def test_another_formula_is_not_replaced(module: nn.Module) -> None:
    norms.speed_up(module)
    assert not is_replaced(module)


def test_a_one_among_large_weights_is_seen() -> None:
    module = ShiftedRMSNorm(WIDTH)
    nn.init.constant_(module.weight, 1000.0)
    norms.speed_up(module)
    assert not is_replaced(module)


@pytest.mark.parametrize(("kind", "count"), [("grouped", 5), ("qwen3", 9), ("gemma2", 0), ("gpt2", 0)])
def test_a_models_normalisations_are_replaced_where_they_are_the_formula(kind: str, count: int) -> None:
    model = architectures.model(kind)
    norms.speed_up(model)
    norms.speed_up(model)
    assert sum(is_replaced(module) for module in model.modules()) == count


def test_a_model_computes_the_same_with_it() -> None:
    batch = packed(architectures.ragged(4))
    model = architectures.model("qwen3")
    found = []
    for each in (copy.deepcopy(model), model):
        if each is model:
            norms.speed_up(model)
        values = token_logprobs(each, batch)
        values.square().sum().backward()
        found.append([values.detach(), *(parameter.grad for parameter in each.parameters())])
    for own, mine in zip(*found, strict=True):
        assert torch.allclose(own, mine, rtol=1e-4, atol=1e-4 * own.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_digit(dtype: torch.dtype) -> None:
    module, before = faster(nn.Module.to(LlamaRMSNorm(384), dtype)), torch.get_num_threads()
    states, weighting = (torch.randn(2048, 384).to(dtype) for _ in range(2))
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(with_gradients(module, states, weighting))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, each) for one, each in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_a_single_row_and_none_are_the_modules_own(shape: tuple[int, ...]) -> None:
    module, states = norm(), torch.randn(shape)
    expected = with_gradients(module, states, torch.ones(shape))
    for found, exact in zip(with_gradients(faster(module), states, torch.ones(shape)), expected, strict=True):
        assert torch.allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_without_values_shapes_come_through() -> None:
    module = faster(norm()).to("meta")
    assert module(torch.zeros(3, WIDTH, device="meta")).shape == (3, WIDTH)


def test_float64_keeps_the_modules_own() -> None:
    module = norm(torch.float64)
    norms.speed_up(module)
    assert not is_replaced(module)


def test_a_second_derivative_is_refused() -> None:
    module, (states, _) = faster(norm()), inputs((4, WIDTH))
    states.requires_grad_()
    (gradient,) = torch.autograd.grad(module(states).square().sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
