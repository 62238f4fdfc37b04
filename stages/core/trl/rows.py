"""A data role's rows as the dataset that a trainer of TRL goes over: the examples of all steps, in their order.

The examples and their order are those of Baton's own stages, so a trainer of TRL can be compared with them step by
step. A dataset is held in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset, disable_progress_bars

from data.mixture import Passes, stream
from data.schema import Prompt
from data.tree import Branch, Tree, conversation_tree, pair_tree, triple_tree, verdict_tree
from pipeline.config import TrlSettings
from pipeline.contract import Context
from pipeline.errors import ConfigError, DataError
from pipeline.manifest import DataCard
from pipeline.trainers import Layout
from reward.rules import require_facts
from stages.core import probes, rows
from stages.core.models import LanguageModel
from stages.core.trl.text import as_text, as_tokens

disable_progress_bars()

Row = dict[str, Any]
ECHO = 16
"""Tokens at the end of a prompt that are read where there is no response."""
ORIGIN = "origin"
"""The column that says where an example is from; trainers get it with prompts, whose rewards need it."""
IGNORED = -100
"""Label of tokens that are not trained on, as in `transformers`."""

TREE_OF: dict[Layout, rows.TreeOf[Any]] = {
    "conversation": conversation_tree,
    "pair": pair_tree,
    "triple": triple_tree,
    "verdict": verdict_tree,
}
"""Layout -> how a row becomes a tree."""


@dataclass(frozen=True)
class Material:
    """What a trainer goes over."""

    dataset: Dataset
    steps: int
    """Optimizer steps that go over it once."""
    trees: Sequence[Tree]
    """The training rows; of prompts only the first, whose end stands for the response."""
    held_out: Sequence[Tree]
    cards: list[DataCard]
    origins: Sequence[str]
    """Where each example of the dataset is from."""

    @property
    def probed(self) -> Sequence[Tree]:
        """What probes are recorded on."""
        return self.held_out or self.trees


def read(context: Context, language_model: LanguageModel) -> Material:
    """The rows of the stage's data role.

    Raises:
        DataError: There is nothing to train on.
        ConfigError: There is no room for prompts.
    """
    layout = context.settings.method.layout
    if layout == "prompt":
        return _prompts(context, language_model)
    examples = rows.examples(context, "data", TREE_OF[layout], language_model)
    passes = _Laid(examples.passes, ROWS_OF[layout])
    steps, taken = _taken(passes, context.settings, context.seed)
    dataset = Dataset.from_list([{name: row[name] for name in row if name != ORIGIN} for row in taken])
    return Material(dataset, steps, examples.train, examples.held_out, examples.cards, _origins(taken))


def _prompts(context: Context, language_model: LanguageModel) -> Material:
    settings: TrlSettings = context.settings
    assert settings.max_new_tokens is not None
    longest = language_model.longest(settings.max_length) - settings.max_new_tokens
    if longest < 1:
        what = f"max_new_tokens={settings.max_new_tokens} leaves no room for a prompt in the model's positions"
        raise ConfigError(what, where=f"stages.{context.name}.max_new_tokens", hint="lower it")
    found: dict[str, list[Row]] = {}
    cards: list[DataCard] = []
    for part in rows.parts(context, "data"):
        source = rows.read_rows(context, part, Prompt)
        if not source.train:
            raise DataError("no prompts", where=context.data[part].name, hint="lower held_out or give more rows")
        for row in source.train:
            require_facts({settings.gold}, row)
        whole = [language_model.template.prompt(row.prompt) for row in source.train]
        found[part] = [_prompt(tokens[-longest:], row) for tokens, row in zip(whole, source.train, strict=True)]
        cut = sum(len(tokens) > longest for tokens in whole)
        cards.append(rows.card(context, part, {**source.record, "cut": cut}, len(source.train)))
    passes = rows.mixed(context, "data", found)
    steps, taken = _taken(passes, settings, context.seed)
    echoes = [_echo(as_tokens(row["prompt"]), number) for number, row in enumerate(passes.pass_(0)[: probes.COUNT])]
    cards = rows.with_epochs(cards, passes.epochs)
    return Material(Dataset.from_list(taken), steps, echoes, [], cards, _origins(taken))


def _origins(taken: Iterable[Row]) -> list[str]:
    return [row[ORIGIN] for row in taken]


def _prompt(tokens: Sequence[int], row: Prompt) -> Row:
    return {"prompt": as_text(tokens), "facts": json.dumps(dict(row.facts)), ORIGIN: row.origin}


def _echo(prompt: tuple[int, ...], number: int) -> Tree:
    """A prompt of which the end is read, for checks that need no response."""
    end = prompt[-ECHO:]
    return Tree(prompt[: -len(end)] or end, (Branch.of(end),), number)


def _conversation_rows(tree: Tree) -> Iterator[Row]:
    (branch,) = tree.branches
    labels = [token if read else IGNORED for token, read in zip(branch.tokens, branch.read, strict=True)]
    yield {"input_ids": [*tree.prompt, *branch.tokens], "labels": [IGNORED] * len(tree.prompt) + labels}


def _pair_rows(tree: Tree) -> Iterator[Row]:
    chosen, rejected = (as_text(branch.tokens) for branch in tree.branches)
    yield {"prompt": as_text(tree.prompt), "chosen": chosen, "rejected": rejected}


def _triple_rows(tree: Tree) -> Iterator[Row]:
    best, second, worst = (as_text(branch.tokens) for branch in tree.branches)
    yield {"prompt": as_text(tree.prompt), "reference": best, "chosen": second, "rejected": worst}


def _verdict_rows(tree: Tree) -> Iterator[Row]:
    verdicts = [tree.margin > 0] if len(tree.branches) == 1 else [True, False]
    for branch, good in zip(tree.branches, verdicts, strict=True):
        yield {"prompt": as_text(tree.prompt), "completion": as_text(branch.tokens), "label": good}


ROWS_OF: dict[Layout, Callable[[Tree], Iterable[Row]]] = {
    "conversation": _conversation_rows,
    "pair": _pair_rows,
    "triple": _triple_rows,
    "verdict": _verdict_rows,
}
"""Layout -> the examples that a tree makes."""


class _Laid:
    """Passes over trees as passes over the examples that they make, which know where they are from."""

    def __init__(self, passes: Passes[Tree], rows_of: Callable[[Tree], Iterable[Row]]) -> None:
        self._passes, self._rows_of = passes, rows_of

    def __len__(self) -> int:
        return len(self.pass_(0))

    def pass_(self, number: int) -> Sequence[Row]:
        return [{**row, ORIGIN: tree.origin} for tree in self._passes.pass_(number) for row in self._rows_of(tree)]


def _taken(passes: Passes[Row], settings: TrlSettings, seed: int) -> tuple[int, list[Row]]:
    """The number of steps and their examples; trainers that sample drop a step that is not full, so theirs are."""
    wanted = max(1, round(len(passes) * settings.epochs))
    steps = settings.steps or math.ceil(wanted / settings.examples_per_step)
    if settings.steps or settings.method.samples:
        wanted = steps * settings.examples_per_step
    return steps, list(islice(stream(passes, seed), wanted))
