"""What looks wrong in a training that goes on: steps that stand out, and steps from which nothing is learnt.

Thresholds are rules of thumb, so an alarm warns and does not stop: each kind once in words, in the stage's output and
its manifest, and every time by name in the step's record. A loss or gradient that is not finite is no alarm, it ends
the stage (`stages/core/guards.py`). Learning from samples has other figures, and alarms of its own
(`stages/core/rl/health.py`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

from stages.core.checkpoint import State
from stages.core.guards import place

LAST = 50
"""Steps that others are compared with; so many must lie behind before some stand out: gradients are large at first,
or, where a head begins at nothing, small."""
SPIKE_STEPS = 3
"""Steps running that must stand out: single batches do in good trainings, and clipping takes care of them."""
GRADIENT_SPIKE = 10.0
"""Times the median."""
LOSS_SPIKE = 6.0
"""Median absolute deviations above the median."""
SMALLEST_DEVIATION = 0.02
"""Of the median: a loss that hardly moves does not spike by rounding."""
NO_GRADIENT, SILENT_STEPS = 1e-6, 3
"""A norm below which nothing is learnt, in so many steps running."""
COIN, AT_COIN, COIN_STEPS = math.log(2), 1e-6, 20
"""The loss of a comparison that tells nothing apart, how near it is stuck, and in how many steps running."""


class Alarms:
    """Watches the records of step after step.

    Attributes:
        warnings: What was told so far.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=LAST + SPIKE_STEPS)
        self._norms: deque[float] = deque(maxlen=LAST + SPIKE_STEPS)
        self._told: list[str] = []
        self.warnings: list[str] = []

    def watch(self, figures: Mapping[str, float], step: int, origins: Sequence[str]) -> dict[str, str]:
        """Take in a step.

        Args:
            figures: Its record.
            step: Its number, from 1.
            origins: Where its rows are from.

        Returns:
            Alarm -> what is wrong; `warnings` has a line more for each that has not gone off before.
        """
        self._losses.append(figures["loss"])
        self._norms.append(figures["gradient_norm"])
        seen = {name: text for name, text in self._seen().items() if text}
        new = [name for name in seen if name not in self._told]
        self._told += new
        self.warnings += [f"alarm at {place(step, origins)}: {seen[name]}" for name in new]
        return seen

    def state(self) -> State:
        """All that has been seen and told."""
        values = {"losses": list(self._losses), "norms": list(self._norms)}
        return State(values=values | {"told": self._told, "warnings": self.warnings})

    def load_state(self, state: State) -> None:
        """Go on from such a state."""
        self._losses.extend(state.values["losses"])
        self._norms.extend(state.values["norms"])
        self._told, self.warnings = list(state.values["told"]), list(state.values["warnings"])

    def _seen(self) -> Mapping[str, str]:
        """By alarm, what is wrong with the newest steps, given those before them."""
        losses, norms = list(self._losses), list(self._norms)
        return {
            "gradient_spike": gradient_spike(norms[:-SPIKE_STEPS], norms[-SPIKE_STEPS:]),
            "loss_spike": _loss_spike(losses[:-SPIKE_STEPS], losses[-SPIKE_STEPS:]),
            "zero_signal": _zero_signal(losses, norms),
        }


def gradient_spike(before: Sequence[float], last: Sequence[float]) -> str:
    """What is wrong with the last gradients' norms, given those of earlier ones; empty where nothing is."""
    if len(before) < LAST or min(last) <= GRADIENT_SPIKE * median(before):
        return ""
    return (
        f"gradient spike: the norm is at least {min(last):.3g} in {len(last)} steps running, the median of the "
        f"{len(before)} before was {median(before):.3g}; look at the rows, lower the learning rate or clip_norm"
    )


def _loss_spike(before: Sequence[float], last: Sequence[float]) -> str:
    if len(before) < LAST:
        return ""
    middle = median(before)
    deviation = max(median(abs(each - middle) for each in before), SMALLEST_DEVIATION * abs(middle))
    limit = middle + LOSS_SPIKE * deviation
    if min(last) <= limit:
        return ""
    return (
        f"loss spike: above {limit:.4g} in {len(last)} steps running (now {last[-1]:.4g}), the median before was "
        f"{middle:.4g}; lower the learning rate, or look at the data"
    )


def _zero_signal(losses: Sequence[float], norms: Sequence[float]) -> str:
    if len(norms) >= SILENT_STEPS and max(norms[-SILENT_STEPS:]) < NO_GRADIENT:
        seen = f"the gradient norm was at most {max(norms[-SILENT_STEPS:]):.1g} in {SILENT_STEPS} steps running"
    elif len(losses) >= COIN_STEPS and max(abs(each - COIN) for each in losses[-COIN_STEPS:]) < AT_COIN:
        seen = f"the loss stayed at ln 2 in {COIN_STEPS} steps running"
    else:
        return ""
    return (
        f"zero signal: {seen} (loss {losses[-1]:.4f}), so nothing is learnt; look at the data (can chosen be told from "
        "rejected?), beta and the learning rate"
    )
