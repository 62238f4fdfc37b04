"""The forward of a LoRA layer against peft's own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import models
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.batch import packed
from pipeline.config import Lora
from stages.core import lora
from stages.core.forward import token_logprobs
from stages.core.roles import POLICY

SHAPES = [(5, 12), (2, 5, 12)]


class Net(nn.Module):
    """Two linear layers, the second behind a nonlinearity, so that gradients of the input matter."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20, bias=bias)
        self.second = nn.Linear(20, 6, bias=bias)

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(states)))
        return found


def net(
    *, roles: tuple[str, ...] = (POLICY,), bias: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> Net:
    """With peft's forward, all adapters at random values and the first one active."""
    torch.manual_seed(0)
    made = Net(bias).to(dtype)
    for number, role in enumerate(roles):
        config = LoraConfig(r=3 + number, lora_alpha=8, target_modules=["first", "second"], **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            inject_adapter_in_model(config, made, adapter_name=role)
    for name, parameter in made.named_parameters():
        adapted = "lora_" in name
        parameter.requires_grad_(adapted)
        if adapted and "magnitude" not in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.3
    use(made, roles[0])
    return made.eval()


def layers(made: nn.Module) -> list[LoraLayer]:
    return [module for module in made.modules() if isinstance(module, LoraLayer)]


def use(made: nn.Module, *roles: str, disabled: bool = False) -> None:
    for layer in layers(made):
        layer._active_adapter, layer._disable_adapters = list(roles), disabled


def faster(made: Net) -> Net:
    copied = copy.deepcopy(made)
    lora.speed_up(copied)
    return copied


@contextmanager
def without_the_fast_forward(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the fast forward raises."""
    with monkeypatch.context() as patch:
        patch.setattr(lora, "_LowRank", None)
        yield


def with_gradients(made: nn.Module, states: Tensor, through: Any = None) -> dict[str, Tensor]:
    """The result, and the gradients of an uneven weighting in the input and all that is trained."""
    leaf = states.detach().clone().requires_grad_()
    made.zero_grad()
    result = made(leaf) if through is None else through(made, leaf)
    (result.float() * torch.arange(result.numel()).view(result.shape)).sum().backward()
    named = {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}
    for name, parameter in made.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, name
    assert leaf.grad is not None
    return {"result": result.detach(), "input": leaf.grad, **named}


def gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative difference."""
    assert found.keys() == expected.keys()
    assert [each.dtype for each in found.values()] == [each.dtype for each in expected.values()]
    return max(((found[key] - each).norm() / each.norm()).item() for key, each in expected.items())


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_pefts(shape: tuple[int, ...], bias: bool) -> None:
    made = net(bias=bias)
    found, expected = (with_gradients(each, inputs(shape)) for each in (faster(made), made))
    assert len(found) == 6
    assert gap(found, expected) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("states_in", [torch.bfloat16, torch.float32])
def test_bfloat16_under_autocast_is_as_exact_as_pefts(
    shape: tuple[int, ...], bias: bool, states_in: torch.dtype
) -> None:
    made, states = net(bias=bias, dtype=torch.bfloat16), inputs(shape, states_in)
    exact = with_gradients(copy.deepcopy(made).float(), states.float())
    with torch.autocast("cpu", torch.bfloat16):
        own, found = (with_gradients(each, states) for each in (made, faster(made)))
    assert gap(found, own) < 0.05
    for key, truth in exact.items():
        assert (found[key] - truth).norm() <= 1.5 * (own[key] - truth).norm() + 4e-3 * truth.norm(), key


def test_the_backward_pass_may_run_outside_of_autocast() -> None:
    made, states = faster(net(dtype=torch.bfloat16)), inputs((5, 12), torch.bfloat16)

    def forward_only(module: nn.Module, leaf: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cast(Tensor, module(leaf))

    with torch.autocast("cpu", torch.bfloat16):
        expected = with_gradients(made, states)
    assert gap(with_gradients(made, states, forward_only), expected) == 0.0


def test_a_second_precision_under_autocast_keeps_pefts_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    made, states = net(), inputs((5, 12))
    with torch.autocast("cpu", torch.bfloat16), without_the_fast_forward(monkeypatch):
        found, expected = (with_gradients(each, states) for each in (faster(made), made))
    assert gap(found, expected) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switched_off_it_is_the_base(dtype: torch.dtype) -> None:
    made, states = faster(net(bias=True, dtype=dtype)), inputs((5, 12), dtype)
    torch.manual_seed(0)
    base = Net(bias=True).to(dtype)
    use(made, POLICY, disabled=True)
    assert torch.equal(made(states), base(states))
    use(made, POLICY)
    assert not torch.equal(made(states), base(states))


def test_each_role_has_its_own_adapter_and_gradient() -> None:
    made = net(roles=(POLICY, "value"))
    quick = faster(made)
    for role, other in ((POLICY, "value"), ("value", POLICY)):
        use(made, role)
        use(quick, role)
        found, expected = (with_gradients(each, inputs((5, 12))) for each in (quick, made))
        assert gap(found, expected) < 1e-6
        assert any(f".{role}." in name for name in found)
        assert not any(f".{other}." in name for name in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_held_adapters_give_the_same_digits_and_are_let_go_afterwards(dtype: torch.dtype, bias: bool) -> None:
    made = faster(net(roles=(POLICY, "other"), dtype=dtype, bias=bias))
    for role in (POLICY, "other"):
        use(made, role)
        for shape in SHAPES:
            states = torch.randn(shape, dtype=dtype)
            expected = made(states)
            with lora.held(made):
                assert torch.equal(made(states), expected)
    before = made(states)
    made.second.lora_B["other"].weight.add_(1.0)
    assert not torch.equal(made(states), before)


@torch.no_grad()
def test_disabled_several_and_peculiar_adapters_are_not_held() -> None:
    states = torch.randn(5, 12)
    for made in (net(roles=(POLICY, "other")), net(use_dora=True)):
        for roles, disabled in (((POLICY,), True), ((POLICY, "other"), False), ((POLICY,), False)):
            quick = faster(made)
            if all(role in quick.first.lora_A for role in roles):
                use(quick, *roles, disabled=disabled)
                expected = quick(states)
                with lora.held(quick):
                    assert torch.equal(quick(states), expected)


def test_several_active_adapters_keep_pefts_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    made = net(roles=(POLICY, "value"))
    use(made, POLICY, "value")
    with without_the_fast_forward(monkeypatch):
        found, expected = (with_gradients(each, inputs((5, 12))) for each in (faster(made), made))
    assert gap(found, expected) == 0.0


def test_an_adapter_that_is_not_on_the_layer_leaves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    made = net()
    use(made, "absent")
    with without_the_fast_forward(monkeypatch):
        assert torch.equal(faster(made)(inputs((5, 12))), made(inputs((5, 12))))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=str)
def test_an_adapter_with_more_to_it_keeps_pefts_forward(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = net(bias=True, **options).train()
    found = []
    with without_the_fast_forward(monkeypatch):
        for each in (faster(made), made):
            torch.manual_seed(5)
            found.append(with_gradients(each, inputs((5, 12))))
    assert gap(*found) == 0.0


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_base_that_is_trained_too_gets_its_gradient(part: str) -> None:
    made = net(bias=True)
    for layer in layers(made):
        cast(Tensor, getattr(layer.get_base_layer(), part)).requires_grad_()
    found, expected = (with_gradients(each, inputs((5, 12))) for each in (faster(made), made))
    assert f"first.base_layer.{part}" in found
    assert gap(found, expected) == 0.0


def test_merged_it_is_the_merged_weights_and_unmerged_what_it_was() -> None:
    made, states = faster(net(bias=True)), inputs((5, 12))
    before = made(states)
    for layer in layers(made):
        cast(Linear, layer).merge()
    merged = made(states)
    assert torch.allclose(merged, before, atol=1e-5)
    assert torch.equal(merged, made.second.base_layer(torch.tanh(made.first.base_layer(states))))
    use(made, POLICY, disabled=True)
    torch.manual_seed(0)
    assert torch.allclose(made(states), Net(bias=True)(states), atol=1e-5)
    use(made, POLICY)
    assert torch.allclose(made(states), before, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantized_layer_keeps_pefts_forward() -> None:
    quantized = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes").nn
    holder = nn.ModuleDict({"first": quantized.Linear8bitLt(12, 20, has_fp16_weights=False)})
    inject_adapter_in_model(LoraConfig(target_modules=["first"]), holder, adapter_name=POLICY)
    lora.speed_up(holder)
    assert isinstance(holder["first"], LoraLayer)
    assert "forward" not in vars(holder["first"])


def test_a_checkpointed_layer_has_the_same_gradients() -> None:
    made, states = faster(net(bias=True)), inputs((2, 5, 12))

    def checkpointed(module: nn.Module, leaf: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(module, leaf, use_reentrant=False))

    assert gap(with_gradients(made, states, checkpointed), with_gradients(made, states)) == 0.0


def test_an_input_without_a_gradient_costs_none() -> None:
    made, states = faster(net()), inputs((5, 12))
    made(states).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters() if parameter.requires_grad)
    with torch.no_grad():
        assert not made(states).requires_grad


def test_a_second_derivative_is_refused() -> None:
    made, states = faster(net()), inputs((5, 12)).requires_grad_()
    (gradient,) = torch.autograd.grad(made(states).square().sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("options", [Lora(rank=4), Lora(rank=4, initialisation="pissa")], ids=["lora", "pissa"])
def test_a_models_adapter_is_pefts_with_every_initialisation(options: Lora) -> None:
    batch, found = packed(models.forest(4)), []
    for own in (True, False):
        roles = models.roles(POLICY, lora=options)
        models.disturb(roles, POLICY)
        for layer in layers(roles.base.model) if own else ():
            vars(layer).pop("forward", None)
        if not own:
            lora.speed_up(roles.base.model)
        with roles.use(POLICY):
            values = token_logprobs(roles.base.model, batch)
            values.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in roles.parameters(POLICY)}
        found.append({"values": values.detach(), **gradients})
    assert gap(*found) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_same_is_computed(dtype: torch.dtype, bias: bool) -> None:
    made = net(bias=bias, dtype=dtype)
    lora.speed_up(made)
    states = torch.randn(2, 5, 12).to(dtype)
    with torch.no_grad():
        found = made(states)
    assert not found.requires_grad
    assert torch.equal(found, made(states).detach())


@pytest.mark.parametrize("shape", [(0, 12), (1, 0, 12), (12,)])
def test_no_rows_and_a_single_one_are_pefts(shape: tuple[int, ...]) -> None:
    made = net(bias=True)
    found, expected = (with_gradients(each, inputs(shape)) for each in (faster(made), made))
    for key, exact in expected.items():
        assert torch.allclose(found[key], exact, atol=1e-4), key
    with torch.no_grad():
        assert torch.allclose(faster(made)(inputs(shape)), made(inputs(shape)), atol=1e-5)
