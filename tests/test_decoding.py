"""Ways to choose tokens, against `transformers` and against slow code that sorts and sums."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import models
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pipeline.config import Decoding, EvaluateSettings
from pipeline.errors import NumericalError
from stages.core import rollout
from stages.core.decoding import decode, processors, stream
from stages.core.rollout import Sample

NEVER = 299
"""A token that ends nothing here: no model likes it."""
SAMPLERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 0.99},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 0.1, "top_p": 0.5, "repetition_penalty": 3.0},
]


def ragged(count: int, seed: int = 0, longest: int = 12) -> list[tuple[int, ...]]:
    chance = random.Random(seed)
    return [tuple(chance.randrange(5, 200) for _ in range(chance.randint(1, longest))) for _ in range(count)]


def decoded(model: PreTrainedModel, prompts: list[tuple[int, ...]], how: Decoding, **options: Any) -> list[Sample]:
    return decode(
        model, prompts, how, **{"stop_id": 1, "max_new_tokens": 10, "seed": 0, "tokens_per_batch": 8192, **options}
    )


def generated(
    model: PreTrainedModel, prompt: tuple[int, ...], stop_id: int, longest: int, **options: Any
) -> tuple[int, ...]:
    """By `transformers`, from one prompt, which needs no padding."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=longest, eos_token_id=stop_id, pad_token_id=stop_id, **options
    )
    tokens: Any = model.generate(torch.tensor([prompt]), generation_config=config)  # type: ignore[operator]
    return tuple(tokens[0, len(prompt) :].tolist())


def allowed(how: Decoding, seen: set[int], logits: list[float]) -> dict[int, float]:
    """The tokens that may be drawn and their probabilities, by sorting and summing."""
    kept = {
        token: (value / how.repetition_penalty if value > 0 else value * how.repetition_penalty)
        if token in seen
        else value
        for token, value in enumerate(logits)
    }
    kept = {token: value / how.temperature for token, value in kept.items()}
    if how.top_k is not None:
        least = sorted(kept.values(), reverse=True)[: how.top_k][-1]
        kept = {token: value for token, value in kept.items() if value >= least}
    if how.top_p < 1.0:
        chosen, mass = [], 0.0
        for token, chance in sorted(shares(kept).items(), key=lambda item: item[1], reverse=True):
            chosen.append(token)
            mass += chance
            if mass >= how.top_p:
                break
        kept = {token: kept[token] for token in chosen}
    best = max(shares(kept).values())
    kept = {token: kept[token] for token, chance in shares(kept).items() if chance >= how.min_p * best}
    return shares(kept)


def shares(logits: dict[int, float]) -> dict[int, float]:
    most = max(logits.values())
    total = sum(math.exp(value - most) for value in logits.values())
    return {token: math.exp(value - most) / total for token, value in logits.items()}


def found_by_transformers(how: Decoding, history: Tensor, logits: Tensor) -> Tensor:
    """Probabilities by the processors that `generate` makes of the same settings, in its order."""
    model: Any = models.model()
    config = GenerationConfig(
        do_sample=True,
        temperature=how.temperature,
        top_k=how.top_k or 0,
        top_p=how.top_p,
        min_p=how.min_p,
        repetition_penalty=how.repetition_penalty,
    )
    made = model._get_logits_processor(config, input_ids_seq_length=history.shape[1])
    return torch.softmax(made(history, logits.clone()), -1)


@pytest.mark.parametrize("setting", SAMPLERS, ids=str)
def test_what_may_be_drawn_and_how_likely_is_what_transformers_has_also_among_ties(setting: dict[str, Any]) -> None:
    how, generator = Decoding(**setting), torch.Generator().manual_seed(0)
    history = torch.randint(0, 60, (24, 9), generator=generator)
    logits = 3 * torch.randn(24, 60, generator=generator)
    logits[12:] = logits[12:].round()
    found = torch.softmax(processors(how)(history, logits.clone()), -1)
    expected = found_by_transformers(how, history, logits)
    assert torch.equal(found > 0, expected > 0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("setting", SAMPLERS, ids=str)
def test_what_may_be_drawn_is_what_sorting_and_summing_leaves(setting: dict[str, Any]) -> None:
    how, generator = Decoding(**setting), torch.Generator().manual_seed(1)
    history = torch.randint(0, 60, (24, 9), generator=generator)
    logits = 3 * torch.randn(24, 60, generator=generator)
    found = torch.softmax(processors(how)(history, logits.clone()), -1)
    for row, own, seen in zip(found, logits, history, strict=True):
        expected = allowed(how, set(seen.tolist()), own.tolist())
        assert set(row.nonzero().flatten().tolist()) == set(expected)
        assert [float(row[token]) for token in expected] == pytest.approx(list(expected.values()), rel=1e-4)


def test_tokens_as_likely_as_the_last_of_top_k_may_be_drawn_too() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    found = processors(Decoding(top_k=2))(torch.tensor([[0]]), logits)
    assert found.isfinite().tolist() == [[False, True, True, True, True, False]]


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_answers_are_those_of_transformers_whatever_the_padding(kind: str, penalty: float) -> None:
    model, prompts = models.model(kind), ragged(7)
    how = Decoding(temperature=0.0, repetition_penalty=penalty)
    stop_id = generated(model, prompts[0], NEVER, 10, repetition_penalty=penalty)[4]
    found = decoded(model, prompts, how, stop_id=stop_id)
    assert [each.tokens for each in found] == [
        generated(model, prompt, stop_id, 10, repetition_penalty=penalty) for prompt in prompts
    ]
    assert [each.ended for each in found] == [each.tokens[-1] == stop_id for each in found]
    assert len({len(each.tokens) for each in found}) > 1


def test_a_repetition_penalty_changes_greedy_answers() -> None:
    model, prompts = models.model(), ragged(7)
    plain, penalised = (
        decoded(model, prompts, Decoding(temperature=0.0, repetition_penalty=penalty)) for penalty in (1.0, 1.7)
    )
    assert plain != penalised


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (5, 1.0), (3, 1.7)])
def test_beam_search_is_that_of_transformers_whatever_the_padding(kind: str, beams: int, penalty: float) -> None:
    model, prompts = models.model(kind), ragged(6)
    options = {"num_beams": beams, "repetition_penalty": penalty}
    stop_id = generated(model, prompts[0], NEVER, 10, **options)[4]
    expected = [generated(model, prompt, stop_id, 10, **options) for prompt in prompts]
    how = Decoding(temperature=0.0, beams=beams, repetition_penalty=penalty)
    for tokens_per_batch in (1, 8, 8192):
        found = decoded(model, prompts, how, stop_id=stop_id, tokens_per_batch=tokens_per_batch)
        assert [each.tokens for each in found] == expected
        assert [each.ended for each in found] == [stop_id in tokens for tokens in expected]


@torch.no_grad()
def test_enough_beams_find_the_response_of_the_highest_mean_log_probability() -> None:
    model, prompt, stop_id = models.model(), (7, 8, 9), 20
    vocabulary = len(models.tokenizer())
    candidates = [(stop_id,), *((first, second) for first, second in itertools.product(range(vocabulary), repeat=2))]
    first = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], -1)
    second = torch.log_softmax(
        torch.cat([model(torch.tensor([[*prompt, token]])).logits[:, -1] for token in range(vocabulary)]), -1
    )
    means = {
        tokens: float(first[tokens[0]]) if len(tokens) == 1 else float(first[tokens[0]] + second[tokens]) / 2
        for tokens in candidates
        if len(tokens) == 1 or tokens[0] != stop_id
    }
    how = Decoding(temperature=0.0, beams=vocabulary)
    (found,) = decoded(model, [prompt], how, stop_id=stop_id, max_new_tokens=2)
    assert found.tokens == max(means, key=lambda tokens: means[tokens])


@pytest.mark.parametrize("beams", [1, 3])
def test_what_the_models_own_generation_config_asks_for_has_no_say(beams: int) -> None:
    model, prompts = models.model(), ragged(4)
    how = Decoding(temperature=0.0, beams=beams)
    expected = decoded(model, prompts, how)
    model.generation_config = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, top_k=3)
    assert decoded(model, prompts, how) == expected
    assert model.generation_config.no_repeat_ngram_size == 1


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_plain_samples_are_the_very_ones_of_training(temperature: float) -> None:
    model, prompts = models.model(), ragged(5)
    options: dict[str, Any] = {"stop_id": 1, "max_new_tokens": 10, "seed": 3, "tokens_per_batch": 50, "per_prompt": 3}
    expected = rollout.sample(model, prompts, temperature=temperature, **options)
    assert decode(model, prompts, Decoding(temperature=temperature), **options) == expected


@pytest.mark.parametrize("setting", SAMPLERS, ids=str)
@pytest.mark.parametrize("kind", models.KINDS)
@torch.no_grad()
def test_samples_are_drawn_from_the_changed_distribution_also_after_rows_have_left(
    setting: dict[str, Any], kind: str
) -> None:
    model, prompts, how = models.model(kind), ragged(6), Decoding(**setting)
    stop_id = decoded(model, prompts, how, stop_id=NEVER)[0].tokens[2]
    found = decoded(model, prompts, how, stop_id=stop_id, per_prompt=2)
    for prompt, each in zip([prompt for prompt in prompts for _ in range(2)], found, strict=True):
        said: tuple[int, ...] = ()
        for token, logprob in zip(each.tokens, each.logprobs, strict=True):
            logits = model(torch.tensor([[*prompt, *said]])).logits[0, -1]
            expected = allowed(how, {*prompt, *said}, logits.tolist())
            assert math.exp(logprob) == pytest.approx(expected[token], rel=1e-3, abs=1e-5)
            said = (*said, token)


def test_samples_follow_the_changed_distribution() -> None:
    model, prompt, how = models.model(), (7, 8, 9), Decoding(temperature=0.8, top_k=12, min_p=0.02)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    expected = allowed(how, set(), logits.tolist())
    found = decoded(model, [prompt], how, max_new_tokens=1, per_prompt=2000)
    counts = {token: sum(each.tokens == (token,) for each in found) for token in expected}
    assert sum(counts.values()) == 2000
    for token, chance in expected.items():
        assert abs(counts[token] - 2000 * chance) <= 4 * math.sqrt(2000 * chance * (1 - chance)) + 1


@pytest.mark.parametrize("setting", [*SAMPLERS, {}, {"temperature": 0.0}, {"temperature": 0.0, "beams": 3}], ids=str)
def test_a_stream_is_the_sample_token_by_token(setting: dict[str, Any]) -> None:
    roles, prompts, how = models.roles("policy"), ragged(3), Decoding(**setting)
    models.disturb(roles, "policy")
    options: dict[str, Any] = {"stop_id": 20, "max_new_tokens": 12, "seed": 4}
    with roles.use("policy"):
        for prompt in prompts:
            (expected,) = decoded(roles.base.model, [prompt], how, **options)
            assert tuple(stream(roles.base.model, prompt, how, **options)) == expected.tokens


def test_a_stream_that_is_left_gives_the_model_back_as_it_was() -> None:
    roles, (prompt,) = models.roles("policy"), ragged(1)
    models.disturb(roles, "policy")
    options: dict[str, Any] = {"stop_id": NEVER, "max_new_tokens": 12, "seed": 4}
    with roles.use("policy"):
        before = decoded(roles.base.model, [prompt], Decoding(), **options)
    with roles.use("policy"):
        tokens = stream(roles.base.model, prompt, Decoding(), **options)
        next(tokens)
        tokens.close()  # type: ignore[attr-defined]
    models.disturb(roles, "policy", seed=2)
    with roles.use("policy"):
        assert decoded(roles.base.model, [prompt], Decoding(), **options) != before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"temperature": 0.0, "beams": 2}, {"top_p": 0.9}], ids=str)
def test_probabilities_that_are_not_numbers_are_refused(setting: dict[str, Any]) -> None:
    model = models.model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericalError):
        decoded(model, ragged(3), Decoding(**setting))


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"top_k": 3}], ids=str)
def test_pages_sample_from_the_models_own_distribution_only(setting: dict[str, Any]) -> None:
    how = Decoding(**setting)
    with pytest.raises(ValueError, match="own distribution"):
        rollout.sample(
            models.model(),
            ragged(2),
            stop_id=1,
            max_new_tokens=2,
            temperature=how.temperature,
            seed=0,
            tokens_per_batch=100,
            backend="continuous",
            processor=processors(how) or None,
        )


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"beams": 4}, "set `temperature: 0`"),
        ({"temperature": 0.0, "top_k": 5}, "`top_k` is for sampling"),
        ({"temperature": 0.0, "top_p": 0.5}, "`top_p` is for sampling"),
        ({"temperature": 0.0, "min_p": 0.5}, "`min_p` is for sampling"),
        ({"temperature": 1e-45}, "should be 0 or at least 0.01"),
        ({"temperature": -1.0}, "greater than or equal to 0"),
        ({"temperature": True}, "not true or false"),
        ({"top_k": 0}, "greater than 0"),
        ({"top_p": 0.0}, "greater than 0"),
        ({"top_p": 1.1}, "less than or equal to 1"),
        ({"min_p": 1.0}, "less than 1"),
        ({"repetition_penalty": 0.0}, "greater than 0"),
        ({"beams": 0}, "greater than 0"),
        ({"typical_p": 0.5}, "Extra inputs"),
    ],
)
def test_settings_that_contradict_or_mean_nothing_are_refused(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Decoding(**setting)


@pytest.mark.parametrize(
    ("setting", "is_random", "is_plain"),
    [
        ({}, True, True),
        ({"temperature": 0.5}, True, True),
        ({"top_k": 3}, True, False),
        ({"repetition_penalty": 1.1}, True, False),
        ({"temperature": 0.0}, False, False),
        ({"temperature": 0.0, "beams": 2, "repetition_penalty": 1.1}, False, False),
    ],
)
def test_decoding_knows_whether_it_is_random_and_plain(
    setting: dict[str, Any], is_random: bool, is_plain: bool
) -> None:
    assert (Decoding(**setting).is_random, Decoding(**setting).is_plain) == (is_random, is_plain)


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"top_p": 0.9}], ids=str)
def test_best_of_n_needs_plain_samples(setting: dict[str, Any]) -> None:
    given = {"models": ["sft"], "prompts": "prompts", "reward": "rm", "best_of": 4}
    assert EvaluateSettings(**given).is_plain
    with pytest.raises(ValidationError, match="best_of=4 needs plain samples"):
        EvaluateSettings(**given, **setting)
