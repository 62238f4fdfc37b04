"""What one rollout yields: sampled responses with everything PPO needs to learn from them.

All roles read the same tokens in the same batches, and the updates use these batches again, so that on the
first pass the policy's probability ratio is exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.batch import Layout, TreeBatch
from data.tree import Branch, Tree
from pipeline.config import PpoSettings
from reward import shaping
from stages.core.forward import hidden_states
from stages.core.likelihood import entropies, logprobs_of
from stages.core.roles import POLICY, REFERENCE, REWARD, VALUE, Roles
from stages.core.rollout import Sample
from stages.core.scoring import branch_scores, on_device


@dataclass
class Experience:
    """One batch of sampled responses. Tensors of [reads] are in the order of the batch's reads.

    Attributes:
        batch: The responses, one branch each.
        logprobs: [reads] under the policy that sampled them.
        reference: [reads] under the reference.
        values: [reads] value of the state before each token.
        scores: [branches] score of each response, penalties included.
        rewards: [branches] the reward model's own score.
        entropy: [reads] of the sampling distribution.
        advantages: [reads], whitened over the rollout.
        returns: [reads] what the values should have been.
    """

    batch: TreeBatch
    logprobs: Tensor
    reference: Tensor
    values: Tensor
    scores: Tensor
    rewards: Tensor
    entropy: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def counts(self) -> list[int]:
        """Tokens of each response."""
        return [branch.reads for tree in self.batch.trees for branch in tree.branches]


def trees_of(prompts: Sequence[tuple[int, ...]], samples: Sequence[Sample]) -> list[Tree]:
    """Each prompt with its sampled response, numbered by position."""
    return [
        Tree(prompt, (Branch.of(each.tokens),), number)
        for number, (prompt, each) in enumerate(zip(prompts, samples, strict=True))
    ]


@torch.no_grad()
def collect(
    roles: Roles, trees: Sequence[Tree], samples: Sequence[Sample], settings: PpoSettings, layout: Layout
) -> list[Experience]:
    """Score sampled responses under all four roles and estimate advantages; whiten with `whiten_advantages`.

    Args:
        roles: The base with its roles.
        trees: One single-branch tree per response, numbered by its place in `samples`.
        samples: The samples.
        settings: The stage's.
        layout: How to lay out trees.
    """
    found = []
    for batch in on_device(roles.base, trees, settings.tokens_per_batch, layout):
        ended = [samples[tree.number].ended for tree in batch.trees]
        found.append(_experience(roles, batch, ended, settings))
    return found


def whiten_advantages(experiences: Sequence[Experience]) -> None:
    """Whiten advantages over all tokens of the rollout, in place."""
    joined = torch.cat([each.advantages for each in experiences])
    whitened = shaping.whiten(joined, torch.ones_like(joined, dtype=torch.bool))
    parts = whitened.split([len(each.advantages) for each in experiences])
    for each, part in zip(experiences, parts, strict=True):
        each.advantages = part


def _experience(roles: Roles, batch: TreeBatch, ended: list[bool], settings: PpoSettings) -> Experience:
    model, autocast = roles.base.model, roles.base.compute.autocast
    with roles.use(POLICY), autocast():
        states = hidden_states(model, batch).index_select(0, batch.sources)
        logprobs = logprobs_of(model, states, batch.targets, settings.temperature)
        entropy = entropies(model, states, settings.temperature)
    with roles.use(REFERENCE), autocast():
        states = hidden_states(model, batch).index_select(0, batch.sources)
        reference = logprobs_of(model, states, batch.targets, settings.temperature)
    with roles.use(REWARD), autocast():
        rewards = branch_scores(roles, REWARD, batch)
    values = state_values(roles, batch)
    missing = torch.tensor([not each for each in ended], device=rewards.device)
    scores = rewards - settings.missing_eos_penalty * missing
    experience = Experience(batch, logprobs, reference, values, scores, rewards, entropy, values, values)
    experience.advantages, experience.returns = _advantages(experience, settings)
    return experience


def state_values(roles: Roles, batch: TreeBatch) -> Tensor:
    """The value role's estimate for the state before each read token: [reads], float32."""
    with roles.use(VALUE), roles.base.compute.autocast():
        return roles.heads[VALUE](hidden_states(roles.base.model, batch).index_select(0, batch.sources))


def _advantages(experience: Experience, settings: PpoSettings) -> tuple[Tensor, Tensor]:
    counts = experience.counts
    log_ratios = _padded(experience.logprobs - experience.reference, counts)
    values = _padded(experience.values, counts)
    mask = _padded(torch.ones_like(experience.values, dtype=torch.bool), counts)
    rewards = shaping.token_rewards(experience.scores, log_ratios, mask, settings.kl_coefficient)
    advantages = shaping.generalized_advantages(rewards, values, mask, settings.discount, settings.gae_lambda)
    return advantages[mask], (advantages + values)[mask]


def _padded(flat: Tensor, counts: list[int]) -> Tensor:
    """[reads] -> [branches, longest], padded with zeros at the end."""
    return pad_sequence(flat.split(counts), batch_first=True)
