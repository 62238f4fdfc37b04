"""Gradient checkpointing: the same gradients from fewer kept tensors, or an error when the role was switched."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from data.batch import batches
from pipeline.config import Lora
from pipeline.errors import ConfigError
from stages.core.checkpointing import checkpoint_layers
from stages.core.forward import token_logprobs
from stages.core.models import LanguageModel
from stages.core.roles import POLICY, REFERENCE, REWARD, Roles

VARIANTS = [
    Lora(rank=4),
    Lora(rank=4, variant="dora"),
    Lora(rank=4, initialisation="pissa"),
    Lora(rank=4, top_layers=1),
]
each_variant = pytest.mark.parametrize("lora", VARIANTS, ids=["lora", "dora", "pissa", "top"])


def loss(language_model: LanguageModel) -> Tensor:
    (batch,) = batches(models.responses(4), 1000)
    with language_model.compute.autocast():
        return -token_logprobs(language_model.model, batch).mean()


def adapted(lora: Lora, kind: str = "llama", compute: object = models.CPU, *, checkpointed: bool) -> Roles:
    torch.manual_seed(0)
    roles = Roles(models.language_model(kind, compute=compute))
    if checkpointed:
        checkpoint_layers(roles.base)
    roles.add(POLICY, lora)
    models.disturb(roles, POLICY)
    return roles


def gradients(named: list[tuple[str, nn.Parameter]], compute: Callable[[], Tensor]) -> dict[str, Tensor]:
    compute().backward()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def kept_bytes(compute: Callable[[], Tensor]) -> int:
    """Bytes of what a forward pass keeps for the backward pass, weights aside."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = compute()
    assert result.requires_grad
    return sum(kept.values())


@each_variant
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("compute", [models.CPU, models.HALF], ids=["float32", "bfloat16"])
def test_an_adapter_gets_the_same_gradients(lora: Lora, kind: str, compute: object) -> None:
    found = []
    for checkpointed in (False, True):
        roles = adapted(lora, kind, compute, checkpointed=checkpointed)
        assert not roles.base.model.training
        with roles.use(POLICY):
            found.append(gradients(roles.parameters(POLICY), lambda: loss(roles.base)))  # noqa: B023
    plain, again = found
    assert plain.keys() == again.keys()
    assert any(gradient.any() for gradient in plain.values())
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_all_weights_get_the_same_gradients(kind: str, training: bool) -> None:
    found = []
    for checkpointed in (False, True):
        language_model = models.language_model(kind)
        language_model.model.requires_grad_(True).train(training)
        if checkpointed:
            checkpoint_layers(language_model)
        named = list(language_model.model.named_parameters())
        found.append(gradients(named, lambda: loss(language_model)))  # noqa: B023
    plain, again = found
    assert plain.keys() == again.keys() == {name for name, _ in named}
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_layers_that_draw_random_numbers_draw_the_same_again() -> None:
    found = []
    for checkpointed in (False, True):
        language_model = models.language_model("gpt2")
        for module in language_model.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        language_model.model.requires_grad_(True).train()
        if checkpointed:
            checkpoint_layers(language_model)
        torch.manual_seed(3)
        found.append(gradients(list(language_model.model.named_parameters()), lambda: loss(language_model)))  # noqa: B023
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@each_variant
def test_less_is_kept_for_the_backward_pass(lora: Lora) -> None:
    sizes = []
    for checkpointed in (False, True):
        roles = adapted(lora, checkpointed=checkpointed)
        with roles.use(POLICY):
            sizes.append(kept_bytes(lambda: loss(roles.base)))  # noqa: B023
    assert sizes[1] < 0.6 * sizes[0]


def test_a_layer_keeps_its_inputs_alone() -> None:
    kept = []
    for layers in (1, 2):
        roles = adapted(Lora(rank=4, top_layers=layers), checkpointed=True)
        with roles.use(POLICY):
            kept.append(kept_bytes(lambda: loss(roles.base)))  # noqa: B023
    (batch,) = batches(models.responses(4), 1000)
    states = batch.tokens.numel() * roles.base.hidden_size * 4
    assert kept[1] - kept[0] <= states


def test_nothing_is_computed_twice_where_no_gradient_is_asked_for() -> None:
    roles = adapted(Lora(rank=4), checkpointed=True)
    calls: list[int] = []
    roles.base.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), roles.use(POLICY):
        loss(roles.base)
    assert len(calls) == 1
    with roles.use(POLICY):
        loss(roles.base).backward()
    assert len(calls) == 3


@pytest.mark.parametrize("other", [REFERENCE, REWARD])
def test_a_backward_pass_in_another_role_is_refused(other: str) -> None:
    roles = adapted(Lora(rank=4), checkpointed=True)
    roles.add(REWARD, Lora(rank=4))
    with roles.use(POLICY):
        value = loss(roles.base)
    with roles.use(other), pytest.raises(RuntimeError, match=f"was policy's, the backward pass runs as {other}"):
        value.backward()
    assert all(parameter.grad is None for _, parameter in roles.parameters(REWARD))


def test_other_roles_may_compute_between_the_passes() -> None:
    roles = adapted(Lora(rank=4), checkpointed=True)
    roles.add(REWARD, Lora(rank=4))
    with roles.use(POLICY):
        value = loss(roles.base)
    with roles.use(REFERENCE), torch.no_grad():
        loss(roles.base)
    with roles.use(POLICY):
        value.backward()
    assert all(parameter.grad is not None for _, parameter in roles.parameters(POLICY))


def test_weights_are_stored_by_the_same_names() -> None:
    plain, checkpointed = models.language_model(), models.language_model()
    checkpoint_layers(checkpointed)
    assert plain.model.state_dict().keys() == checkpointed.model.state_dict().keys()


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    language_model = models.language_model()
    language_model.model.config.num_hidden_layers = 5
    with pytest.raises(ConfigError, match="does not keep its 5 decoder layers in one list"):
        checkpoint_layers(language_model)
