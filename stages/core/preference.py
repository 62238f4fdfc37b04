"""The objective of learning from pairs, on any of the losses of the family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from data.batch import Layout, TreeBatch
from data.tree import Tree
from pipeline.config import DpoSettings, OnlineDpoSettings, PreferenceObjective
from pipeline.errors import ArtifactError
from stages.core import loop, probes
from stages.core.float32 import in_float32
from stages.core.losses import PREFERENCE_LOSSES
from stages.core.reference import Reference, in_each_step, pair_logprobs
from stages.core.roles import POLICY, REFERENCE, Roles
from stages.core.scoring import on_device


def objective(
    roles: Roles, settings: DpoSettings | OnlineDpoSettings, layout: Layout, reference: Reference | None = None
) -> loop.Objective:
    """Mean loss over the step's pairs, with the mean margin and the share of pairs whose margin is positive.

    `chosen_logprob` is the mean log-probability of the chosen responses' tokens: it falls when learning goes astray.

    Args:
        roles: The base with policy and reference.
        settings: The stage's.
        layout: How to lay out trees.
        reference: The reference where it was kept; without, it is computed if the loss has one.
    """
    loss = PREFERENCE_LOSSES[settings.loss]
    forwards = 2 if settings.has_reference and reference is None else 1
    reference = reference or computed_reference(roles, settings)

    def parts(examples: Sequence[Tree]) -> Iterator[loop.Part]:
        chosen_tokens = sum(tree.branches[0].reads for tree in examples)
        for batch in on_device(roles.base, examples, settings.batch_tokens, layout):
            against = reference(batch) if reference else None
            with roles.use(POLICY):
                policy = pair_logprobs(roles.base, batch)
                logprobs = loss.logprobs(policy, against, read_tokens(batch))
                margins = implicit_margins(logprobs, settings)
                likelihood = policy[:, 0].sum() / chosen_tokens
                shares = {
                    "chosen_logprob": likelihood.item(),
                    "accuracy": (margins > 0).float().sum().item() / len(examples),
                    "margin": margins.sum().item() / len(examples),
                }
                losses = loss.function(logprobs, settings)
                total = losses.sum() / len(examples) - settings.supervised_weight * likelihood
                yield loop.Part(total, shares, forwards * batch.token_count)

    return parts


def computed_reference(roles: Roles, settings: DpoSettings | OnlineDpoSettings) -> Reference | None:
    """The reference, computed when it is asked for; None where the loss has none."""
    return in_each_step(roles) if settings.has_reference else None


@torch.no_grad()
def require_beginning(
    roles: Roles, reference: Reference, pairs: Sequence[Tree], tokens_per_batch: int, layout: Layout
) -> None:
    """Raise ArtifactError unless the policy, which has taken no step yet, is what the reference says of these pairs.

    Where it does not begin as its reference, that is another model's, and the margin would not begin at zero. Policy
    and reference are compared in float32. What training reads of the reference, which may come from the cache, is
    compared with the reference in the run's precision.
    """
    batches = list(on_device(roles.base, pairs, tokens_per_batch, layout))
    trees = [tree for batch in batches for tree in batch.trees]

    def computed(role: str, *, exactly: bool) -> Tensor:
        with roles.use(role), in_float32(roles.base.model) if exactly else nullcontext():
            return torch.cat([pair_logprobs(roles.base, batch) / read_tokens(batch) for batch in batches])

    _require_near(computed(POLICY, exactly=True), computed(REFERENCE, exactly=True), probes.SAME, trees)
    read = torch.cat([reference(batch) / read_tokens(batch) for batch in batches])
    tolerance = probes.SAME if roles.base.compute.dtype == torch.float32 else probes.KEPT
    _require_near(read, computed(REFERENCE, exactly=False), tolerance, trees)


def _require_near(found: Tensor, expected: Tensor, tolerance: float, trees: Sequence[Tree]) -> None:
    """Raise ArtifactError where log-probabilities a token [pairs, 2] differ by more (root mean square)."""
    gaps = found - expected
    distance = gaps.square().mean().sqrt().item()
    if not distance <= tolerance:
        worst = int(gaps.abs().amax(1).argmax())
        raise ArtifactError(
            f"the policy does not begin as its reference: log-probabilities a token are {found[worst].tolist()} and "
            f"{expected[worst].tolist()}, over {len(trees)} pairs they differ by {distance:.2g} (tolerance "
            f"{tolerance:.2g})",
            where=trees[worst].origin,
            hint="the reference must be the stage's `policy`; where it was kept, clear the token cache",
        )


def read_tokens(batch: TreeBatch) -> Tensor:
    """[pairs, 2] tokens of (chosen, rejected)."""
    counts = [[branch.reads for branch in tree.branches] for tree in batch.trees]
    return torch.tensor(counts, device=batch.tokens.device)


def implicit_margins(logprobs: Tensor, settings: PreferenceObjective) -> Tensor:
    """[pairs] implicit reward of the chosen response less the rejected one's."""
    return settings.beta * (logprobs[:, 0] - logprobs[:, 1]).detach()
