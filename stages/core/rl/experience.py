"""What one rollout yields: sampled responses with everything the policy and the value function learn from them.

All roles read the same tokens in the same batches, and the updates use these batches again, so that on the
first pass the policy's probability ratio is exactly 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.batch import Layout, TreeBatch
from data.tree import Tree
from pipeline.config import PpoSettings, Rounds
from reward import shaping
from stages.core.likelihood import logprobs_and_entropies, logprobs_of
from stages.core.rl.rewards import Rewards, Scale
from stages.core.rl.sampling import Rollout
from stages.core.rl.trunk import Trunk
from stages.core.roles import POLICY, REFERENCE, REWARD, VALUE, Roles
from stages.core.scoring import on_device

SAME = 1e-4
"""Scores that differ by less differ by rounding."""


@dataclass
class Experience:
    """One batch of sampled responses. Tensors of [reads] are in the order of the batch's reads.

    Attributes:
        batch: A branch for each response.
        logprobs: [reads] under the policy that sampled them, computed as in training.
        sampled: [reads] the same as computed while sampling.
        reference: [reads] under the reference.
        entropy: [reads] of the sampling distribution.
        values: [reads] value of the state before each token; zero where no value function is trained.
        rewards: [branches] what each response is worth by itself.
        ended: [branches] whether the response ended its turn.
        below: [rows, width, hidden] what entered the lowest adapted layer, where layers below are not adapted.
        scores: [branches] rewards on their scale, penalties taken off; set by `score`.
        clipped: [branches] whether the reward was clipped; set by `score` where there is a limit.
        estimates: [reads] advantages as they were estimated; set by `estimate`, as are the next two.
        advantages: [reads] the same as they are learnt from, whitened with `gae`.
        returns: [reads] what the values should have been.
    """

    batch: TreeBatch
    logprobs: Tensor
    sampled: Tensor
    reference: Tensor
    entropy: Tensor
    values: Tensor
    rewards: Tensor
    ended: Tensor
    below: Tensor | None = None
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    clipped: Tensor = field(default_factory=lambda: torch.empty(0))
    estimates: Tensor = field(default_factory=lambda: torch.empty(0))
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    returns: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def counts(self) -> list[int]:
        """Tokens of each response."""
        return [branch.reads for tree in self.batch.trees for branch in tree.branches]

    @property
    def lengths(self) -> Tensor:
        """The same as a tensor: [branches]."""
        return torch.tensor(self.counts, device=self.rewards.device)

    @property
    def log_ratios(self) -> Tensor:
        """log pi - log pi_ref: [reads]."""
        return self.logprobs - self.reference


class Collector:
    """Has sampled responses scored by all roles.

    Args:
        roles: The base with its roles; those of a value function only where one is trained.
        settings: The stage's.
        rewards: What responses are worth.
        layout: How to lay out trees.
        trunk: The layers that all roles share.
    """

    def __init__(
        self, roles: Roles, settings: Rounds, rewards: Rewards, layout: Layout, trunk: Trunk | None = None
    ) -> None:
        self._roles, self._settings, self._rewards, self._layout = roles, settings, rewards, layout
        self.trunk = trunk or Trunk(roles.base.model, 0)

    @torch.no_grad()
    def collect(self, rollout: Rollout, trees: Sequence[Tree], of_rules: Sequence[float]) -> list[Experience]:
        """Score responses; advantages are for `estimate`.

        Args:
            rollout: The responses.
            trees: Those of the rollout's trees that are wanted.
            of_rules: What the rules say of each of the rollout's responses.
        """
        batches = on_device(self._roles.base, trees, self._settings.batch_tokens, self._layout)
        return [self._experience(batch, rollout, of_rules) for batch in batches]

    def _experience(self, batch: TreeBatch, rollout: Rollout, of_rules: Sequence[float]) -> Experience:
        roles, settings = self._roles, self._settings
        model, autocast, device = roles.base.model, roles.base.compute.autocast, batch.tokens.device
        places = rollout.of(batch)
        samples = [rollout.samples[place] for place in places]
        with roles.use(POLICY), autocast():
            whole, below = self.trunk.states(batch)
            states = whole.index_select(0, batch.sources)
            logprobs, entropy = logprobs_and_entropies(model, states, batch.targets, settings.temperature)
            # A value head without an adapter of its own reads the policy's states.
            values = roles.heads[VALUE](states) if VALUE in roles.heads and not roles.has(VALUE) else None
        with roles.use(REFERENCE), autocast():
            states = self.trunk.resumed(batch, below).index_select(0, batch.sources)
            reference = logprobs_of(model, states, batch.targets, settings.temperature)
        worth = torch.tensor([of_rules[place] for place in places], dtype=torch.float32, device=device)
        if self._rewards.has_model:
            with roles.use(REWARD), autocast():
                worth = worth + self._rewards.of_model(batch, self.trunk.resumed(batch, below))
        if values is None:
            values = (
                state_values(roles, batch, self.trunk, below) if VALUE in roles.heads else torch.zeros_like(logprobs)
            )
        return Experience(
            batch=batch,
            logprobs=logprobs,
            sampled=torch.tensor([each for sample in samples for each in sample.logprobs], device=device),
            reference=reference,
            entropy=entropy,
            values=values,
            rewards=worth,
            ended=torch.tensor([each.ended for each in samples], device=device),
            below=below,
        )


def state_values(roles: Roles, batch: TreeBatch, trunk: Trunk, below: Tensor | None = None) -> Tensor:
    """The value role's estimate for the state before each read token: [reads], float32."""
    with roles.use(VALUE), roles.base.compute.autocast():
        return roles.heads[VALUE](trunk.resumed(batch, below).index_select(0, batch.sources))


def score(experiences: Sequence[Experience], settings: Rounds, scale: Scale) -> None:
    """Set the scores of a whole rollout's experience."""
    for each in experiences:
        each.scores = scale.scores(each.rewards, each.ended, each.lengths, settings)
        if settings.reward_clip is not None:
            each.clipped = scale.scaled(each.rewards).abs() > settings.reward_clip


def all_alike(scores: Tensor) -> Tensor:
    """Whether the scores [prompts, n] of the responses to a prompt tell none of them from another: [prompts]."""
    return scores.amax(1) - scores.amin(1) <= SAME


def estimate(experiences: Sequence[Experience], settings: PpoSettings, kl_coefficient: float) -> None:
    """Set the advantages and returns of a whole rollout's experience from its scores.

    With `gae`, advantages are whitened over all tokens of the rollout (Huang et al. 2024, arXiv 2403.17031, detail 17).
    """
    coefficient = kl_coefficient if settings.kl_in == "reward" else 0.0
    for each in experiences:
        each.estimates, each.returns = _advantages(each, settings, coefficient)
        each.advantages = each.estimates
    if settings.advantage == "gae":
        for each, whitened in zip(experiences, _whitened(experiences), strict=True):
            each.advantages = whitened


def in_order(rollout: Rollout, experiences: Sequence[Experience], name: str) -> Tensor:
    """A figure of branches in the rollout's order: [prompts, n], on the host."""
    found = torch.zeros(len(rollout.samples))
    for each in experiences:
        found[rollout.of(each.batch)] = getattr(each, name).float().cpu()
    return found.view(len(rollout.prompts), rollout.per_prompt)


def _whitened(experiences: Sequence[Experience]) -> Iterator[Tensor]:
    joined = torch.cat([each.estimates for each in experiences])
    whitened = shaping.whiten(joined, torch.ones_like(joined, dtype=torch.bool))
    return iter(whitened.split([len(each.estimates) for each in experiences]))


def _advantages(experience: Experience, settings: PpoSettings, kl_coefficient: float) -> tuple[Tensor, Tensor]:
    divergences = shaping.ESTIMATORS[settings.kl_estimator](experience.log_ratios)
    if settings.advantage == "gae":
        return _generalized(experience, divergences, settings, kl_coefficient)
    worth = experience.scores - kl_coefficient * experience.batch.sum_by_branch(divergences)
    groups = worth.view(-1, len(experience.batch.trees[0].branches))
    relative = shaping.leave_one_out(groups) if settings.advantage == "rloo" else shaping.group_normalized(groups)
    advantages = relative.flatten().index_select(0, experience.batch.branch_of_read)
    return advantages, torch.zeros_like(advantages)


def _generalized(
    experience: Experience, divergences: Tensor, settings: PpoSettings, kl_coefficient: float
) -> tuple[Tensor, Tensor]:
    counts = experience.counts
    values = _padded(experience.values, counts)
    mask = _padded(torch.ones_like(experience.values, dtype=torch.bool), counts)
    rewards = shaping.token_rewards(experience.scores, _padded(divergences, counts), mask, kl_coefficient)
    advantages = shaping.generalized_advantages(rewards, values, mask, settings.discount, settings.gae_lambda)
    return advantages[mask], (advantages + values)[mask]


def _padded(flat: Tensor, counts: list[int]) -> Tensor:
    """[reads] -> [branches, longest], padded with zeros at the end."""
    return pad_sequence(flat.split(counts), batch_first=True)
