"""Log-probabilities through the head in chunks, against the whole vocabulary's log-softmax."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import architectures
import models
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from stages.core import likelihood
from stages.core.likelihood import logits_of, logprobs_and_entropies, logprobs_of, summed_logprobs

VOCABULARY = len(models.tokenizer())
READS = 11
HIDDEN = 32
KINDS = ("grouped", "qwen2", "gemma2", "granite", "cohere")
"""A head of its own, a tied one, capped logits, divided ones, multiplied ones."""
each_kind = pytest.mark.parametrize("kind", KINDS)
each_chunk = pytest.mark.parametrize("positions", [1, 4, READS, 1000])
Function = Callable[[PreTrainedModel, Tensor, Tensor], Tensor]


def in_chunks(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    monkeypatch.setattr(likelihood, "CHUNK_LOGITS", {"cpu": positions * VOCABULARY, "cuda": 0})


def reads(count: int = READS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    states = torch.randn(count, HIDDEN, generator=generator).to(dtype)
    return states, torch.randint(VOCABULARY, (count,), generator=generator)


def made(kind: str, head: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return architectures.model(kind, dtype).requires_grad_(head == "trained")


def slow(model: PreTrainedModel, states: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """One position after another, by each architecture's own formula."""
    states = states.to(model.dtype)
    found = []
    for state, target in zip(states, targets, strict=True):
        logits = state @ model.get_output_embeddings().weight.T
        config = model.config
        if config.model_type == "granite":
            logits = logits / config.logits_scaling
        if config.model_type == "cohere":
            logits = logits * config.logit_scale
        if config.model_type == "gemma2":
            logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
        scaled = logits.double() / temperature
        found.append(scaled[target] - scaled.exp().sum().log())
    return torch.stack(found) if found else torch.zeros(0)


def with_gradients(
    model: PreTrainedModel, states: Tensor, compute: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The value, and its gradient (weighted unevenly by position) in states and head."""
    leaf = states.detach().clone().requires_grad_()
    model.zero_grad()
    value = compute(leaf)
    weights = torch.linspace(-1.0, 2.0, value.numel()).view(value.shape)
    (value * weights).sum().backward()
    return value.detach(), leaf.grad, model.get_output_embeddings().weight.grad


def close(found: Tensor | None, expected: Tensor | None, tolerance: float = 1e-5) -> bool:
    if found is None or expected is None:
        return found is expected
    size = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    return torch.allclose(found.double(), expected.double(), rtol=0.0, atol=tolerance * size)


@each_kind
@torch.no_grad()
def test_logits_are_the_models_own(kind: str) -> None:
    model, tokens = architectures.model(kind), torch.arange(5, 25)[None]
    output = model(tokens, output_hidden_states=True)
    assert torch.allclose(logits_of(model, output.hidden_states[-1][0]), output.logits[0], atol=1e-5)


@each_kind
@pytest.mark.parametrize(("positions", "temperature"), [(1, 1.0), (4, 0.6), (READS, 1.0), (1000, 0.6)])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_values_and_gradients_are_those_of_a_log_softmax(
    kind: str, positions: int, head: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks(monkeypatch, positions)
    model, (states, targets) = made(kind, head), reads()
    expected = with_gradients(model, states, lambda leaf: slow(model, leaf, targets, temperature))
    expected = tuple(None if each is None else each.clone() for each in expected)
    found = with_gradients(model, states, lambda leaf: logprobs_of(model, leaf, targets, temperature))
    assert [close(*each) for each in zip(found, expected, strict=True)] == [True] * 3
    assert (found[2] is None) == (head == "frozen")
    with torch.no_grad():
        assert close(logprobs_of(model, states, targets, temperature), expected[0])


@each_kind
@each_chunk
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_the_sum_is_that_of_the_parts_with_its_gradients(
    kind: str, positions: int, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks(monkeypatch, positions)
    model, (states, targets) = made(kind, head), reads()
    expected = with_gradients(model, states, lambda leaf: -3.0 * slow(model, leaf, targets).sum())
    expected = tuple(None if each is None else each.clone() for each in expected)
    found = with_gradients(model, states, lambda leaf: -3.0 * summed_logprobs(model, leaf, targets))
    assert [close(*each) for each in zip(found, expected, strict=True)] == [True] * 3
    with torch.no_grad():
        assert close(-3.0 * summed_logprobs(model, states, targets), expected[0])


@pytest.mark.parametrize("kind", ["grouped", "qwen2"])
def test_gradients_of_two_sums_add_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, 4)
    model, parts = made(kind, "trained"), [reads(READS), reads(7)]
    sum(2.0 * slow(model, *part).sum() for part in parts).backward()
    head = model.get_output_embeddings().weight
    expected, head.grad = head.grad, None
    for part in parts:
        (2.0 * summed_logprobs(model, *part)).backward()
    assert close(head.grad, expected)


@pytest.mark.parametrize("function", [lambda *given: logprobs_of(*given).sum(), summed_logprobs])
def test_a_tied_embedding_gets_both_gradients(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, 4)
    model, (_, targets) = made("qwen2", "trained"), reads()
    tied = model.get_input_embeddings().weight
    assert tied is model.get_output_embeddings().weight
    tokens, found = torch.arange(5, 5 + READS), []
    for each in (lambda *given: slow(*given).sum(), function):
        model.zero_grad()
        each(model, model.get_input_embeddings()(tokens) * 2.0, targets).backward()
        found.append(tied.grad.clone())
    assert close(found[1], found[0])


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_differs_by_rounding_and_keeps_the_types(
    head: str, weights: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks(monkeypatch, 4)
    model, (states, targets) = made("grouped", head, weights), reads(dtype=weights)
    expected = with_gradients(model, states.float(), lambda leaf: slow(model, leaf, targets))
    expected = tuple(None if each is None else each.clone() for each in expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(model, states, lambda leaf: logprobs_of(model, leaf, targets))
        total = with_gradients(model, states, lambda leaf: summed_logprobs(model, leaf, targets))
    assert found[0].dtype == total[0].dtype == torch.float32
    assert [close(*each, 0.03) for each in zip(found, expected, strict=True)] == [True] * 3
    assert close(total[0], expected[0].sum(), 0.03)
    for _, of_states, of_head in (found, total):
        assert of_states is not None
        assert of_states.dtype == weights
        assert (of_head.dtype if of_head is not None else None) == (weights if head == "trained" else None)


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_no_read_gives_no_value_and_no_gradient(head: str) -> None:
    model, (states, targets) = made("grouped", head), reads(0)
    value, of_states, of_head = with_gradients(model, states, lambda leaf: logprobs_of(model, leaf, targets))
    assert value.shape == (0,)
    assert of_states is not None
    assert of_states.shape == (0, HIDDEN)
    total, *_ = with_gradients(model, states, lambda leaf: summed_logprobs(model, leaf, targets))
    assert total == 0.0
    assert of_head is None or not of_head.any()
    assert [each.shape for each in logprobs_and_entropies(model, states, targets)] == [(0,), (0,)]


class Kept:
    """A tensor that a graph holds on to for as long as this lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_logits(compute: Callable[[], Tensor]) -> int:
    """How many tensors with a row of logits for each position are kept for the backward pass."""
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    with saved_tensors_hooks(keep, lambda kept: kept.tensor):
        result = compute()
    assert result.requires_grad
    shapes = [kept.tensor.shape for kept in alive]
    return sum(shape[-1:] == (VOCABULARY,) and shape[0] != HIDDEN for shape in shapes)


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_no_row_of_logits_is_kept_for_the_backward_pass(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, 4)
    model, (states, targets) = made("grouped", head), reads()
    states.requires_grad_()
    assert kept_logits(lambda: torch.log_softmax(logits_of(model, states), -1)) > 0
    assert kept_logits(lambda: logprobs_of(model, states, targets)) == 0
    assert kept_logits(lambda: summed_logprobs(model, states, targets)) == 0


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_the_whole_matrix_of_logits_never_exists(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, 4)
    model, (states, targets) = made("grouped", head), reads()
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    logprobs_of(model, states.requires_grad_(), targets).sum().backward()
    summed_logprobs(model, states, targets).backward()
    assert max(sizes) == 4
    assert sum(sizes) >= 2 * READS


@each_chunk
def test_entropy_is_minus_the_expected_logprob(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks(monkeypatch, positions)
    model, (states, targets) = made("grouped", "frozen"), reads()
    everything = torch.arange(VOCABULARY)
    logs = [slow(model, state.expand(VOCABULARY, -1), everything, 0.7) for state in states]
    expected = torch.stack([-(each.exp() * each).sum() for each in logs])
    logprobs, found = logprobs_and_entropies(model, states, targets, 0.7)
    assert close(found, expected)
    with torch.no_grad():
        assert torch.equal(logprobs, logprobs_of(model, states, targets, 0.7))


def test_an_impossible_token_has_no_part_in_the_entropy() -> None:
    model, (states, targets) = made("grouped", "frozen"), reads()
    plain = model.get_output_embeddings().forward

    def without_the_last(hidden: Tensor) -> Tensor:
        logits = plain(hidden)
        logits[:, -1] = -torch.inf
        return logits

    model.get_output_embeddings().forward = without_the_last
    _, found = logprobs_and_entropies(model, states, targets.clamp(max=VOCABULARY - 2))
    assert torch.isfinite(found).all()
    assert (found > 0).all()


@pytest.mark.parametrize("function", [lambda *given: logprobs_of(*given).sum(), summed_logprobs])
def test_a_second_derivative_is_refused(function: Function) -> None:
    model, (states, targets) = made("grouped", "frozen"), reads()
    states.requires_grad_()
    (gradient,) = torch.autograd.grad(function(model, states, targets).square(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("weight_trained", [True, False])
def test_a_heads_bias_gets_the_gradient_of_the_reads_alone(weight_trained: bool) -> None:
    model, (states, targets) = made("grouped", "trained", torch.bfloat16), reads(dtype=torch.bfloat16)
    model.lm_head = torch.nn.Linear(HIDDEN, VOCABULARY)
    model.lm_head.weight.requires_grad_(weight_trained)

    def gradients(compute: Callable[[], Tensor]) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            compute().backward()
        return [each.grad for each in model.lm_head.parameters() if each.grad is not None]

    def plain() -> Tensor:
        logs = model.lm_head(states).float().log_softmax(-1)
        return logs.gather(1, targets[:, None]).sum()

    exact, found = gradients(plain), gradients(lambda: summed_logprobs(model, states, targets))
    assert len(found) == len(exact) == 1 + weight_trained
    for mine, its in zip(found, exact, strict=True):
        assert (mine - its).norm() < 0.01 * its.norm()


@pytest.mark.parametrize("gradients", [True, False])
def test_logits_in_the_thousands_do_not_overflow(gradients: bool) -> None:
    model, (states, targets) = made("grouped", "frozen"), reads()
    model.get_output_embeddings().weight.data *= 4000
    logits = logits_of(model, states)
    assert logits.abs().max() > 1000
    with torch.set_grad_enabled(gradients):
        found = logprobs_of(model, states, targets)
    assert torch.allclose(found, logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1), rtol=1e-5)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, READS), (torch.bfloat16, 32)])
def test_the_head_takes_few_numbers_of_rows_in_bfloat16_only(dtype: torch.dtype, expected: int) -> None:
    model, (states, targets) = made("grouped", "frozen", dtype), reads(dtype=dtype)
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    leaf = states.requires_grad_()
    assert summed_logprobs(model, leaf, targets).isfinite()
    assert logprobs_of(model, leaf, targets).shape == (READS,)
    with torch.no_grad():
        assert logprobs_of(model, leaf, targets).shape == (READS,)
    assert logprobs_and_entropies(model, leaf, targets)[1].shape == (READS,)
    assert sizes == [expected] * 4
