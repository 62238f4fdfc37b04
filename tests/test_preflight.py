"""What must hold before the first update, and what is said where it does not."""

from __future__ import annotations

import dataclasses

import models
import pytest
import rl
import torch

from pipeline.config import PpoSettings
from pipeline.errors import NumericalError
from stages.core.rl import memory, preflight
from stages.core.rl.experience import Experience
from stages.core.rl.preflight import Check, checks, ratio, require
from stages.core.roles import POLICY, Roles

NAMES = ["probability ratio", "divergence", "gap", "responses that end", "spread", "chat template", "memory"]


def examined(roles: Roles, group: list[Experience], chosen: PpoSettings) -> dict[str, Check]:
    found = [ratio(group, rl.losses(roles, chosen), 0.05), *checks(roles, group, chosen)]
    return {name: check for name, check in zip(NAMES, found, strict=True) if check.name.startswith(name)}


def start() -> tuple[Roles, list[Experience], PpoSettings]:
    """A first rollout, of which a response ends."""
    roles, chosen = rl.four_roles(), rl.settings(samples_per_prompt=4)
    group = rl.sampled(roles, chosen)
    group[0].ended[0] = True
    return roles, group, chosen


def test_at_a_sound_start_every_check_passes_and_says_its_value() -> None:
    found = examined(*start())
    assert list(found) == NAMES
    assert all(check.passed for check in found.values())
    assert str(found["probability ratio"]) == "ok: probability ratio before any update 1.000000 (must be 1)"


def failed(roles: Roles, group: list[Experience], chosen: PpoSettings) -> list[str]:
    return [name for name, check in examined(roles, group, chosen).items() if not check.passed]


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


def test_rewards_that_are_all_alike_fail_whatever_the_penalties_are() -> None:
    roles, group, chosen = start()
    for each in group:
        each.rewards = torch.full_like(each.rewards, 0.3)
    assert failed(roles, group, chosen) == ["spread"]


def test_rewards_of_which_most_are_clipped_fail() -> None:
    roles, group, chosen = start()
    for each in group:
        each.scores = each.scores.clamp(-1e-3, 1e-3)
    assert failed(roles, group, chosen.model_copy(update={"reward_clip": 1e-3})) == ["spread"]


def test_padding_that_is_the_stop_token_fails() -> None:
    roles, group, chosen = start()
    tokenizer = roles.base.tokenizer
    before, tokenizer.pad_token = tokenizer.pad_token, roles.base.tokenizer.eos_token
    try:
        assert (roles.base.template.stop_id == tokenizer.pad_token_id) == (failed(roles, group, chosen) != [])
    finally:
        tokenizer.pad_token = before


def test_more_memory_than_there_is_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, group, chosen = start()
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    assert failed(roles, group, chosen) == ["memory"]


def test_a_failed_check_stops_the_run_and_says_what_to_change() -> None:
    check = Check("spread of the rewards", "0", False, "look at the rules")
    with pytest.raises(NumericalError) as caught:
        require(check, "stages.ppo")
    assert (caught.value.where, caught.value.hint) == ("stages.ppo", "look at the rules")
    require(dataclasses.replace(check, passed=True), "stages.ppo")


def test_the_weights_held_are_the_bases_once_and_small_adapters() -> None:
    roles = rl.four_roles()
    base = sum(each.numel() * 4 for each in models.model().parameters())
    adapters = sum(each.numel() * 4 for role in ("policy", "reward", "value") for _, each in roles.parameters(role))
    assert memory.held(roles) == base + adapters
    assert preflight.EQUAL < 1e-3
