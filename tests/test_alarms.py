"""Alarms go off at steps that stand out and where nothing is learnt, once in words, and at no others."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from stages.core.alarms import COIN_STEPS, LAST, SPIKE_STEPS, Alarms
from stages.core.checkpoint import State

Step = tuple[float, float]


def calm(steps: int, seed: int = 0) -> list[Step]:
    """Losses and gradient norms as of a training that goes well."""
    chance = random.Random(seed)
    return [(3 - 0.01 * step + chance.uniform(-0.1, 0.1), 1 + chance.uniform(-0.5, 0.5)) for step in range(steps)]


def seen(steps: Sequence[Step], watching: Alarms | None = None) -> list[set[str]]:
    """The alarms of every step."""
    watching = watching or Alarms()
    records = [{"loss": loss, "gradient_norm": norm} for loss, norm in steps]
    return [set(watching.watch(record, number, [f"chats:{number}"])) for number, record in enumerate(records, 1)]


@pytest.mark.parametrize("seed", range(20))
def test_a_training_that_goes_well_sets_off_nothing(seed: int) -> None:
    assert seen(calm(300, seed)) == [set()] * 300


def test_large_gradients_at_the_beginning_set_off_nothing() -> None:
    assert not any(seen([(5.0, 300.0 / step) for step in range(1, LAST + SPIKE_STEPS)]))


@pytest.mark.parametrize("at", [LAST, LAST + 1, 70, 197])
def test_gradients_far_above_those_before_are_told_of_with_step_and_rows(at: int) -> None:
    steps = calm(200)
    for each in range(at, at + SPIKE_STEPS):
        steps[each] = steps[each][0], 40.0
    watching, last = Alarms(), at + SPIKE_STEPS - 1
    assert [number for number, names in enumerate(seen(steps, watching)) if names] == [last]
    (line,) = watching.warnings
    assert line.startswith(
        f"alarm at step {last + 1} (rows chats:{last + 1}): gradient spike: the norm is at least 40 in 3 steps running"
    )


@pytest.mark.parametrize("running", range(1, SPIKE_STEPS))
def test_single_large_gradients_set_off_nothing(running: int) -> None:
    steps = calm(200)
    for each in range(100, 100 + running):
        steps[each] = steps[each][0], 40.0
    assert not any(seen(steps))


def test_the_median_is_that_of_the_last_steps() -> None:
    early, late = [(1.0, 100.0)] * LAST, [(1.0, 50.0)] * SPIKE_STEPS
    assert seen([*early, *[(1.0, 1.0)] * LAST, *late])[-1] == {"gradient_spike"}
    assert seen([*early, *late])[-1] == set()


def test_a_loss_that_stays_high_is_told_of_and_a_single_high_one_is_not() -> None:
    single, several = calm(100), calm(100)
    single[60] = 9.0, 1.0
    several[60:63] = [(9.0, 1.0)] * 3
    assert not any(seen(single))
    assert [number for number, names in enumerate(seen(several)) if names] == [62]
    assert seen(several)[62] == {"loss_spike"}


def test_a_loss_that_hardly_moves_does_not_spike_by_rounding() -> None:
    assert not any(seen([(2.0, 1.0)] * 60 + [(2.01, 1.0)] * 10))


@pytest.mark.parametrize("loss", [math.log(2), 0.0, 5.0])
def test_steps_without_a_gradient_are_told_of_at_the_third(loss: float) -> None:
    assert seen([*calm(5), *[(loss, 1e-8)] * 4])[5:] == [set(), set(), {"zero_signal"}, {"zero_signal"}]


def test_a_loss_stuck_at_ln_2_is_told_of_whatever_the_gradient() -> None:
    watching = Alarms()
    found = seen([(math.log(2) + 1e-8, 0.5)] * COIN_STEPS, watching)
    assert found == [set()] * (COIN_STEPS - 1) + [{"zero_signal"}]
    assert "the loss stayed at ln 2" in watching.warnings[0]
    assert not any(seen([(math.log(2) + 1e-4 * step, 0.5) for step in range(COIN_STEPS)]))


def test_each_kind_is_told_of_once_and_every_step_says_which() -> None:
    watching = Alarms()
    steps = calm(100)
    for at in (50, 60, 70):
        steps[at : at + 3] = [(loss, 40.0) for loss, _ in steps[at : at + 3]]
    steps[80:] = [(math.log(2), 0.0)] * 20
    found = seen(steps, watching)
    assert [found[at] for at in (52, 62, 72, 99)] == [{"gradient_spike"}] * 3 + [{"zero_signal"}]
    assert len(watching.warnings) == 2


@pytest.mark.parametrize("stop", [1, 30, 55, 99])
def test_what_goes_on_from_a_state_tells_what_it_would_have_told(stop: int) -> None:
    steps = calm(100)
    for at in (20, 54, 95):
        steps[at : at + 3] = [(loss, 50.0) for loss, _ in steps[at : at + 3]]
    whole, first, second = Alarms(), Alarms(), Alarms()
    expected = seen(steps, whole)
    before = seen(steps[:stop], first)
    second.load_state(State(values=dict(first.state().values)))
    records = [{"loss": loss, "gradient_norm": norm} for loss, norm in steps[stop:]]
    after = [set(second.watch(each, stop + at, [f"chats:{stop + at}"])) for at, each in enumerate(records, 1)]
    assert before + after == expected
    assert second.warnings == whole.warnings
