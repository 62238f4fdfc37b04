"""Figures of a rollout, and the alarms that they set off."""

from __future__ import annotations

import math
from typing import get_args

import models
import numpy as np
import pytest
import rl
import torch

from pipeline.config import ALARM_ROUNDS, Alarm, OnlineDpoSettings, RejectionSettings, Rounds
from stages.core.rl.health import _ALARMS, Health, correlation, distinct_pairs, figures
from stages.core.rl.sampling import Sampler

WELL = {
    "reward": 0.5, "reward_deviation": 0.3, "kl": 1.0, "entropy": 1.0, "rollout_gap": 1e-6, "length": 10.0,
    "length_p95": 20.0,
    "length_reward_correlation": 0.1, "ended": 0.95, "distinct_2": 0.7, "explained_variance": 0.4, "ratio_max": 1.5,
    "gradient_norm": 1.0,
}  # fmt: skip


def rounds(changes: dict[str, list[float]], count: int) -> list[dict[str, float]]:
    """Rounds of which figures go from the first value to the last, and stay there."""
    found = []
    for number in range(count):
        moved = {name: path[min(number * len(path) // count, len(path) - 1)] for name, path in changes.items()}
        found.append(WELL | moved)
    return found


def raised(history: list[dict[str, float]]) -> list[str]:
    health = Health(rl.settings())
    return [each.name for figures in history for each in health.watch(figures)]


def test_nothing_is_raised_where_all_is_well() -> None:
    assert raised(rounds({}, 200)) == []


@pytest.mark.parametrize(("name", "changes"), [
    ("sampling_gap", {"rollout_gap": [1e-6, 0.03]}),
    ("entropy_collapse", {"entropy": [1.0, 0.25]}),
    ("negative_kl", {"kl": [1.0, -1.0]}),
    ("kl_runaway", {"kl": [1.0, 40.0]}),
    ("length_runaway", {"length": [10.0, 25.0]}),
    ("unfinished", {"ended": [0.95, 0.5]}),
    ("ratio_explosion", {"ratio_max": [2.0, 12.0]}),
    ("value_useless", {"explained_variance": [0.4, -0.1]}),
    ("constant_reward", {"reward_deviation": [0.3, 0.0]}),
    ("gradient_spike", {"gradient_norm": [1.0, 30.0]}),
])  # fmt: skip
def test_each_alarm_goes_off_once_for_what_it_watches_and_no_other_does(
    name: str, changes: dict[str, list[float]]
) -> None:
    assert raised(rounds(changes, 120)) == [name]


def test_every_alarm_watches_something_or_is_found_out_elsewhere() -> None:
    assert {*_ALARMS, "over_optimisation"} == set(get_args(Alarm))


WRONG = {
    "sampling_gap": {"rollout_gap": 1.0}, "entropy_collapse": {"entropy": 0.0}, "negative_kl": {"kl": -9.0},
    "kl_runaway": {"kl": 90.0}, "length_runaway": {"length": 90.0}, "unfinished": {"ended": 0.0},
    "ratio_explosion": {"ratio_max": 99.0}, "value_useless": {"explained_variance": -9.0},
    "constant_reward": {"reward_deviation": 0.0}, "gradient_spike": {"gradient_norm": 99.0},
}  # fmt: skip
"""What each alarm cannot miss, from the sixth round on or, where it needs fewer, from the first."""


@pytest.mark.parametrize("name", WRONG)
def test_an_alarm_goes_off_after_as_many_rounds_as_the_settings_say_it_needs(name: str) -> None:
    needed = ALARM_ROUNDS.get(name, 1)  # type: ignore[call-overload]
    well = {1: 0, 5: 0, 10: 5, 50: 0, 53: 50}[needed]
    history = [WELL] * well + [WELL | WRONG[name]] * (needed - well)
    assert name not in raised(history[:-1])
    assert name in raised(history)


def test_a_gap_that_was_there_from_the_start_is_rounding() -> None:
    assert raised(rounds({"rollout_gap": [0.05, 0.07]}, 60)) == []


def test_a_single_odd_round_raises_nothing_but_an_exploded_ratio() -> None:
    history = rounds({}, 60)
    history[40] = WELL | {"entropy": 0.0, "kl": -2.0, "length": 19.0, "ended": 0.8, "explained_variance": -1.0}
    assert raised(history) == []


def test_responses_that_never_ended_are_not_the_trainings_fault() -> None:
    assert raised(rounds({"ended": [0.2]}, 60)) == []


def test_figures_that_a_stage_has_not_raise_nothing() -> None:
    lean = [{name: value for name, value in WELL.items() if not name.startswith(("explained", "ratio"))}] * 80
    assert raised(lean) == []


def test_an_alarm_from_elsewhere_goes_off_once_and_only_if_something_was_seen() -> None:
    health = Health(rl.settings())
    assert health.set_off("over_optimisation", "") == []
    assert [str(each) for each in health.set_off("over_optimisation", "it fell")] == ["over optimisation: it fell"]
    assert health.set_off("over_optimisation", "again") == []


def test_noise_around_a_low_end_rate_raises_nothing() -> None:
    for seed in range(20):
        drawn = np.random.default_rng(seed).binomial(64, 0.5, 100) / 64
        assert raised([WELL | {"ended": each} for each in drawn]) == []


@pytest.mark.parametrize("seed", range(3))
def test_the_correlation_is_numpys(seed: int) -> None:
    first, second = np.random.default_rng(seed).normal(size=(2, 20))
    found = correlation(torch.tensor(first), torch.tensor(second))
    assert found == pytest.approx(np.corrcoef(first, second)[0, 1])
    assert correlation(torch.tensor(first), torch.ones(20)) == 0.0


def test_distinct_pairs_are_counted_over_all_responses() -> None:
    assert distinct_pairs([(1, 2, 1, 2), (1, 2)]) == 2 / 4
    assert distinct_pairs([(1,), ()]) == 1.0


def test_the_figures_of_a_rollout_are_those_of_its_responses() -> None:
    roles, chosen = rl.disturbed(), rl.settings(tokens_per_batch=60, samples_per_prompt=2)
    rollout = Sampler(roles, chosen).rollout(rl.prompts(), 0)
    group = rl.collected(roles, rollout, chosen)
    responses = [branch.tokens for each in group for tree in each.batch.trees for branch in tree.branches]
    found = figures(group, rollout, chosen)
    lengths = [len(tokens) for tokens in responses]
    ratios = [each.log_ratios.sum().item() for each in group]
    assert found["length"] == pytest.approx(np.mean(lengths))
    assert found["length_p95"] == pytest.approx(np.quantile(lengths, 0.95))
    assert found["kl"] == pytest.approx(sum(ratios) / len(responses), abs=1e-5)
    assert found["reward"] == pytest.approx(rl.joined(group, "rewards").mean().item())
    assert found["rollout_gap"] < 1e-5
    assert found["ended"] == pytest.approx(np.mean([tokens[-1] == stop() for tokens in responses]))
    assert "no_advantage" not in found
    assert all(math.isfinite(value) for value in found.values())


def test_advantages_are_told_as_they_were_before_whitening() -> None:
    roles, chosen = rl.disturbed(), rl.settings(samples_per_prompt=2)
    rollout = Sampler(roles, chosen).rollout(rl.prompts(), 0)
    group = rl.collected(roles, rollout, chosen)
    raw = torch.cat([each.returns - each.values for each in group])
    found = figures(group, rollout, chosen)
    assert found["advantage_mean"] == pytest.approx(raw.mean().item(), abs=1e-6)
    assert found["advantage_deviation"] == pytest.approx(raw.std(unbiased=False).item(), abs=1e-6)
    assert abs(found["advantage_mean"]) > 1e-3
    assert abs(found["advantage_deviation"] - 1) > 1e-2
    assert rl.joined(group, "advantages").std(unbiased=False).item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_prompts_whose_responses_have_one_score_are_counted_whatever_the_divergence(advantage: str) -> None:
    kl = {"rloo": {}, "grpo": {"kl_in": "loss", "kl_estimator": "k2"}}[advantage]
    roles, chosen = rl.disturbed(), rl.settings(advantage=advantage, samples_per_prompt=2, **kl)
    rollout = Sampler(roles, chosen).rollout(rl.prompts(8), 0)
    group = rl.collected(roles, rollout, chosen)
    for each in group:
        alike = [1.0, 1.0 + 1e-6], [0.0, 1.0]
        each.scores = torch.tensor([score for tree in each.batch.trees for score in alike[tree.number >= 6]])
    assert figures(group, rollout, chosen)["no_advantage"] == 6 / 8


@pytest.mark.parametrize(("chosen", "remedy"), [
    (rl.settings(), "kl_coefficient"),
    (OnlineDpoSettings(policy="p", reward="r", data="d"), "raise beta"),
    (OnlineDpoSettings(policy="p", reward="r", data="d", loss="simpo", gamma=0.5), "fewer steps"),
    (RejectionSettings(policy="p", reward="r", data="d"), "fewer steps"),
])  # fmt: skip
def test_an_alarm_advises_what_the_stage_has(chosen: Rounds, remedy: str) -> None:
    for wrong in ({"kl": [1.0, 40.0]}, {"entropy": [1.0, 0.2]}):
        health = Health(chosen)
        said = [str(each) for figures in rounds(wrong, 40) for each in health.watch(figures)]
        assert len(said) == 1
        assert remedy in said[0]
        named = [name for name in ("kl_coefficient", "kl_target", "beta") if name in said[0]]
        assert all(name in type(chosen).model_fields for name in named)


def stop() -> int:
    return models.language_model().template.stop_id
