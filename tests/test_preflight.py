"""What must hold before the first update, and what is said where it does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import models
import numpy as np
import pytest
import rl
import torch
from numpy.typing import NDArray

from pipeline import memory, shape
from pipeline.config import PpoSettings
from pipeline.errors import NumericalError
from pipeline.memory import Task
from pipeline.shape import Base
from stages.core import likelihood, rollout
from stages.core.device import Compute
from stages.core.rl import preflight
from stages.core.rl.experience import Experience, score
from stages.core.rl.preflight import Check, checks, fits, ratio, require
from stages.core.rl.rewards import Scale
from stages.core.rl.selection import Look
from stages.core.roles import POLICY, Roles

NAMES = ["probability ratio", "divergence", "gap", "responses that end", "spread"]


def examined(roles: Roles, group: list[Experience], chosen: PpoSettings) -> dict[str, Check]:
    found = [ratio(group, rl.losses(roles, chosen), 0.05), *checks(roles, group, chosen, look(np.zeros(4)))]
    return {name: check for name, check in zip(NAMES, found, strict=True) if check.name.startswith(name)}


def look(rewards: NDArray[np.float64], apart: float = 0.0) -> Look:
    """The held-out prompts, with such mean rewards."""
    return Look(0, rewards, rewards, kl=0.0, apart=apart)


def start(compute: Compute = models.CPU) -> tuple[Roles, list[Experience], PpoSettings]:
    """A first rollout, of which a response ends."""
    roles, chosen = rl.four_roles(compute), rl.settings(samples_per_prompt=4)
    group = rl.sampled(roles, chosen)
    group[0].ended[0] = True
    return roles, group, chosen


def task(chosen: PpoSettings) -> Task:
    """The stage on the tiny model."""
    model = models.model()
    tensors = {name: tuple(each.shape) for name, each in model.named_parameters()}
    base = Base(shape.of_tensors(model.config.to_dict(), tensors), "p")
    return Task(chosen, (base,), models.LORA, "cpu", "float32")


def test_at_a_sound_start_every_check_passes_and_says_its_value() -> None:
    found = examined(*start())
    assert list(found) == NAMES
    assert all(check.passed for check in found.values())
    assert str(found["probability ratio"]) == "ok: probability ratio before any update 1.000000 (must be 1)"


def failed(roles: Roles, group: list[Experience], chosen: PpoSettings) -> list[str]:
    return [name for name, check in examined(roles, group, chosen).items() if check.fails]


def test_a_policy_that_is_not_the_one_that_sampled_fails() -> None:
    roles, group, chosen = start()
    models.disturb(roles, POLICY)
    assert failed(roles, group, chosen) == ["probability ratio"]


def test_a_policy_that_is_not_its_reference_fails() -> None:
    roles, group, chosen = start()
    for each in group:
        each.reference = each.reference - 0.01
    assert failed(roles, group, chosen) == ["divergence"]


def test_sampling_from_another_distribution_fails() -> None:
    roles, group, chosen = start()
    for each in group:
        each.sampled = each.sampled * 0.7
    assert failed(roles, group, chosen) == ["gap"]


def gap_of(start: tuple[Roles, list[Experience], PpoSettings], differences: torch.Tensor) -> bool:
    """Whether the check passes where sampling and training differ so, token by token."""
    roles, group, chosen = start
    one = dataclasses.replace(group[0], sampled=differences, logprobs=torch.zeros_like(differences))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(preflight, "_gap_in_float32", lambda *_: 0.0)
        patched.setattr(preflight, "_distance", lambda *_: 0.0)
        return preflight._gap(roles, [one], chosen).passed


def rounded(noise: torch.Tensor) -> torch.Tensor:
    """Rounding of log-probabilities: what it has raised is drawn more often, by half its variance."""
    return noise + noise.square().mean() / 2


def one_position_too_far(batch: rollout._Batch, following: torch.Tensor, done: list[bool]) -> None:
    """Every token that is sampled stands one position too far, the first of a response excepted."""
    advance(batch, following, done)
    batch.positions += len(batch.tokens[0]) == 1


def half_of_the_prompt_hidden(batch: rollout._Batch, following: torch.Tensor, done: list[bool]) -> None:
    """Once a token was sampled, the first half of the prompt is not seen any more."""
    advance(batch, following, done)
    batch.mask[:, : batch.width // 2] = 0


advance = rollout._Batch._advance


@pytest.mark.parametrize("compute", [models.CPU, models.HALF])
@pytest.mark.parametrize("fault", [one_position_too_far, half_of_the_prompt_hidden])
def test_a_cache_that_computes_something_else_fails(
    compute: Compute, fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    roles, chosen = rl.four_roles(compute), rl.settings(samples_per_prompt=4)
    sound = rl.sampled(roles, chosen)
    assert preflight._gap(roles, sound, chosen).passed
    monkeypatch.setattr(rollout._Batch, "_advance", fault)
    # What was sampled before is sound: the fault shows in float32.
    passed = preflight._gap(roles, sound, chosen).passed
    assert passed == (compute == models.CPU)
    assert not preflight._gap(roles, rl.sampled(roles, chosen), chosen).passed


def test_rounding_of_a_deep_model_passes_up_to_three_times_that_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, group, chosen = start(models.HALF)
    noise = rounded(0.25 * (-1.0) ** torch.arange(1000))
    one = dataclasses.replace(group[0], sampled=noise, logprobs=torch.zeros_like(noise))
    assert not preflight._gap(roles, [one], chosen).passed
    monkeypatch.setattr(preflight, "_distance", lambda *_: 0.1)
    assert preflight._gap(roles, [one], chosen).passed


LIMITS = pytest.mark.parametrize(
    ("compute", "apart", "unreached"), [(models.CPU, 1e-3, 1e-4), (models.HALF, 0.15, 0.005)]
)


@LIMITS
def test_rounding_passes_up_to_a_size_however_few_or_many_tokens_it_is_of(
    compute: Compute, apart: float, unreached: float
) -> None:
    begun = start(compute)
    for count in (1, 2, 31, 32, 100_000):
        for seed in range(20):
            noise = torch.randn(count, generator=torch.Generator().manual_seed(seed))
            assert gap_of(begun, rounded(noise * 0.9 * apart / noise.square().mean().sqrt()))
    assert not gap_of(begun, rounded(1.1 * apart * (-1.0) ** torch.arange(100_000)))


@LIMITS
def test_what_sampling_cannot_reach_fails(compute: Compute, apart: float, unreached: float) -> None:
    begun = start(compute)
    for share in (2 * unreached, -2 * unreached):
        assert not gap_of(begun, torch.full((64,), -math.log1p(-share)))
    assert gap_of(begun, torch.full((64,), -math.log1p(-unreached / 2)))
    noise = rounded(apart * 0.9 * (-1.0) ** torch.arange(64))
    by_chance = unreached + 2 * apart * 0.9 / 64**0.5
    assert gap_of(begun, noise + by_chance)
    assert not gap_of(begun, noise.repeat(100) + by_chance)


@LIMITS
def test_a_few_tokens_that_are_far_off_fail(compute: Compute, apart: float, unreached: float) -> None:
    for size in (99.0, -9.0, math.inf, -math.inf, math.nan):
        differences = torch.zeros(1000)
        differences[7] = size
        assert not gap_of(start(compute), differences)


def test_responses_that_never_end_fail_unless_ending_is_not_asked_for() -> None:
    roles, group, chosen = start()
    for each in group:
        each.ended = torch.zeros_like(each.ended)
    assert failed(roles, group, chosen) == ["responses that end"]
    assert failed(roles, group, chosen.model_copy(update={"missing_eos_penalty": 0.0})) == []


def test_of_a_few_responses_none_need_end() -> None:
    roles, chosen = rl.four_roles(), rl.settings()
    group = rl.sampled(roles, chosen)
    for each in group:
        each.ended = torch.zeros_like(each.ended)
    assert failed(roles, group, chosen) == []
    said = str(examined(roles, group, chosen)["responses that end"])
    assert said.startswith("not judged, with fewer than 32 responses: responses that end")


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_of_a_few_responses_none_need_another_reward_and_nothing_is_said_to_be_well(advantage: str) -> None:
    roles, chosen = rl.four_roles(), rl.settings(advantage=advantage, samples_per_prompt=2)
    group = rl.sampled(roles, chosen)
    for each in group:
        each.rewards = torch.zeros_like(each.rewards)
    said = [check for check in checks(roles, group, chosen, look(np.zeros(4))) if check.name.startswith("spread")]
    assert [str(check).partition(":")[0] for check in said] == ["not judged, with fewer than 32 responses"]
    require(said[0], "stages.ppo")


def test_rewards_that_are_all_alike_fail_whatever_the_penalties_are() -> None:
    roles, group, chosen = start()
    for each in group:
        each.rewards = torch.full_like(each.rewards, 0.3)
    assert failed(roles, group, chosen) == ["spread"]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_rewards_of_which_most_are_clipped_fail_whatever_the_penalties_are(penalty: float) -> None:
    roles, group, _ = start()
    for limit, expected in ((1e-4, ["spread"]), (1e4, [])):
        chosen = rl.settings(reward_clip=limit, length_penalty=penalty, samples_per_prompt=4)
        score(group, chosen, Scale())
        assert failed(roles, group, chosen) == expected


def test_what_is_rarely_right_passes_where_a_held_out_prompt_shows_it() -> None:
    roles, group, chosen = start()
    for each in group:
        each.rewards = torch.zeros_like(each.rewards)
    found = {check.name: check for check in checks(roles, group, chosen, look(np.array([0.0, 0.25, 0.0])))}
    assert found["spread of the rewards"].passed


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_where_responses_to_a_prompt_are_compared_others_prompts_rewards_are_no_spread(advantage: str) -> None:
    chosen = rl.settings(advantage=advantage, samples_per_prompt=4, kl_coefficient=0.0)
    roles = rl.four_roles()
    group = rl.sampled(roles, chosen)
    spread, seen = "spread of the rewards among a prompt's responses", np.array([0.0, 0.25, 0.0])
    assert {check.name: check for check in checks(roles, group, chosen, look(seen))}[spread].passed
    for each in group:
        number = torch.tensor([tree.number for tree in each.batch.trees]).float()
        each.rewards = number.repeat_interleave(4)
    assert not {check.name: check for check in checks(roles, group, chosen, look(seen))}[spread].passed
    assert {check.name: check for check in checks(roles, group, chosen, look(seen, apart=0.1))}[spread].passed


@pytest.mark.parametrize(("how", "enough"), [("none", False), ("deviation", True)])
def test_rewards_too_near_to_be_told_apart_pass_only_where_they_are_normalised(how: str, enough: bool) -> None:
    chosen = rl.settings(advantage="rloo", samples_per_prompt=4, reward_normalisation=how)
    roles = rl.four_roles()
    group = rl.sampled(roles, chosen)
    for each in group:
        each.rewards = torch.tensor([0.0, 5e-5, 0.0, 0.0]).repeat(len(each.batch.trees))
    spread = [check for check in checks(roles, group, chosen, look(np.zeros(4))) if check.name.startswith("spread")]
    assert [check.passed for check in spread] == [enough]
    assert enough or "reward_normalisation: deviation" in spread[0].remedy


def test_the_ratio_is_that_of_the_pass_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, group, chosen = start()
    plain = likelihood._WithStateGradients.apply
    monkeypatch.setattr(likelihood._WithStateGradients, "apply", lambda *given: plain(*given) * 0.5)
    assert not ratio(group, rl.losses(roles, chosen), 0.05).passed


def test_more_memory_than_there_is_fails() -> None:
    _, group, chosen = start()
    found = fits(task(chosen), group, 1000)
    assert found.fails
    assert found.value.endswith("more for a round of 0 MB free")


def test_a_failed_check_stops_the_run_and_says_what_to_change() -> None:
    check = Check("spread of the rewards", "0", False, "look at the rules")
    with pytest.raises(NumericalError) as caught:
        require(check, "stages.ppo")
    assert (caught.value.where, caught.value.hint) == ("stages.ppo", "look at the rules")
    require(dataclasses.replace(check, passed=True), "stages.ppo")


def test_a_round_is_estimated_by_its_own_batches() -> None:
    _, group, chosen = start()
    short = fits(task(chosen), group, 10**12)
    assert short.passed
    longest = max(each.batch.token_count for each in group)
    whole = memory.estimate(task(chosen), 8192, imports=0)
    own = memory.estimate(dataclasses.replace(task(chosen), longest=longest), longest, imports=0)
    assert own.activations < whole.activations
    assert fits(task(chosen), group, None).passed
    assert "free" not in fits(task(chosen), group, None).value
