"""Sampling with a cache and padding, against a loop that has neither."""

from __future__ import annotations

import random
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.batch import batches
from stages.core import rollout
from stages.core.forward import token_logprobs
from stages.core.rollout import Sample, sample, trees_of

NEVER = -1
"""A stop token that is never sampled."""


def ragged(count: int, seed: int = 0, longest: int = 12) -> list[tuple[int, ...]]:
    chance = random.Random(seed)
    return [tuple(chance.randrange(5, 200) for _ in range(chance.randint(1, longest))) for _ in range(count)]


def draw(model: PreTrainedModel, prompts: list[tuple[int, ...]], **options: Any) -> list[Sample]:
    return sample(
        model,
        prompts,
        **{"stop_id": 1, "max_new_tokens": 8, "temperature": 1.0, "seed": 0, "tokens_per_batch": 8192, **options},
    )


def greedy(model: PreTrainedModel, prompts: list[tuple[int, ...]], **options: Any) -> list[Sample]:
    return draw(model, prompts, temperature=1e-4, **options)


@torch.no_grad()
def slow_greedy(model: PreTrainedModel, prompt: tuple[int, ...], stop_id: int, longest: int) -> Sample:
    tokens: list[int] = []
    while len(tokens) < longest:
        tokens.append(int(model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].argmax()))
        if tokens[-1] == stop_id:
            return Sample(tuple(tokens), True)
    return Sample(tuple(tokens), False)


@pytest.mark.parametrize("kind", models.KINDS)
def test_the_likeliest_tokens_are_those_of_a_loop_without_cache_or_padding(kind: str) -> None:
    model, prompts = models.model(kind), ragged(6)
    assert greedy(model, prompts) == [slow_greedy(model, prompt, 1, 8) for prompt in prompts]


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_sampling_logprobs_are_those_of_teacher_forcing(
    kind: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = models.model(kind), ragged(7)
    seen: dict[int, list[float]] = {row: [] for row in range(len(prompts))}
    plain = rollout._Batch._sample

    def noted(batch: rollout._Batch, logits: Tensor) -> Tensor:
        drawn = plain(batch, logits)
        logs = torch.log_softmax(logits / batch.temperature, -1).gather(1, drawn[:, None])
        for row, value in zip(batch.alive.tolist(), logs.flatten().tolist(), strict=True):
            if not batch.ended[row]:
                seen[row].append(value)
        return drawn

    monkeypatch.setattr(rollout._Batch, "_sample", noted)
    # A common stop token ends rows at different steps.
    stop_id = greedy(model, prompts, stop_id=NEVER)[0].tokens[2]
    for row in seen:
        seen[row].clear()
    samples = draw(model, prompts, stop_id=stop_id, temperature=temperature, max_new_tokens=12)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    by_prompt = {index: seen[row] for row, index in enumerate(order)}
    for batch in batches(trees_of(prompts, samples), 60):
        values = token_logprobs(model, batch, temperature)
        for branch, tree in enumerate(batch.trees):
            forced = values[batch.branch_of_read == branch]
            assert len(by_prompt[tree.number]) == len(forced)
            assert (forced - torch.tensor(by_prompt[tree.number])).abs().max() < 1e-5


@pytest.mark.parametrize("kind", models.KINDS)
def test_rows_that_end_early_leave_and_change_nothing_for_the_others(kind: str) -> None:
    model, prompts = models.model(kind), ragged(9, seed=1)
    whole = greedy(model, prompts, stop_id=NEVER, max_new_tokens=12)
    stop_id = whole[0].tokens[3]
    stopped = greedy(model, prompts, stop_id=stop_id, max_new_tokens=12)
    lengths = {len(each.tokens) for each in stopped}
    assert len(lengths) > 1
    for full, short in zip(whole, stopped, strict=True):
        assert short.tokens == full.tokens[: len(short.tokens)]
        assert short.ended == (stop_id in full.tokens)


@pytest.mark.parametrize("kind", models.KINDS)
def test_rows_with_other_padding_than_those_that_left_go_on_as_before(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.model(kind)
    prompts = [(7,)] * 5 + [prompt * 2 for prompt in ragged(20, seed=4, longest=10) if len(prompt) > 5][:3]
    whole = greedy(model, prompts, stop_id=NEVER, max_new_tokens=12)
    stop_id = next(token for token in whole[0].tokens if all(token not in each.tokens[:6] for each in whole[5:]))
    sizes: list[int] = []
    plain = rollout._Batch._sample

    def counted(batch: rollout._Batch, logits: Tensor) -> Tensor:
        sizes.append(len(logits))
        return plain(batch, logits)

    monkeypatch.setattr(rollout._Batch, "_sample", counted)
    found = greedy(model, prompts, stop_id=stop_id, max_new_tokens=12)
    assert sizes[0] == 8
    assert sizes[-1] <= 3
    assert found == [slow_greedy(model, prompt, stop_id, 12) for prompt in prompts]


def test_the_stop_token_is_kept_and_nothing_follows_it() -> None:
    model, prompts = models.model(), ragged(40)
    common = greedy(model, prompts, stop_id=NEVER)[0].tokens[1]
    found = draw(model, prompts, stop_id=common, temperature=0.5, max_new_tokens=10)
    assert {each.ended for each in found} == {True, False}
    for each in found:
        assert each.ended == (each.tokens[-1] == common)
        assert common not in each.tokens[:-1]
        assert each.ended or len(each.tokens) == 10


@pytest.mark.parametrize("longest", [1, 2, 7])
def test_no_response_is_longer_than_allowed(longest: int) -> None:
    found = draw(models.model(), ragged(5), stop_id=NEVER, max_new_tokens=longest)
    assert [len(each.tokens) for each in found] == [longest] * 5


def test_the_same_seed_gives_the_same_samples_and_another_seed_others() -> None:
    model, prompts = models.model(), ragged(6)
    first = draw(model, prompts, seed=5)
    torch.manual_seed(0)
    torch.rand(3)
    assert draw(model, prompts, seed=5) == first
    assert draw(model, prompts, seed=6) != first


def test_sampling_leaves_the_global_generator_alone() -> None:
    model = models.model()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    draw(model, ragged(3))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("tokens_per_batch", [1, 5, 1000])
def test_responses_come_in_the_prompts_order_whatever_the_batches(tokens_per_batch: int) -> None:
    model, prompts = models.model(), ragged(8, seed=2)
    expected = [slow_greedy(model, prompt, 1, 5) for prompt in prompts]
    assert greedy(model, prompts, max_new_tokens=5, tokens_per_batch=tokens_per_batch) == expected


def test_samples_follow_the_models_distribution() -> None:
    model, prompt = models.model(), (7, 8, 9)
    with torch.no_grad():
        chances = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / 0.5, -1)
    found = draw(model, [prompt] * 2000, max_new_tokens=1, temperature=0.5)
    counts = torch.bincount(torch.tensor([each.tokens[0] for each in found]), minlength=len(chances))
    # Three standard errors of a binomial count, and one for the tails of many.
    allowed = 4 * (2000 * chances * (1 - chances)).sqrt() + 1
    assert ((counts - 2000 * chances).abs() <= allowed).all()


def test_no_prompts_give_no_samples() -> None:
    assert draw(models.model(), []) == []


def test_the_role_in_use_is_the_one_that_samples() -> None:
    roles, prompts = models.roles("policy"), ragged(4)
    models.disturb(roles, "policy")
    with roles.use("reference"):
        bare = greedy(roles.base.model, prompts)
    with roles.use("policy"):
        adapted = greedy(roles.base.model, prompts)
        slow = [slow_greedy(roles.base.model, prompt, 1, 8) for prompt in prompts]
    assert bare == greedy(models.model(), prompts)
    assert adapted == slow
    assert adapted != bare
