"""The prompts that a stage samples responses to, in tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from data.mixture import Passes
from data.schema import Prompt
from data.tree import Branch, Tree
from pipeline.contract import Context
from pipeline.errors import ConfigError, DataError
from pipeline.manifest import DataCard
from reward.rules import require_facts
from stages.core import probes, rows
from stages.core.models import LanguageModel

ECHO = 16


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's tokens, up to where the response begins, and its row."""

    tokens: tuple[int, ...]
    row: Prompt


@dataclass(frozen=True)
class Prompts:
    """A stage's prompts.

    Attributes:
        passes: What each pass over the training prompts takes.
        held_out: Distinct prompts that are not trained on.
        cards: What was read.
    """

    passes: Passes[EncodedPrompt]
    held_out: Sequence[EncodedPrompt]
    cards: list[DataCard]

    def looked_at(self, rows: int, seed: int) -> list[EncodedPrompt]:
        """At most so many held-out prompts, drawn from all sources; training prompts where none is held out."""
        prompts = list(self.held_out or self.passes.pass_(0))
        return random.Random(f"{seed} looks").sample(prompts, min(rows, len(prompts)))

    @property
    def first(self) -> Sequence[tuple[int, ...]]:
        """The tokens of the first training prompts, for checks."""
        return [each.tokens for each in self.passes.pass_(0)[: probes.COUNT]]


def read_prompts(context: Context, base: LanguageModel) -> Prompts:
    """A stage's prompts; those that leave no room for a response lose their beginning.

    Raises:
        ConfigError: The response alone is as long as the model's positions.
        DataError: A source has no prompt to train on, or a prompt does not hold what a rule of the stage needs.
    """
    longest, rules = _room(context, base), {each.rule for each in context.settings.rules}
    train: dict[str, list[EncodedPrompt]] = {}
    held_out: dict[tuple[int, ...], EncodedPrompt] = {}
    cards: list[DataCard] = []
    for part in rows.parts(context, "data"):
        found = rows.read_rows(context, part, Prompt)
        if not found.train:
            raise DataError("no prompts", where=context.data[part].name, hint="lower held_out or give more rows")
        for row in found.train:
            require_facts(rules, row)
        whole = [base.template.prompt(row.prompt) for row in found.train]
        train[part] = [_encoded(tokens, row, longest) for tokens, row in zip(whole, found.train, strict=True)]
        for each in (_encoded(base.template.prompt(row.prompt), row, longest) for row in found.held_out):
            held_out.setdefault(each.tokens, each)
        record = {**found.record, "cut": sum(len(tokens) > longest for tokens in whole)}
        cards.append(rows.card(context, part, record, len(whole)))
    for each in (each for encoded in train.values() for each in encoded):
        # Prompts that are cut to the same tokens are one to a model.
        held_out.pop(each.tokens, None)
    passes = rows.mixed(context, "data", train)
    return Prompts(passes, list(held_out.values()), rows.with_epochs(cards, passes.epochs))


def echoes(prompts: Sequence[tuple[int, ...]], branches: int = 1) -> list[Tree]:
    """Trees for checks that need no response: each branch of a prompt is its own end once more."""
    return [
        Tree(prompt[: -len(end)] or end, (Branch.of(end),) * branches, number)
        for number, prompt in enumerate(prompts[: probes.COUNT])
        for end in (prompt[-ECHO:],)
    ]


def _room(context: Context, base: LanguageModel) -> int:
    settings = context.settings
    longest = base.longest(settings.max_length) - settings.max_new_tokens
    if longest < 1:
        raise ConfigError(
            f"max_new_tokens={settings.max_new_tokens} leaves no room for a prompt in the model's positions",
            where=f"stages.{context.name}.max_new_tokens",
            hint="lower it",
        )
    return longest


def _encoded(tokens: Sequence[int], row: Prompt, longest: int) -> EncodedPrompt:
    return EncodedPrompt(tuple(tokens[-longest:]), row)
