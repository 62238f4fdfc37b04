"""Sampling with a cache and padding, and with pages, against a loop that has neither."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import architectures
import models
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.batch import batches
from pipeline.errors import ConfigError, NumericalError
from stages.core import continuous, rollout
from stages.core.forward import token_logprobs
from stages.core.rollout import Backend, Sample, sample, trees_of

BACKENDS: tuple[Backend, ...] = ("native", "continuous")
WITH_SLOW_ONE = ("native", pytest.param("continuous", marks=pytest.mark.slow))
"""For tests that sample much, which takes seconds with continuous batching."""
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
    return plain(draw(model, prompts, temperature=1e-6, **options))


def plain(samples: list[Sample]) -> list[Sample]:
    """Without log-probabilities."""
    return [Sample(each.tokens, each.ended) for each in samples]


@torch.no_grad()
def slow_greedy(model: PreTrainedModel, prompt: tuple[int, ...], stop_id: int, longest: int) -> Sample:
    tokens: list[int] = []
    while len(tokens) < longest:
        tokens.append(int(model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].argmax()))
        if tokens[-1] == stop_id:
            return Sample(tuple(tokens), True)
    return Sample(tuple(tokens), False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", models.KINDS)
def test_the_likeliest_tokens_are_those_of_a_loop_without_cache_or_padding(kind: str, backend: Backend) -> None:
    model, prompts = models.model(kind), ragged(6)
    assert greedy(model, prompts, backend=backend) == [slow_greedy(model, prompt, 1, 8) for prompt in prompts]


@pytest.mark.parametrize(
    "kind",
    [
        *("mistral", "gemma2", "deepseek_v3", "bloom", "lfm2", "bamba", "qwen3_next"),
        pytest.param("falcon_h1", marks=pytest.mark.slow),
    ],
)
def test_windows_latents_and_recurrent_states_are_copied_and_leave_like_keys_and_values(kind: str) -> None:
    model, prompts = architectures.model(kind), ragged(5)
    stop_id = slow_greedy(model, prompts[0], NEVER, 8).tokens[2]
    expected = [slow_greedy(model, prompt, stop_id, 16) for prompt in prompts for _ in range(2)]
    assert len({len(each.tokens) for each in expected}) > 1
    assert greedy(model, prompts, stop_id=stop_id, max_new_tokens=16, per_prompt=2) == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens_per_batch", [1, 9, 8192])
def test_responses_to_one_prompt_stand_side_by_side_whatever_the_batches(
    tokens_per_batch: int, backend: Backend
) -> None:
    model, prompts = models.model(), ragged(4)
    options = {"max_new_tokens": 5, "per_prompt": 3, "tokens_per_batch": tokens_per_batch, "backend": backend}
    expected = [slow_greedy(model, prompt, 1, 5) for prompt in prompts for _ in range(3)]
    assert greedy(model, prompts, **options) == expected
    drawn = draw(model, prompts, **options)
    assert any(len(set(drawn[start : start + 3])) > 1 for start in range(0, 12, 3))


@pytest.mark.parametrize(("tokens_per_batch", "per_prompt"), [(8, 1), (8, 2), (8, 5), (30, 3), (1, 4)])
def test_a_batch_keeps_its_bound_however_many_responses_a_prompt_gets(
    tokens_per_batch: int, per_prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[tuple[int, int]] = []
    prefilled: list[int] = []
    unseen, unseen_prefill = rollout._Batch._sample, rollout._Batch._prefill

    def seen(batch: rollout._Batch, logits: Tensor, place: int) -> Tensor:
        sampled.append((len(logits), batch.width))
        return unseen(batch, logits, place)

    def seen_prefill(batch: rollout._Batch, room: int) -> Tensor:
        prefilled.append(len(batch.step_tokens))
        return unseen_prefill(batch, room)

    monkeypatch.setattr(rollout._Batch, "_sample", seen)
    monkeypatch.setattr(rollout._Batch, "_prefill", seen_prefill)
    prompts, bound = ragged(9), rollout.CACHED_TOKENS * tokens_per_batch
    draw(models.model(), prompts, max_new_tokens=4, tokens_per_batch=tokens_per_batch, per_prompt=per_prompt)
    assert all(rows == 1 or rows * width <= bound for rows, width in sampled)
    most = max(1, bound // (max(map(len, prompts)) + 4))
    assert len(prompts) <= sum(prefilled) <= len(prompts) * -(-per_prompt // min(most, per_prompt))


def test_prompts_of_similar_length_go_together_in_as_few_batches_as_hold_them() -> None:
    for seed in range(30):
        chance = random.Random(seed)
        prompts, room = ragged(chance.randint(1, 12), seed), chance.randint(1, 9)
        bound, per_prompt = chance.randint(1, 120), chance.randint(1, 4)
        groups = list(rollout.together(prompts, room, bound, per_prompt))
        given = [index for group, copies in groups for index in group for _ in range(copies)]
        assert sorted(given) == sorted(list(range(len(prompts))) * per_prompt)
        for group, copies in groups:
            widest = max(len(prompts[index]) for index in group) + room
            assert len(group) * copies == 1 or len(group) * copies * widest <= bound
        firsts = list(dict.fromkeys(tuple(group) for group, _ in groups))
        for group, following in pairwise(firsts):
            longer = len(prompts[following[0]])
            assert max(len(prompts[index]) for index in group) <= longer
            assert (len(group) + 1) * per_prompt * (longer + room) > bound


@pytest.mark.parametrize("tokens_per_batch", [1, 6, 20])
def test_rows_that_no_longer_fit_are_taken_up_again_where_they_stopped(
    tokens_per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts, held = models.model(), ragged(5), []
    monkeypatch.setattr(rollout, "ROOM", 3)
    monkeypatch.setattr(rollout, "GROWTH", 2)
    unseen = rollout._Batch._logits

    def seen(batch: rollout._Batch) -> Tensor:
        held.append((len(batch.alive), batch.width, len(batch.step_tokens[0])))
        return unseen(batch)

    monkeypatch.setattr(rollout._Batch, "_logits", seen)
    stop_id = slow_greedy(model, prompts[0], NEVER, 8).tokens[4]
    for history in (None, lambda tokens, logits: logits):  # a processor sees the tokens of both parts
        found = draw(
            model, prompts, stop_id=stop_id, max_new_tokens=11, temperature=0.0, per_prompt=2,
            tokens_per_batch=tokens_per_batch, processor=history,
        )  # fmt: skip
        assert plain(found) == [slow_greedy(model, prompt, stop_id, 11) for prompt in prompts for _ in range(2)]
        repeated = [prompt for prompt in prompts for _ in range(2)]
        assert torch.allclose(own(found), forced(model, repeated, found, 1.0), atol=1e-5)
    bound = rollout.CACHED_TOKENS * tokens_per_batch
    assert all(rows == 1 or rows * width <= bound for rows, width, _ in held)
    prefills = sum(computed > 1 for _, _, computed in held) // 2
    assert prefills > 1 if tokens_per_batch < 20 else prefills == 1


def test_samples_do_not_depend_on_what_is_sampled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "ROOM", 4)
    monkeypatch.setattr(rollout, "GROWTH", 3)
    model, prompts = models.model(), ragged(9)
    unstopped = draw(model, prompts, per_prompt=3, max_new_tokens=12, stop_id=NEVER)
    stop_id = Counter(token for each in unstopped for token in each.tokens[2:]).most_common(1)[0][0]
    options = {"per_prompt": 3, "max_new_tokens": 12, "stop_id": stop_id}
    expected = draw(model, prompts, **options)
    assert len({len(each.tokens) for each in expected}) > 1
    assert len({each.tokens for each in expected}) > 20
    for tokens_per_batch in (1, 3, 10, 50):
        found = draw(model, prompts, tokens_per_batch=tokens_per_batch, **options)
        assert plain(found) == plain(expected)
        assert torch.allclose(own(found), own(expected), atol=1e-5)


def test_at_temperature_0_the_likeliest_tokens_are_taken_with_any_seed_and_their_own_logprobs() -> None:
    model, prompts = models.model(), ragged(6)
    found = draw(model, prompts, temperature=0.0, per_prompt=2)
    assert found == draw(model, prompts, temperature=0.0, per_prompt=2, seed=7)
    assert found[::2] == found[1::2]
    assert plain(found[::2]) == [slow_greedy(model, prompt, 1, 8) for prompt in prompts]
    assert torch.allclose(own(found[::2]), forced(model, prompts, found[::2], 1.0), atol=1e-5)


def test_a_draw_is_where_the_sum_of_probabilities_passes_a_uniform_number() -> None:
    chances = torch.softmax(3 * torch.randn(16, 300, generator=torch.Generator().manual_seed(0)), -1)
    for uniform in rollout._uniform(20, 16, seed=7):
        drawn = rollout._drawn(chances, uniform).flatten().tolist()
        for row, share, token in zip(chances.double(), uniform.tolist(), drawn, strict=True):
            before, after = row[:token].sum(), row[: token + 1].sum()
            assert before <= share * row.sum() + 1e-12
            assert after > share * row.sum() - 1e-12


def test_tokens_are_drawn_as_often_as_they_are_likely_and_impossible_ones_never() -> None:
    chances = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.125, 0.125, 0.0])
    count = 40_000
    drawn = rollout._drawn(chances.expand(count, -1), rollout._uniform(1, count, seed=1)[0])
    shares = drawn.flatten().bincount(minlength=len(chances)) / count
    deviations = (chances * (1 - chances) / count).sqrt()
    assert ((shares - chances).abs() <= 4 * deviations).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_probabilities_that_are_not_numbers_are_refused(temperature: float) -> None:
    model = models.model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericalError):
        draw(model, ragged(3), temperature=temperature)


def test_continuous_batching_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, "MEMORY", 1e-9)
    with pytest.raises(ConfigError, match=r"5 of 5 prompts: .*emory"):
        draw(models.model(), ragged(5), backend="continuous")


def test_continuous_batching_refuses_attention_that_pages_leave_something_out_of() -> None:
    model = models.model()
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="`eager` attention"):
        draw(model, ragged(5), backend="continuous")


def forced(model: PreTrainedModel, prompts: list[tuple[int, ...]], samples: list[Sample], temperature: float) -> Tensor:
    """Log-probabilities of all sampled tokens, sample by sample, by the forward of training."""
    found: dict[int, Tensor] = {}
    for batch in batches(trees_of(prompts, samples), 60):
        values = token_logprobs(model, batch, temperature)
        found |= {tree.number: values[batch.branch_of_read == place] for place, tree in enumerate(batch.trees)}
    return torch.cat([found[number] for number in range(len(samples))])


def own(samples: list[Sample]) -> Tensor:
    assert all(len(each.logprobs) == len(each.tokens) for each in samples)
    return torch.tensor([value for each in samples for value in each.logprobs])


@pytest.mark.parametrize("backend", WITH_SLOW_ONE)
@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_logprobs_are_those_of_teacher_forcing_also_after_the_adapter_has_changed(
    backend: Backend, kind: str, temperature: float
) -> None:
    roles, prompts = models.roles("policy", kind=kind), ragged(7)
    model, thrice = roles.base.model, [prompt for prompt in prompts for _ in range(3)]
    before = Tensor()
    for seed in (1, 2):
        models.disturb(roles, "policy", seed=seed)
        with roles.use("policy"):
            options = {"temperature": temperature, "max_new_tokens": 12, "per_prompt": 3, "backend": backend}
            # With the same seed, a token that was drawn ends at least one row before the others.
            stop_id = draw(model, prompts, stop_id=NEVER, **options)[0].tokens[2]
            samples = draw(model, prompts, stop_id=stop_id, **options)
            values = forced(model, thrice, samples, temperature)
        assert len({len(each.tokens) for each in samples}) > 1
        assert (own(samples) - values).abs().max() < 1e-5
        assert not torch.equal(before, values)
        before = values


@torch.no_grad()
def test_in_bfloat16_logprobs_differ_from_teacher_forcing_by_rounding() -> None:
    roles, prompts = models.roles("policy", compute=models.HALF), ragged(30)
    models.disturb(roles, "policy", size=0.02)
    with roles.use("policy"), roles.base.compute.autocast():
        samples = draw(roles.base.model, prompts, max_new_tokens=20)
        difference = own(samples) - forced(roles.base.model, prompts, samples, 1.0)
    assert difference.abs().mean() < 0.03
    assert difference.mean().abs() < 0.01


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
    uncounted = rollout._Batch._sample

    def counted(batch: rollout._Batch, logits: Tensor, place: int) -> Tensor:
        sizes.append(len(logits))
        return uncounted(batch, logits, place)

    monkeypatch.setattr(rollout._Batch, "_sample", counted)
    found = greedy(model, prompts, stop_id=stop_id, max_new_tokens=12)
    assert sizes[0] == 8
    assert sizes[-1] <= 3
    assert found == [slow_greedy(model, prompt, stop_id, 12) for prompt in prompts]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_stop_token_is_kept_and_nothing_follows_it(backend: Backend) -> None:
    model, prompts = models.model(), ragged(40)
    common = greedy(model, prompts, stop_id=NEVER)[0].tokens[1]
    found = draw(model, prompts, stop_id=common, temperature=0.5, max_new_tokens=10, backend=backend)
    assert {each.ended for each in found} == {True, False}
    for each in found:
        assert each.ended == (each.tokens[-1] == common)
        assert common not in each.tokens[:-1]
        assert each.ended or len(each.tokens) == 10


@pytest.mark.parametrize("longest", [1, 2, 7])
def test_no_response_is_longer_than_allowed(longest: int) -> None:
    found = draw(models.model(), ragged(5), stop_id=NEVER, max_new_tokens=longest)
    assert [len(each.tokens) for each in found] == [longest] * 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_seed_gives_the_same_samples_and_another_seed_others(backend: Backend) -> None:
    model, prompts = models.model(), ragged(6)
    first = draw(model, prompts, seed=5, backend=backend)
    torch.manual_seed(0)
    torch.rand(3)
    assert draw(model, prompts, seed=5, backend=backend) == first
    assert draw(model, prompts, seed=6, backend=backend) != first


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_leaves_the_global_generator_alone(backend: Backend) -> None:
    model = models.model()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    draw(model, ragged(3), backend=backend)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("tokens_per_batch", [1, 5, 1000])
def test_responses_come_in_the_prompts_order_whatever_the_batches(tokens_per_batch: int) -> None:
    model, prompts = models.model(), ragged(8, seed=2)
    expected = [slow_greedy(model, prompt, 1, 5) for prompt in prompts]
    assert greedy(model, prompts, max_new_tokens=5, tokens_per_batch=tokens_per_batch) == expected


@pytest.mark.parametrize("backend", WITH_SLOW_ONE)
def test_samples_follow_the_models_distribution(backend: Backend) -> None:
    model, prompt = models.model(), (7, 8, 9)
    with torch.no_grad():
        chances = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / 0.5, -1)
    found = draw(model, [prompt] * 500, max_new_tokens=1, temperature=0.5, per_prompt=4, backend=backend)
    counts = torch.bincount(torch.tensor([each.tokens[0] for each in found]), minlength=len(chances))
    # Three standard errors of a binomial count, and one for the tails of many.
    allowed = 4 * (2000 * chances * (1 - chances)).sqrt() + 1
    assert ((counts - 2000 * chances).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_prompts_give_no_samples(backend: Backend) -> None:
    assert draw(models.model(), [], backend=backend) == []


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
