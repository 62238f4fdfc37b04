"""Numbers for responses: log-probabilities under a role, and a reward or value role's scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.batch import Layout, TreeBatch, batches
from data.tree import Tree
from pipeline.contract import Artifact
from pipeline.manifest import Metric
from reward.intervals import ratio_interval
from stages.core import guards, probes
from stages.core.attention import OtherAttentionError
from stages.core.forward import hidden_states, summed_token_logprobs, token_logprobs
from stages.core.loop import Objective, Part
from stages.core.models import LanguageModel

if TYPE_CHECKING:  # peft brings bitsandbytes and torch's compiler: seconds that pretraining need not wait
    from stages.core.roles import Roles


def branch_scores(roles: Roles, role: str, batch: TreeBatch) -> Tensor:
    """The role's score of every branch, read at its last token: [branches], float32. The role must be in use."""
    return head_scores(roles, role, batch).mean(-1)


def head_scores(roles: Roles, role: str, batch: TreeBatch) -> Tensor:
    """The same by each of the role's heads: [branches, heads]."""
    return roles.heads[role].each(hidden_states(roles.base.model, batch).index_select(0, batch.ends))


@torch.no_grad()
def scores(
    roles: Roles, role: str, trees: Sequence[Tree], tokens_per_batch: int = 8192, layout: Layout = "packed"
) -> dict[int, list[float]]:
    """The role's score of every branch, by tree number."""
    with roles.use(role), roles.base.compute.autocast():
        return _by_tree(roles.base, trees, tokens_per_batch, layout, lambda batch: branch_scores(roles, role, batch))


@torch.no_grad()
def logprobs(
    language_model: LanguageModel,
    trees: Sequence[Tree],
    tokens_per_batch: int = 8192,
    layout: Layout = "packed",
    temperature: float = 1.0,
) -> dict[int, list[float]]:
    """Summed log-probability of the read tokens of every branch, by tree number, under the role in use."""
    model = language_model.model

    def summed(batch: TreeBatch) -> Tensor:
        return batch.sum_by_branch(token_logprobs(model, batch, temperature))

    with language_model.compute.autocast():
        return _by_tree(language_model, trees, tokens_per_batch, layout, summed)


def mean_logprobs(language_model: LanguageModel, trees: Sequence[Tree]) -> list[float]:
    """Mean log-probability per token of single-branch trees: the probe of a language model."""
    found = _in_one_row(lambda layout: logprobs(language_model, trees, layout=layout))
    return [found[tree.number][0] / tree.reads for tree in trees]


def reward_scores(roles: Roles, role: str, trees: Sequence[Tree]) -> list[float]:
    """Scores of single-branch trees: the probe of a reward model."""
    found = _in_one_row(lambda layout: scores(roles, role, trees, layout=layout))
    return [found[tree.number][0] for tree in trees]


def _in_one_row(compute: Callable[[Layout], dict[int, list[float]]]) -> dict[int, list[float]]:
    """Probes in a packed row, or in plain rows where the architecture has an attention of its own.

    Packed rows come first because earlier versions recorded them, and bfloat16 rounds differently in plain rows.
    """
    try:
        return compute("packed")
    except (OtherAttentionError, TypeError):
        return compute("plain")


def on_device(
    language_model: LanguageModel, trees: Sequence[Tree], tokens_per_batch: int, layout: Layout
) -> Iterator[TreeBatch]:
    """Batches of trees on the model's device.

    Raises:
        DataError: A tree is longer than the model's positions.
    """
    compute = language_model.compute
    for batch in batches(trees, tokens_per_batch, layout, rounded=compute.makes_kernels_by_shape):
        guards.require_positions(batch.trees, language_model.positions)
        yield batch.to(compute.device)


def loss_metrics(
    language_model: LanguageModel, trees: Sequence[Tree], tokens_per_batch: int, layout: Layout
) -> dict[str, Metric]:
    """Held-out loss in nats per read token, and perplexity; empty without trees."""
    if not trees:
        return {}
    apart = [tree.documents() for tree in trees]
    found = logprobs(language_model, [each for documents in apart for each in documents], tokens_per_batch, layout)
    losses = [-sum(found.get(tree.number, ())) for tree in trees]
    loss = ratio_interval(losses, [sum(each.reads for each in documents) for documents in apart])
    return {"held_out_loss": loss, "held_out_perplexity": exponential(loss)}


def exponential(metric: Metric) -> Metric:
    """The metric's value and interval under exp."""
    low, high = (None if bound is None else math.exp(bound) for bound in (metric.low, metric.high))
    return Metric(value=math.exp(metric.value), low=low, high=high, n=metric.n)


def negative_mean(language_model: LanguageModel, tokens_per_batch: int, layout: Layout) -> Objective:
    """The objective of language modelling: mean negative log-likelihood over the read tokens of the whole step."""

    def parts(examples: Sequence[Tree]) -> Iterator[Part]:
        documents = [each for tree in examples for each in tree.documents()]
        reads = sum(tree.reads for tree in documents)
        guards.require_trained_tokens(reads, (tree.origin for tree in examples))
        for batch in on_device(language_model, documents, tokens_per_batch, layout):
            with language_model.compute.autocast():
                total = summed_token_logprobs(language_model.model, batch)
            yield Part(-total / reads, tokens=batch.token_count)

    return parts


def replay_probes(artifact: Artifact, language_model: LanguageModel) -> None:
    """Check a received model or adapter, whose role must be in use, against its recorded log-probabilities."""
    probes.replay(artifact.directory, lambda trees: mean_logprobs(language_model, trees), language_model)


def record_probes(directory: Path, trees: Sequence[Tree], language_model: LanguageModel) -> None:
    """Record log-probabilities of the role in use for the receiver to check."""
    probes.record(directory, trees, lambda chosen: mean_logprobs(language_model, chosen), language_model)


def _by_tree(
    language_model: LanguageModel,
    trees: Sequence[Tree],
    tokens_per_batch: int,
    layout: Layout,
    per_branch: Callable[[TreeBatch], Tensor],
) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for batch in on_device(language_model, trees, tokens_per_batch, layout):
        values = iter(per_branch(batch).tolist())
        for tree in batch.trees:
            found.setdefault(tree.number, []).extend(next(values) for _ in tree.branches)
    return found
