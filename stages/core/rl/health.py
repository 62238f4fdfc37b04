"""Whether training goes well: the figures of a round, and the alarms that they set off.

Thresholds are starting points from what others met (docs/ppo.md says what each figure means and what to do); an alarm
warns once, or ends the training where the settings say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.config import ALARM_ROUNDS, COMPARED_ROUNDS, Alarm, OnlineDpoSettings, PpoSettings, Rounds
from reward import shaping
from stages.core.alarms import LAST, SPIKE_STEPS, gradient_spike
from stages.core.checkpoint import State
from stages.core.rl.experience import Experience, all_alike, in_order
from stages.core.rl.sampling import Rollout

Figures = Mapping[str, float]


def figures(experiences: Sequence[Experience], rollout: Rollout, settings: Rounds) -> dict[str, float]:
    """What a rollout looks like, before the updates that learn from it.

    Args:
        experiences: All of the rollout, with their scores.
        rollout: The responses.
        settings: The stage's.

    Returns:
        reward, reward_deviation: mean and standard deviation of what responses are worth by themselves.
        kl: divergence from the reference, nats a response (k1).
        entropy: of the sampling distribution, nats a token.
        rollout_gap: mean absolute difference of log-probabilities between sampling and training.
        length, length_p95: mean and 95th percentile of the responses' tokens.
        length_reward_correlation: Pearson's, over responses.
        ended: share of responses that end their turn.
        distinct_2: distinct pairs of neighbouring tokens over all pairs.
        advantage_mean, advantage_deviation: mean and standard deviation before whitening; only where advantages are
            estimated.
        no_advantage: share of prompts whose responses all have the same score; only where they are compared.
        explained_variance: of the returns by the values; only where values are learnt.
    """
    rewards, lengths = _joined(experiences, "rewards"), _joined(experiences, "lengths").float()
    found = {
        "reward": rewards.mean().item(),
        "reward_deviation": rewards.std(unbiased=False).item(),
        "kl": _joined(experiences, "log_ratios").sum().item() / len(rewards),
        "entropy": _joined(experiences, "entropy").mean().item(),
        "rollout_gap": (_joined(experiences, "sampled") - _joined(experiences, "logprobs")).abs().mean().item(),
        "length": lengths.mean().item(),
        "length_p95": lengths.quantile(0.95).item(),
        "length_reward_correlation": correlation(lengths, rewards),
        "ended": _joined(experiences, "ended").float().mean().item(),
        "distinct_2": distinct_pairs([each.tokens for each in rollout.samples]),
    }
    if settings.compares_responses:
        alike = all_alike(in_order(rollout, experiences, "scores"))
        found["no_advantage"] = alike.float().mean().item()
    return found | _of_advantages(_joined(experiences, "estimates")) | _of_values(experiences)


def _of_advantages(advantages: Tensor) -> dict[str, float]:
    if not len(advantages):
        return {}
    return {
        "advantage_mean": advantages.mean().item(),
        "advantage_deviation": advantages.std(unbiased=False).item(),
    }


def _of_values(experiences: Sequence[Experience]) -> dict[str, float]:
    values, returns = _joined(experiences, "values"), _joined(experiences, "returns")
    if not values.any():
        return {}
    everywhere = torch.ones_like(values, dtype=torch.bool)
    return {"explained_variance": shaping.explained_variance(values, returns, everywhere)}


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of two [n]; 0 where one is constant."""
    a, b = first.double() - first.double().mean(), second.double() - second.double().mean()
    size = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / size) if size > 0 else 0.0


def distinct_pairs(responses: Sequence[tuple[int, ...]]) -> float:
    """Distinct pairs of neighbouring tokens over all such pairs (Li et al. 2016, arXiv 1510.03055); 1 without any."""
    pairs = [pair for tokens in responses for pair in pairwise(tokens)]
    return len(set(pairs)) / len(pairs) if pairs else 1.0


@dataclass(frozen=True)
class Raised:
    """An alarm that went off, and what it saw."""

    name: Alarm
    seen: str

    def __str__(self) -> str:
        return f"{self.name.replace('_', ' ')}: {self.seen}"


class Health:
    """Watches the figures of round after round; every alarm goes off at most once.

    Args:
        settings: The stage's, which say what can be done about it.
    """

    def __init__(self, settings: Rounds) -> None:
        self._closer = _closer(settings)
        self._history: list[Figures] = []
        self.raised: list[Raised] = []

    def watch(self, found: Figures) -> list[Raised]:
        """Take in a round's figures; returns the alarms that go off now."""
        self._history.append(found)
        before = {each.name for each in self.raised}
        due = [name for name in _ALARMS if name not in before and len(self._history) >= ALARM_ROUNDS.get(name, 1)]
        seen = {name: _ALARMS[name](self._history, self._closer) for name in due}
        now = [Raised(name, text) for name, text in seen.items() if text]
        self.raised += now
        return now

    def state(self) -> State:
        """The rounds and alarms so far."""
        return State(values={"history": self._history, "raised": [asdict(each) for each in self.raised]})

    def load_state(self, state: State) -> None:
        """Go on from such a state."""
        self._history = list(state.values["history"])
        self.raised = [Raised(**each) for each in state.values["raised"]]

    def set_off(self, name: Alarm, seen: str) -> list[Raised]:
        """Set off an alarm that something was seen of elsewhere, unless it went off before."""
        if not seen or any(each.name == name for each in self.raised):
            return []
        self.raised.append(Raised(name, seen))
        return self.raised[-1:]


def _joined(experiences: Sequence[Experience], name: str) -> Tensor:
    return torch.cat([getattr(each, name) for each in experiences])


def _mean(history: Sequence[Figures], name: str) -> float | None:
    """Mean over rounds that have the figure; None where none has."""
    found = [each[name] for each in history if name in each]
    return sum(found) / len(found) if found else None


def _closer(settings: Rounds) -> str:
    """What keeps the policy of a stage closer to its reference."""
    if isinstance(settings, PpoSettings):
        return "raise kl_coefficient, give kl_target, or lower the learning rate"
    held = isinstance(settings, OnlineDpoSettings) and settings.has_reference
    return "raise beta or lower the learning rate" if held else "lower the learning rate or take fewer steps"


Watcher = Callable[[Sequence[Figures], str], str]
"""What an alarm sees in the rounds so far, as text; empty where all is well. It is told what keeps a policy closer to
its reference."""


def _compared(name: str, wrong: Callable[[float, float], bool], said: str) -> Watcher:
    """Watches a figure's mean over the last rounds beside that over the first."""

    def watch(history: Sequence[Figures], closer: str) -> str:
        first, last = _mean(history[:COMPARED_ROUNDS], name), _mean(history[-COMPARED_ROUNDS:], name)
        if first is None or last is None or not wrong(first, last):
            return ""
        return said.format(first=first, last=last, closer=closer)

    return watch


def _recent(name: str, wrong: Callable[[float], bool], said: str, rounds: int = COMPARED_ROUNDS) -> Watcher:
    """Watches a figure's mean over the last rounds."""

    def watch(history: Sequence[Figures], closer: str) -> str:
        last = _mean(history[-rounds:], name)
        return said.format(last=last, closer=closer) if last is not None and wrong(last) else ""

    return watch


def _spike(history: Sequence[Figures], closer: str) -> str:
    """Watches the policy's gradient beside that of the rounds before."""
    norms = [each["gradient_norm"] for each in history if "gradient_norm" in each]
    return gradient_spike(norms[-LAST - SPIKE_STEPS : -SPIKE_STEPS], norms[-SPIKE_STEPS:])


_ALARMS: dict[Alarm, Watcher] = {
    "sampling_gap": _compared(
        "rollout_gap",
        lambda first, last: last > max(0.02, 3 * first),
        "sampling and training differ by {last:.3f} nats a token, at first {first:.3f}; try another sampler or float32",
    ),
    "entropy_collapse": _compared(
        "entropy",
        lambda first, last: last < 0.3 * first,
        "the entropy fell from {first:.2f} to {last:.2f} nats a token; {closer}",
    ),
    "negative_kl": _recent(
        "kl",
        lambda last: last < -0.5,
        "the divergence from the reference is {last:.2f} nats a response; sampling and training disagree (rollout_gap)",
    ),
    "kl_runaway": _recent(
        "kl",
        lambda last: last > 30,
        "the divergence from the reference is {last:.1f} nats a response; {closer}",
    ),
    "length_runaway": _compared(
        "length",
        lambda first, last: last > 2 * first,
        "responses grew from {first:.0f} to {last:.0f} tokens; give length_penalty, or look at what the reward prefers",
    ),
    "unfinished": _compared(
        "ended",
        lambda first, last: last < min(0.7, first - 0.2),
        "{last:.0%} of the responses end their turn, {first:.0%} did; raise missing_eos_penalty or max_new_tokens",
    ),
    "ratio_explosion": _recent(
        "ratio_max",
        lambda last: last > 10,
        "a token's probability changed {last:.0f}-fold in one round; lower the learning rate or update_epochs",
        rounds=1,
    ),
    "value_useless": _recent(
        "explained_variance",
        lambda last: last < 0,
        "values explain less than a constant would ({last:.2f}); raise value_learning_rate or give value_warmup",
        rounds=2 * COMPARED_ROUNDS,
    ),
    "constant_reward": _recent(
        "reward_deviation",
        lambda last: last < 1e-6,
        "all responses get the same reward; there is nothing left to learn",
        rounds=1,
    ),
    "gradient_spike": _spike,
}
