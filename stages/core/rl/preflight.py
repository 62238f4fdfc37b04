"""What must hold before the first update, measured on the first rollout.

Each check is one line with its value. A failed one stops the run: every one of them is a mistake that training would
hide, in figures that look plausible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from data.batch import TreeBatch
from pipeline import memory
from pipeline.config import Rounds
from pipeline.errors import NumericalError
from pipeline.memory import Task
from stages.core import rollout
from stages.core.float32 import in_float32
from stages.core.forward import token_logprobs
from stages.core.layout import DISTANCE
from stages.core.rl.experience import SAME, Experience
from stages.core.rl.selection import Look
from stages.core.rl.updates import Losses
from stages.core.roles import POLICY, Roles
from stages.core.scoring import on_device

EQUAL = 1e-4
"""Largest deviation of a ratio from 1, or of a divergence from 0, that is put down to rounding."""
DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest difference in nats between log-probabilities of sampling, with a cache, and of training: root mean square. In
bfloat16, `layout.DISTANCE` times the distance of training from float32 where that is more."""
PROMPTS_IN_FLOAT32, TOKENS_IN_FLOAT32 = 4, 8
"""Prompts, and tokens of a response to each, on which sampling and training are compared in float32 as well."""
UNREACHED = {torch.float32: 1e-4, torch.bfloat16: 0.005}
"""Largest share of the trained distribution that sampling may leave out."""
CHANCE = 3.0
"""Standard errors of that share that are put down to which tokens were drawn."""
TELLING = 32
"""Responses of which one should end, and one should get another reward; of fewer, none may by chance. And tokens that
tell what sampling reaches."""
ALIKE = 1e-6
"""Standard deviation of rewards below which all are the same."""
LOOK_AT_REWARDS = (
    "look at the reward stage's pair accuracy, the rules, reward_clip, the temperature; for what is rarely right, "
    "raise samples_per_prompt"
)


@dataclass(frozen=True)
class Check:
    """A line of the preflight.

    Attributes:
        name: What was looked at.
        value: What was found, for reading.
        passed: Whether it is as it must be.
        remedy: What to change if it is not.
        told_by: How many responses there were to tell by, where a few cannot.
    """

    name: str
    value: str
    passed: bool
    remedy: str = ""
    told_by: int = TELLING

    @property
    def fails(self) -> bool:
        """Whether the run must not go on."""
        return not self.passed and self.told_by >= TELLING

    def __str__(self) -> str:
        if not self.passed and not self.fails:
            return f"not judged, with fewer than {TELLING} responses: {self.name} {self.value}"
        return f"{'ok' if self.passed else 'FAILED'}: {self.name} {self.value}"


def checks(roles: Roles, experiences: Sequence[Experience], settings: Rounds, seen: Look) -> Iterator[Check]:
    """What every stage that samples has to pass, one after another; the policy has not been updated yet.

    Args:
        roles: The base with its roles.
        experiences: Of the first rollout.
        settings: The stage's.
        seen: The same policy on held-out prompts.
    """
    yield _divergence(experiences)
    yield _gap(roles, experiences, settings)
    yield _ending(experiences, settings)
    yield _spread_within(experiences, settings, seen) if settings.compares_responses else _spread(experiences, seen)


def fits(task: Task, experiences: Sequence[Experience], left: int | None) -> Check:
    """Whether a round fits into the memory that is left.

    Args:
        task: The stage.
        experiences: Of the first rollout.
        left: Bytes; None where that is not known.
    """
    trees = [tree for each in experiences for tree in each.batch.trees]
    longest = max(len(tree.prompt) + max(len(branch.tokens) for branch in tree.branches) for tree in trees)
    at_once = max(each.batch.token_count for each in experiences)
    expected = memory.estimate(replace(task, longest=longest), at_once, imports=0)
    held = expected.weights + expected.adapters
    needed = expected.total - held - expected.fixed
    return Check(
        "memory",
        f"{memory.in_words(held)} of weights held once, about {memory.in_words(needed)} more for a round"
        + (f" of {memory.in_words(left)} free" if left is not None else ""),
        left is None or needed < left,
        "lower tokens_per_batch, samples_per_prompt or examples_per_step, or set gradient_checkpointing: true",
    )


def require(check: Check, where: str) -> None:
    """Raise NumericalError, with the remedy, for a failed check."""
    if check.fails:
        raise NumericalError(f"preflight: {check.name} {check.value}", where=where, hint=check.remedy)


def ratio(experiences: Sequence[Experience], losses: Losses, kl_coefficient: float) -> Check:
    """Whether the policy that is trained is the one that sampled."""
    # With gradients, through the very pass that training takes; nothing is done with them.
    (part,) = losses.policy(experiences[:1], kl_coefficient)
    found, approximate = part.shares["ratio"], part.shares["approximate_kl"]
    losses.take_largest_ratio()
    return Check(
        "probability ratio before any update",
        f"{found:.6f} (must be 1)",
        abs(found - 1) < EQUAL and approximate < EQUAL,
        "scoring and training compute the same tokens differently; try dtype=float32, and report it",
    )


def _divergence(experiences: Sequence[Experience]) -> Check:
    tokens = sum(len(each.logprobs) for each in experiences)
    gap = sum(each.log_ratios.abs().sum().item() for each in experiences) / tokens
    return Check(
        "divergence from the reference",
        f"{gap:.2e} nats a token (must be 0)",
        gap < EQUAL,
        "the policy does not begin as its reference; give the stage whose result `policy` is",
    )


def _gap(roles: Roles, experiences: Sequence[Experience], settings: Rounds) -> Check:
    """In bfloat16 the smallest mistakes, such as positions that are off by one, are no larger than rounding: there,
    some responses are sampled and scored in float32 too."""
    dtype = roles.base.compute.dtype
    found = torch.cat([(each.sampled - each.logprobs).flatten() for each in experiences])
    difference, most, exact = found.square().mean().sqrt().item(), DIFFERENCE[dtype], 0.0
    if dtype != torch.float32:
        most = max(most, DISTANCE * _distance(roles, experiences[0].batch, settings.temperature))
        exact = _gap_in_float32(roles, experiences, settings)
    # Sampled from q, E[p / q] is p's share of what q can give: 1, however both are rounded, if nothing is cut off.
    ratios = found.neg().exp()
    unreached, deviation = 1 - ratios.mean().item(), ratios.std(unbiased=False).item()
    reaches = abs(unreached) <= UNREACHED[dtype] + CHANCE * deviation / len(found) ** 0.5 or len(found) < TELLING
    return Check(
        "gap between sampling and training",
        f"{difference:.2e} nats a token (at most {most:.3g}), "
        + (f"{exact:.2e} in float32 (at most {DIFFERENCE[torch.float32]}), " if dtype != torch.float32 else "")
        + f"{1 - unreached:.4f} of the distribution sampled from ({1 - UNREACHED[dtype]}, up to chance)",
        difference <= most and exact <= DIFFERENCE[torch.float32] and reaches,
        "the cache computes other log-probabilities than a whole pass, or the sampler leaves tokens out; try the other "
        "sampler, or dtype=float32",
    )


@torch.no_grad()
def _gap_in_float32(roles: Roles, experiences: Sequence[Experience], settings: Rounds) -> float:
    """Root mean square of the differences on a few responses, to prompts from the shortest to the longest.

    Continuous batching keeps keys and values in the precision of the weights, so that it is not compared: 0.
    """
    if settings.sampler != "native":
        return 0.0
    base = roles.base
    prompts = sorted({tree.prompt for each in experiences for tree in each.batch.trees}, key=len)
    prompts = prompts[:: max(1, len(prompts) // PROMPTS_IN_FLOAT32)]
    with roles.use(POLICY), in_float32(base.model):
        samples = rollout.sample(
            base.model,
            prompts,
            stop_id=base.template.stop_id,
            max_new_tokens=min(TOKENS_IN_FLOAT32, settings.max_new_tokens),
            temperature=settings.temperature,
            seed=0,
            tokens_per_batch=settings.batch_tokens,
        )
        gaps = []
        for batch in on_device(base, rollout.trees_of(prompts, samples), settings.batch_tokens, "plain"):
            sampled = [each for tree in batch.trees for each in samples[tree.number].logprobs]
            gaps.append(token_logprobs(base.model, batch, settings.temperature).cpu() - torch.tensor(sampled))
    return torch.cat(gaps).square().mean().sqrt().item()


@torch.no_grad()
def _distance(roles: Roles, batch: TreeBatch, temperature: float) -> float:
    """How far log-probabilities of training are from float32: root mean square."""
    model = roles.base.model
    with roles.use(POLICY):
        with in_float32(model):
            exact = token_logprobs(model, batch, temperature)
        with roles.base.compute.autocast():
            return (token_logprobs(model, batch, temperature) - exact).square().mean().sqrt().item()


def _ending(experiences: Sequence[Experience], settings: Rounds) -> Check:
    ended = torch.cat([each.ended for each in experiences])
    return Check(
        "responses that end their turn",
        f"{ended.float().mean().item():.0%} within {settings.max_new_tokens} tokens",
        bool(ended.any()) or settings.missing_eos_penalty == 0,
        "raise max_new_tokens, or train the sft stage on whole turns; with missing_eos_penalty=0 none has to end",
        told_by=len(ended),
    )


def _spread(experiences: Sequence[Experience], seen: Look) -> Check:
    rewards = torch.cat([each.rewards for each in experiences])
    deviation = rewards.std(unbiased=False).item()
    clipped = _mostly_clipped(experiences)
    return Check(
        "spread of the rewards",
        f"{deviation:.3g} around {rewards.mean().item():.3g}" + clipped,
        not clipped and max(deviation, float(seen.rewards.std())) > ALIKE,
        f"the reward tells no response from another: {LOOK_AT_REWARDS}",
        told_by=TELLING if clipped else len(rewards),
    )


def _spread_within(experiences: Sequence[Experience], settings: Rounds, seen: Look) -> Check:
    """Responses are compared with others to their prompt alone, and those that differ by less than `SAME` are alike."""
    rewards = torch.cat([each.rewards.view(len(each.batch.trees), -1) for each in experiences])
    apart, deviation = rewards.amax(1) - rewards.amin(1), rewards.std(1, unbiased=False).mean().item()
    least = ALIKE if settings.reward_normalisation == "deviation" else SAME
    clipped = _mostly_clipped(experiences)
    return Check(
        "spread of the rewards among a prompt's responses",
        f"{deviation:.3g} around {rewards.mean().item():.3g}, at most {seen.apart:.3g} held out" + clipped,
        not clipped and max(apart.max().item(), seen.apart) > least,
        f"the reward tells no response to a prompt from another to it: {LOOK_AT_REWARDS} and evaluate_samples; "
        "for tiny rewards, set reward_normalisation: deviation",
        told_by=TELLING if clipped else rewards.numel(),
    )


def _mostly_clipped(experiences: Sequence[Experience]) -> str:
    """In words; empty where most rewards are not."""
    clipped = torch.cat([each.clipped for each in experiences])
    return ", most of them clipped" if len(clipped) and clipped.float().mean().item() > 0.5 else ""
