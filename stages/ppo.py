"""Proximal policy optimisation against a learned reward model (Schulman et al. 2017; Ouyang et al. 2022).

One base in memory carries four roles: the policy (an adapter), the reference (the adapter off, or the frozen
adapter that the policy began as), the reward model and the value function (an adapter and a scalar head each;
the value starts as a copy of the reward model). Each round samples a response per prompt, scores it, takes the
per-token log-ratio to the reference off the reward, estimates advantages by GAE, whitens them over the rollout,
and updates policy and value with clipped losses in separate forward and backward passes. Losses are normalised
by the tokens of the whole minibatch. A response that does not end its turn is penalised and treated as
finished. Left out: several samples a prompt, adaptive KL, dual clip, value warm-up, early stopping, and rewards
from rules.

    python -m stages.ppo CONFIG [key=value ...]
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from data.batch import Layout
from data.mixture import Passes, stream
from data.schema import Prompt
from data.template import ChatTemplate
from data.tree import Branch, Tree
from pipeline.config import PpoSettings
from pipeline.contract import Artifact, Context, Result
from pipeline.errors import ArtifactError, ConfigError, DataError
from pipeline.manifest import DataCard, Metric
from reward import shaping
from stages.core import device, loop, optim, probes, rows
from stages.core.checkpointing import checkpoint_layers
from stages.core.experience import Experience, collect, state_values, trees_of, whiten_advantages
from stages.core.forward import token_logprobs
from stages.core.layout import choose_layout
from stages.core.loop import Part, Updater
from stages.core.losses import clipped_policy_loss, clipped_value_loss
from stages.core.models import record
from stages.core.roles import POLICY, REFERENCE, REWARD, VALUE, Roles, adaptation, base_of, open_role
from stages.core.rollout import sample
from stages.core.scoring import record_probes, replay_probes, reward_scores

LAST_ROUNDS = 10
ECHO = 16


def run(context: Context) -> Result:
    """Train the policy; its adapter is the result, the value function is dropped.

    Raises:
        DataError: There is no prompt.
        ArtifactError: The policy or the reward model is damaged, or they sit on different bases.
        NumericalError: A loss or gradient is not finite.
    """
    settings, compute = context.settings, device.choose(context.device, context.dtype)
    optim.require_support(settings.optimizer, compute.device)
    loop.seed_everything(context.seed)
    roles = open_roles(context.inputs["policy"], context.inputs["reward"], settings, compute)
    longest = roles.base.longest(settings.max_length) - settings.max_new_tokens
    if longest < 1:
        raise ConfigError(
            f"max_new_tokens={settings.max_new_tokens} leaves no room for a prompt in the model's positions",
            where=f"stages.{context.name}.max_new_tokens",
            hint="lower it",
        )
    passes, cards = _prompts(context, roles.base.template, longest)
    prompts = passes.pass_(0)
    layout, warnings = _layout(roles, prompts)
    tokens, history = 0, []
    for done, figures in enumerate(rounds(roles, passes, settings, layout, context.seed), 1):
        tokens += int(figures["tokens"])
        history.append(figures)
        context.progress(figures, done=done, total=settings.steps)
    roles.save(POLICY, context.directory)
    with roles.use(POLICY):
        record_probes(context.directory, _echoes(prompts), roles.base)
    return Result(
        kind="adapter",
        metrics=_metrics(history),
        data=cards,
        adaptation=adaptation(context.inputs["policy"], reference=context.inputs["policy"]),
        tokenizer=record(roles.base),
        tokens=tokens,
        compute=compute.record,
        warnings=warnings,
    )


def _prompts(context: Context, template: ChatTemplate, longest: int) -> tuple[Passes[tuple[int, ...]], list[DataCard]]:
    """The training prompts in tokens, and what was read."""
    prompts: dict[str, list[tuple[int, ...]]] = {}
    cards: list[DataCard] = []
    for part in rows.parts(context, "data"):
        found = rows.read_rows(context, part, Prompt)
        if not found.train:
            raise DataError("no prompts", where=context.data[part].name, hint="lower held_out or give more rows")
        whole = [template.prompt(row.prompt) for row in found.train]
        prompts[part] = [tuple(tokens[-longest:]) for tokens in whole]
        record = {**found.record, "cut": sum(len(tokens) > longest for tokens in whole)}
        cards.append(rows.card(context, part, record, len(whole)))
    passes = rows.mixed(context, "data", prompts)
    return passes, rows.with_epochs(cards, passes.epochs)


def open_roles(policy: Artifact, reward: Artifact, settings: PpoSettings, compute: device.Compute) -> Roles:
    """All four roles on one base, each checked against its probes.

    Raises:
        ArtifactError: The reward model sits on another base than the policy, or reads another chat template.
    """
    base, reward_base = base_of(policy)[0], base_of(reward)[0]
    if base_of(policy)[1] != base_of(reward)[1] or base.digest != reward_base.digest:
        raise ArtifactError(
            f"the reward model sits on {reward_base.source} ({reward_base.digest[:12]}), "
            f"the policy on {base.source} ({base.digest[:12]})",
            where=reward.directory,
            hint="train the reward stage on the same `policy` as the ppo stage",
        )
    roles = open_role(policy, POLICY, settings.lora, compute)
    if settings.gradient_checkpointing:
        checkpoint_layers(roles.base)
    _require_same_template(roles, reward)
    roles.load(REWARD, reward.directory)
    roles.copy(REWARD, VALUE)
    with roles.use(REFERENCE):
        replay_probes(policy, roles.base)
    probes.replay(reward.directory, lambda trees: reward_scores(roles, REWARD, trees), compute)
    return roles


def _require_same_template(roles: Roles, reward: Artifact) -> None:
    """The reward model scores the policy's own tokens, so both must have learnt the same structure."""
    expected = reward.manifest.tokenizer["chat_template"] if reward.manifest else None
    found = roles.base.template.digest
    if found != expected:
        raise ArtifactError(
            f"the reward model reads the chat template {str(expected)[:12]}, the policy writes {found[:12]}",
            where=reward.directory,
            hint="train the reward stage on the same `policy` as the ppo stage",
        )


def rounds(
    roles: Roles, prompts: Passes[tuple[int, ...]], settings: PpoSettings, layout: Layout, seed: int
) -> Iterator[dict[str, float]]:
    """Rollout and update, over and over; yields the figures of each round."""
    updates = settings.steps * settings.update_epochs * settings.minibatches
    value_optimizer = settings.optimizer.model_copy(update={"learning_rate": settings.value_learning_rate})
    policy = Updater(roles.parameters(POLICY), settings.optimizer, updates)
    value = Updater(roles.parameters(VALUE), value_optimizer, updates)
    taken = stream(prompts, seed)
    for number in range(settings.steps):
        chosen = [next(taken) for _ in range(settings.examples_per_step)]
        order = random.Random(f"{seed} round {number}")
        groups, samples_figures = _rollout(roles, chosen, settings, layout, order.getrandbits(32))
        figures: list[dict[str, float]] = []
        for _ in range(settings.update_epochs):
            for group in order.sample(groups, len(groups)):
                figures.append(_update(roles, group, settings, policy, value))
        yield _summary([each for group in groups for each in group], figures, len(groups)) | samples_figures


def _rollout(
    roles: Roles, prompts: Sequence[tuple[int, ...]], settings: PpoSettings, layout: Layout, seed: int
) -> tuple[list[list[Experience]], dict[str, float]]:
    """Sample and score one response a prompt; the experience comes in one group per minibatch."""
    with roles.use(POLICY), roles.base.compute.autocast():
        samples = sample(
            roles.base.model,
            prompts,
            stop_id=roles.base.template.stop_id,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=seed,
            tokens_per_batch=settings.tokens_per_batch,
        )
    trees = trees_of(prompts, samples)
    size = len(trees) // settings.minibatches
    parts = [trees[start : start + size] for start in range(0, len(trees), size)]
    groups = [collect(roles, part, samples, settings, layout) for part in parts]
    whiten_advantages([each for group in groups for each in group])
    sampled = len(samples)
    return groups, {
        "ended": sum(each.ended for each in samples) / sampled,
        "length": sum(len(each.tokens) for each in samples) / sampled,
    }


def _update(
    roles: Roles, group: list[Experience], settings: PpoSettings, policy: Updater, value: Updater
) -> dict[str, float]:
    """One optimizer step of the policy and one of the value function."""
    policy_figures = policy.step(policy_parts(roles, group, settings))
    value_figures = value.step(value_parts(roles, group, settings))
    return {
        "policy_loss": policy_figures["loss"],
        "value_loss": value_figures["loss"],
        "ratio": policy_figures["ratio"],
        "approximate_kl": policy_figures["approximate_kl"],
        "clip_fraction": policy_figures["clip_fraction"],
        "gradient_norm": policy_figures["gradient_norm"],
        "value_gradient_norm": value_figures["gradient_norm"],
        "learning_rate": policy_figures["learning_rate"],
    }


def policy_parts(roles: Roles, group: list[Experience], settings: PpoSettings) -> Iterator[Part]:
    """The clipped policy loss of a minibatch; the approximate KL is the k3 estimate, E[r - 1 - log r]."""
    total = sum(len(each.logprobs) for each in group)
    for each in group:
        with roles.use(POLICY):
            with roles.base.compute.autocast():
                logprobs = token_logprobs(roles.base.model, each.batch, settings.temperature)
            losses, ratio = clipped_policy_loss(logprobs, each.logprobs, each.advantages, settings.clip)
            shares = {
                "ratio": ratio.detach().sum().item() / total,
                "approximate_kl": (ratio - 1 - ratio.log()).detach().sum().item() / total,
                "clip_fraction": ((ratio - 1).abs() > settings.clip).float().sum().item() / total,
            }
            yield Part(losses.sum() / total, shares, each.batch.token_count)


def value_parts(roles: Roles, group: list[Experience], settings: PpoSettings) -> Iterator[Part]:
    """The clipped value loss of a minibatch."""
    total = sum(len(each.values) for each in group)
    for each in group:
        with roles.use(VALUE):  # the backward pass too
            values = state_values(roles, each.batch)
            losses = clipped_value_loss(values, each.values, each.returns, settings.value_clip)
            yield Part(losses.sum() / total, tokens=each.batch.token_count)


def _summary(experiences: list[Experience], updates: list[dict[str, float]], minibatches: int) -> dict[str, float]:
    """Figures of one round: means over its responses, tokens and updates."""
    rewards = torch.cat([each.rewards for each in experiences])
    log_ratios = torch.cat([each.logprobs - each.reference for each in experiences])
    values = torch.cat([each.values for each in experiences])
    returns = torch.cat([each.returns for each in experiences])
    averages = {name: sum(each[name] for each in updates) / len(updates) for name in updates[0]}
    computed = sum(each.batch.token_count for each in experiences)
    # Four roles score every token; each pass of updates computes it under the policy and the value function.
    passes = 4 + 2 * len(updates) // minibatches
    return {
        "reward": rewards.mean().item(),
        "reward_deviation": rewards.std(unbiased=False).item(),
        "kl": log_ratios.sum().item() / len(rewards),
        "entropy": torch.cat([each.entropy for each in experiences]).mean().item(),
        "explained_variance": shaping.explained_variance(values, returns, torch.ones_like(values, dtype=torch.bool)),
        "tokens": computed * passes,
        **averages,
    }


def _layout(roles: Roles, prompts: Sequence[tuple[int, ...]]) -> tuple[Layout, list[str]]:
    with roles.use(REFERENCE):
        return choose_layout(roles.base, _echoes(prompts, branches=2))


def _echoes(prompts: Sequence[tuple[int, ...]], branches: int = 1) -> list[Tree]:
    """Trees for checks that need no response: each branch of a prompt is its own end once more."""
    return [
        Tree(prompt[: -len(end)] or end, (Branch.of(end),) * branches, number)
        for number, prompt in enumerate(prompts[: probes.COUNT])
        for end in (prompt[-ECHO:],)
    ]


def _metrics(history: Sequence[dict[str, float]]) -> dict[str, Metric]:
    """Means over the last rounds, which are the policy that is handed on, give or take."""
    last = history[-LAST_ROUNDS:]
    names = ("reward", "kl", "entropy", "ended", "length", "clip_fraction", "explained_variance")
    return {name: Metric(value=sum(each[name] for each in last) / len(last), n=len(last)) for name in names}


if __name__ == "__main__":
    from pipeline.launch import main

    main("ppo")
