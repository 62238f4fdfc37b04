"""How often 95% intervals hold the truth, on simulated comparisons: `python -m bench.coverage`.

Prints a table for each size: the share of intervals that hold the true value, and their mean width, for the percentile
bootstrap that Baton uses, for BCa (Efron 1987, by scipy) beside it, and for the length-controlled win rate. It is what
the choice of the percentile bootstrap rests on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from reward.intervals import RESAMPLES, mean_interval
from reward.length_control import length_controlled

Array = NDArray[np.float64]
Interval = tuple[float, float]

STEPS, CHANCES = [-0.6, -0.2, 0.0, 0.2, 0.6], [0.05, 0.1, 0.5, 0.15, 0.2]
"""Gains in gold reward as the embedded world gives them: half of the prompts alike, the rest by steps."""


def gains(dice: np.random.Generator, prompts: int) -> Array:
    """Differences of gold rewards."""
    return dice.choice(STEPS, p=CHANCES, size=prompts)


def normal(dice: np.random.Generator, prompts: int) -> Array:
    """Differences of learned rewards."""
    return dice.normal(loc=0.5, size=prompts)


def skewed(dice: np.random.Generator, prompts: int) -> Array:
    """Few large gains among many small ones: an exponential distribution."""
    return dice.exponential(size=prompts)


def rare(dice: np.random.Generator, prompts: int) -> Array:
    """One prompt in ten gained."""
    return (dice.random(prompts) < 0.1).astype(float)


POPULATIONS: dict[str, tuple[Callable[[np.random.Generator, int], Array], float]] = {
    "gold reward": (gains, float(np.dot(STEPS, CHANCES))),
    "normal": (normal, 0.5),
    "exponential": (skewed, 1.0),
    "one in ten": (rare, 0.1),
}
"""Name -> how it is drawn, and its mean."""
PREFERENCE, BIAS = 0.5, 1.0
"""Of the simulated judge: for the model, and for length."""


def percentile(values: Array) -> Interval:
    """Baton's."""
    found = mean_interval(values)
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def bca(values: Array) -> Interval:
    """Bias-corrected and accelerated, with as many resamples; equal values have no width."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, rng=np.random.default_rng(0), method="BCa")
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def win_rate(dice: np.random.Generator, prompts: int) -> Interval:
    """The length-controlled one, by a judge that likes length."""
    longer = dice.normal(loc=20, scale=40, size=prompts)
    chance = 1 / (1 + np.exp(-(PREFERENCE + BIAS * np.tanh(longer / longer.std()))))
    found = length_controlled((dice.random(prompts) < chance).astype(float), longer)
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def row(name: str, prompts: int, truth: float, intervals: Sequence[Interval]) -> str:
    """A line of the table."""
    held = np.mean([low <= truth <= high for low, high in intervals])
    width = np.mean([high - low for low, high in intervals])
    return f"| {name} | {prompts} | {held:.3f} | {width:.4f} |"


def main() -> None:
    """Simulate and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repetitions", type=int, default=2_000)
    arguments.add_argument("--prompts", type=int, nargs="+", default=[30, 153, 256])
    given = arguments.parse_args()
    sys.stdout.write("| interval | prompts | holds the truth | width |\n|---|---|---|---|\n")
    for prompts in given.prompts:
        for name, (draw, mean) in POPULATIONS.items():
            dice = np.random.default_rng(1)
            samples = [draw(dice, prompts) for _ in range(given.repetitions)]
            for method in (percentile, bca):
                sys.stdout.write(row(f"{name}, {method.__name__}", prompts, mean, list(map(method, samples))) + "\n")
        dice = np.random.default_rng(2)
        truth = 1 / (1 + np.exp(-PREFERENCE))
        found = [win_rate(dice, prompts) for _ in range(given.repetitions)]
        sys.stdout.write(row("win rate, length-controlled", prompts, truth, found) + "\n")


if __name__ == "__main__":
    main()
