"""What a model answers to prompts, and what judges say of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data.batch import Layout
from data.schema import Prompt
from data.tree import Branch, Tree, prompt_tokens
from pipeline.config import Decoding, EvaluateSettings
from pipeline.errors import ConfigError
from pipeline.figures import SCORE
from pipeline.rules import Gold
from reward.best_of_n import Frontier
from reward.rules import Verdict, verdict
from stages.core.decoding import decode
from stages.core.lineup import Contestant
from stages.core.roles import REWARD, Roles
from stages.core.rollout import Sample, trees_of
from stages.core.scoring import scores

PLAIN: Layout = "plain"
"""Models of any architecture are compared, so none is asked to compute trees."""


@dataclass(frozen=True)
class Responses:
    """What a model says to prompts.

    Attributes:
        prompts: Tokens of each prompt.
        samples: [prompts * n] those to one prompt side by side.
        texts: [prompts * n] without control tokens.
        cut: Prompts that lost their beginning, since they left no room for a response.
    """

    prompts: list[tuple[int, ...]]
    samples: list[Sample]
    texts: list[str]
    cut: int

    @property
    def tokens(self) -> int:
        """Sampled in all."""
        return sum(len(each.tokens) for each in self.samples)


@dataclass(frozen=True)
class Answers:
    """One model's responses, in the prompts' order and n to each prompt side by side, and what the judges say of them.

    Attributes:
        texts: [prompts * n] without control tokens.
        trees: A tree for each prompt, with a branch for each of its responses.
        gold: [prompts * n] by the rule that knows what is correct; empty without one.
        correct: [prompts * n] 1 where that rule says so; empty without one.
        rewards: [prompts * n] by the reward model; empty without one.
        by_rules: Judge -> [prompts * n] what its rules give.
        cut: Prompts that lost their beginning.
    """

    texts: list[str]
    trees: list[Tree]
    gold: list[float]
    correct: list[float]
    rewards: list[float]
    by_rules: Mapping[str, list[float]] = field(default_factory=dict)
    cut: int = 0

    @property
    def judged(self) -> list[float]:
        """The gold rewards, or the rewards where there is no gold."""
        return self.gold or self.rewards

    @property
    def scores(self) -> dict[str, list[float]]:
        """What each judge that gives scores says, by the names of their metrics."""
        given = {"gold": self.gold, "reward": self.rewards}
        own = {name: values for name, values in given.items() if values}
        return own | {f"{SCORE}{name}": values for name, values in self.by_rules.items()}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt's responses, end of turn included."""
        return [tree.reads for tree in self.trees]

    def accuracies(self, prompts: Sequence[Prompt]) -> dict[str, list[float]]:
        """Whether each response is correct, 1 or 0: of all prompts and of each task, where the prompts name one.

        Args:
            prompts: What was answered, once each.
        """
        if not self.correct:
            return {}
        right = [float(each == 1.0) for each in self.correct]
        tasks = [str(prompt.facts.get("task", "")) for prompt in prompts]
        by_task = {
            f"accuracy.{task}": [each for each, own in zip(right, tasks, strict=True) if own == task]
            for task in sorted(set(tasks) - {""})
        }
        return {"accuracy": right, **by_task}

    @property
    def tokens(self) -> int:
        """Sampled in all."""
        return sum(self.lengths)

    def frontier(self) -> Frontier:
        """What choosing the best of a prompt's responses by reward brings."""
        shape = len(self.trees), -1
        return Frontier.of(np.reshape(self.rewards, shape), np.reshape(self.gold, shape) if self.gold else None)


def answer(
    contestant: Contestant,
    prompts: Sequence[Prompt],
    judge: Roles | None,
    settings: EvaluateSettings,
    seed: int,
    per_prompt: int = 1,
) -> Answers:
    """Answer as a model, and have the responses judged.

    Args:
        contestant: The model.
        prompts: What it answers.
        judge: The reward model, in the role `reward`; None without one.
        settings: The stage's.
        seed: Of the samples.
        per_prompt: Responses to each prompt.

    Raises:
        ConfigError: The model has no room for a prompt before so long a response.
        DataError: A prompt does not hold what the rule `gold` needs.
    """
    found = respond(
        contestant,
        prompts,
        settings,
        max_new_tokens=settings.max_new_tokens,
        seed=seed,
        per_prompt=per_prompt,
        max_length=settings.max_length,
        tokens_per_batch=settings.batch_tokens,
    )
    asked = [prompt for prompt in prompts for _ in range(per_prompt)]
    verdicts = _verdicts(settings.gold, asked, found.texts)
    ended, sizes = [each.ended for each in found.samples], (settings.max_length, settings.batch_tokens)
    return Answers(
        found.texts,
        trees_of(found.prompts, found.samples),
        gold=[each.reward for each in verdicts],
        correct=[each.correct for each in verdicts],
        rewards=rewards(judge, asked, found.texts, ended, *sizes) if judge else [],
        cut=found.cut,
    )


def respond(
    contestant: Contestant,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    max_new_tokens: int,
    seed: int,
    per_prompt: int,
    max_length: int,
    tokens_per_batch: int,
) -> Responses:
    """Answer as a model; `stages/core/decoding.py` says how.

    Raises:
        ConfigError: A response may be as long as all positions that the model has, which leaves none for a prompt.
    """
    with contestant.use() as language_model, language_model.compute.autocast():
        template = language_model.template
        longest = room(contestant, max_length, max_new_tokens, "max_new_tokens")
        whole = [template.prompt(prompt.prompt) for prompt in prompts]
        tokens = [tuple(each[-longest:]) for each in whole]
        samples = decode(
            language_model.model,
            tokens,
            decoding,
            stop_id=template.stop_id,
            max_new_tokens=max_new_tokens,
            seed=seed,
            tokens_per_batch=tokens_per_batch,
            per_prompt=per_prompt,
        )
    texts = [template.decode(each.tokens) for each in samples]
    return Responses(tokens, samples, texts, cut=sum(len(each) > longest for each in whole))


def room(contestant: Contestant, max_length: int, max_new_tokens: int, where: str) -> int:
    """Tokens of the longest prompt that a model can answer at such length.

    Raises:
        ConfigError: There are none; names the setting, which is at `where`.
    """
    model = contestant.roles.base
    longest = model.longest(max_length) - max_new_tokens
    if longest < 1:
        what = f"{contestant.name} has {model.positions} positions, which leaves no room for a prompt"
        raise ConfigError(f"{what} before {max_new_tokens} tokens", where=where, hint="lower it")
    return longest


def rewards(
    judge: Roles,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    ended: Sequence[bool],
    max_length: int,
    tokens_per_batch: int,
) -> list[float]:
    """What a reward model, in the role `reward`, says of an answer to each prompt; `ended` tells which are whole."""
    trees = _read_by(judge, prompts, texts, ended, max_length)
    found = scores(judge, REWARD, trees, tokens_per_batch, PLAIN)
    return [found[tree.number][0] for tree in trees]


def _verdicts(gold: Gold, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Verdict]:
    if gold == "none":
        return []
    return [verdict(gold, prompt.facts, text, prompt.origin) for prompt, text in zip(prompts, texts, strict=True)]


def _read_by(
    judge: Roles, prompts: Sequence[Prompt], texts: Sequence[str], ended: Sequence[bool], max_length: int
) -> list[Tree]:
    """The answers in the judge's own tokens; an answer that did not end its turn is read without a stop token."""
    template = judge.base.template
    trees = []
    for number, (prompt, text, complete) in enumerate(zip(prompts, texts, ended, strict=True)):
        response = template.response(text)
        tokens = response if complete or len(response) == 1 else response[:-1]
        longest = max(1, judge.base.longest(max_length) - len(tokens))
        trees.append(Tree(prompt_tokens(template, prompt.prompt, longest), (Branch.of(tokens),), number))
    return trees
