"""What a trainer of TRL has made of the policy, measured and stored as Baton's own stages do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data.tree import Tree
from pipeline.contract import Artifact
from pipeline.manifest import Metric
from reward.intervals import mean_interval, ratio_interval, share_preferred
from stages.core import probes
from stages.core.models import LanguageModel, load_model
from stages.core.roles import POLICY, REWARD, Roles
from stages.core.scoring import exponential, logprobs, record_probes, reward_scores, scores

Logprobs = Mapping[int, list[float]]
"""Tree number -> summed log-probability of each branch's read tokens."""

LAST_STEPS = 10
TOKENS_PER_BATCH = 8192
FIGURES = {
    "reward": "reward",
    "objective/scores": "reward",
    "kl": "kl",
    "objective/kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
}
"""What trainers that sample call a figure -> what it is called here."""


def store_adapter(roles: Roles, directory: Path, examples: Sequence[Tree]) -> None:
    """Write the policy's adapter with its probes."""
    roles.save(POLICY, directory)
    with roles.use(POLICY):
        record_probes(directory, examples, roles.base)


def store_model(trained: LanguageModel, directory: Path, examples: Sequence[Tree]) -> LanguageModel:
    """Write a model with probes that are those of the model as the next stage will load it; returns that."""
    trained.save(directory)
    saved = load_model(Artifact(directory, "model", ""), trained.compute)
    record_probes(directory, examples, saved)
    return saved


def store_reward(roles: Roles, directory: Path, examples: Sequence[Tree]) -> None:
    """Write the reward model's adapter and head with their probes."""
    roles.save(REWARD, directory)
    probes.record(directory, examples, lambda trees: reward_scores(roles, REWARD, trees), roles.base)


def reward_metrics(roles: Roles, held_out: Sequence[Tree]) -> dict[str, Metric]:
    """How often and by how much the better of two held-out responses scores higher."""
    found = scores(roles, REWARD, held_out, layout="plain")
    return _preferred([found[tree.number][0] - found[tree.number][-1] for tree in held_out], "score_margin")


def loss_metrics(policy: Logprobs, held_out: Sequence[Tree]) -> dict[str, Metric]:
    """Held-out loss in nats per read token, and perplexity; empty without trees."""
    if not held_out:
        return {}
    loss = ratio_interval([-policy[tree.number][0] for tree in held_out], [tree.reads for tree in held_out])
    return {"held_out_loss": loss, "held_out_perplexity": exponential(loss)}


def implicit_metrics(policy: Logprobs, reference: Logprobs, held_out: Sequence[Tree]) -> dict[str, Metric]:
    """How often and by how much the chosen of two held-out responses has gained more in log-probability.

    Args:
        policy: Under the policy.
        reference: Under what the policy began as.
        held_out: The trees; those with a single response say nothing of that.
    """
    gains = [
        [after - before for after, before in zip(policy[tree.number], reference[tree.number], strict=True)]
        for tree in held_out
        if len(tree.branches) > 1
    ]
    return _preferred([gain[-2] - gain[-1] for gain in gains], "log_ratio_margin")


def branch_logprobs(language_model: LanguageModel, trees: Sequence[Tree]) -> Logprobs:
    """Summed log-probabilities of all branches under the role in use."""
    return logprobs(language_model, trees, TOKENS_PER_BATCH, "plain")


def sampling_metrics(history: Sequence[Mapping[str, float]]) -> dict[str, Metric]:
    """Means over the last steps of a trainer that samples, which are the policy that is handed on, give or take."""
    last = history[-LAST_STEPS:]
    found = ((name, [each[key] for each in last if key in each]) for key, name in FIGURES.items())
    return {name: Metric(value=sum(values) / len(values), n=len(values)) for name, values in found if values}


def _preferred(margins: Sequence[float], name: str) -> dict[str, Metric]:
    if not margins:
        return {}
    return {"pair_accuracy": share_preferred(margins), name: mean_interval(margins)}
