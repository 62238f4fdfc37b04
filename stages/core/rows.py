"""Reading a stage's data: rows in memory, or tokens in the cache; and what its manifest says was read.

A data role is one source or a mixture of several, whose parts are the roles `ROLE.SOURCE`. Tokens are made once for
each part and read from disk afterwards, so memory does not grow with the data.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from data import cache, encoding, read, sources
from data.blocks import DocumentMixture
from data.document_store import DocumentStore
from data.encoding import HELD_OUT, TRAIN
from data.findings import PROMPT_CUT
from data.intake import Intake
from data.mixture import Mixture, Passes, joined
from data.schema import Row, Text
from data.template import ChatTemplate, tokenizer_record
from data.tree import Tree
from data.tree_store import TreeStore
from pipeline import fingerprint
from pipeline.config import DataSource
from pipeline.contract import Context
from pipeline.errors import DataError
from pipeline.manifest import DataCard
from stages.core.models import LanguageModel

Item = TypeVar("Item", bound=Row)
TreeOf = Callable[[ChatTemplate, Item, int, int], Tree | str]
"""Makes a tree of a template, a row, its number and the longest length, or names the reason why it cannot."""


@dataclass(frozen=True)
class Rows(Generic[Item]):
    """The rows of one source in memory, split by prompt."""

    train: Sequence[Item]
    held_out: Sequence[Item]
    record: Mapping[str, Any]
    """How they were read, as `DataCard` has it."""


@dataclass(frozen=True)
class Examples:
    """A data role's rows as trees."""

    passes: Passes[Tree]
    """What each pass over the training rows takes."""
    held_out: Sequence[Tree]
    cards: list[DataCard]

    @property
    def train(self) -> Sequence[Tree]:
        """The first pass."""
        return self.passes.pass_(0)


def parts(context: Context, role: str) -> list[str]:
    """The roles of a data role's sources: itself, or `ROLE.SOURCE` for each source of several."""
    return [each for each in context.data if each.partition(".")[0] == role]


def mixed(context: Context, role: str, sources: Mapping[str, Sequence[Any]]) -> Mixture[Any]:
    """The parts of a data role in the shares that the stage asks for."""
    return Mixture(sources, context.settings.shares(role), context.seed)


def read_rows(context: Context, role: str, kind: type[Item]) -> Rows[Item]:
    """All rows of one source, which are of the kind its stage asks for."""
    intake = open_source(context, role)
    train: list[Item] = []
    held_out: list[Item] = []
    for placed in intake:
        assert isinstance(placed.row, kind)
        (held_out if placed.held_out else train).append(placed.row)
    record = encoding.record(intake)
    _tell(context, role, record)
    return Rows(train, held_out, record)


class Texts:
    """The training texts of a data role's sources, one by one; iterated once, to the end.

    Attributes:
        sample: The first held-out texts, or training texts where none is held out.
        cards: What was read.
    """

    def __init__(self, context: Context, role: str, sampled: int) -> None:
        self._context, self._role, self._sampled = context, role, sampled
        self.sample: list[str] = []
        self.cards: list[DataCard] = []

    def __iter__(self) -> Iterator[str]:
        held_out: list[str] = []
        for part in parts(self._context, self._role):
            intake = open_source(self._context, part)
            used = 0
            for placed in intake:
                assert isinstance(placed.row, Text)
                text = placed.row.text
                kept = held_out if placed.held_out else self.sample
                if len(kept) < self._sampled:
                    kept.append(text)
                if not placed.held_out:
                    used += 1
                    yield text
            record = encoding.record(intake)
            _tell(self._context, part, record)
            self.cards.append(card(self._context, part, record, used))
        self.sample = held_out or self.sample


def open_source(
    context: Context, role: str, template: ChatTemplate | None = None, max_length: int | None = None
) -> Intake:
    """A source on its way into the stage; with a template, the doctor counts tokens, too."""
    kinds = context.settings.kinds(role)
    return Intake(context.data[role], kinds, context.sources, context.evaluated, template, max_length)


def card(context: Context, role: str, record: Mapping[str, Any], used: int, split: str = TRAIN) -> DataCard:
    """The record of what was used from a source."""
    return DataCard(role=role, source=context.data[role].name, rows=used, split=split, **record)


def with_epochs(cards: Sequence[DataCard], epochs: Mapping[str, float]) -> list[DataCard]:
    """The cards of a mixture's parts, with how often a pass goes through each.

    Raises:
        DataError: A part is so small that a pass takes nothing of it.
    """
    for each in cards:
        if round(each.rows * epochs[each.role]) < 1:
            what = f"its share of the mixture is less than one of its {each.rows} rows"
            raise DataError(what, where=each.source, hint=f"raise `{each.role}`, or leave it out")
    return [card.model_copy(update={"epochs": epochs[card.role]}) for card in cards]


def examples(context: Context, role: str, tree_of: TreeOf[Any], language_model: LanguageModel) -> Examples:
    """The trees of a data role.

    Args:
        context: The stage's.
        role: The data role.
        tree_of: How a row becomes a tree.
        language_model: Whose tokenizer, template and positions hold.

    Raises:
        DataError: There is nothing to train on.
    """
    max_length = language_model.longest(context.settings.max_length)
    template, tokenizer = language_model.template, tokenizer_record(language_model.tokenizer)
    options = {"tree": tree_of.__name__, "max_length": max_length}
    train: dict[str, TreeStore] = {}
    held_out: dict[str, TreeStore] = {}
    cards: list[DataCard] = []
    for part in parts(context, role):

        def make(directory: Path, part: str = part) -> dict[str, Any]:
            intake = open_source(context, part, template, max_length)
            return encoding.write_trees(
                intake, directory, lambda row, number: tree_of(template, row, number, max_length)
            )

        entry = _cached(context, part, tokenizer, options, make)
        # Numbers tell trees apart, also those of different sources.
        train[part] = TreeStore(entry.directory / TRAIN, sum(map(len, train.values())))
        held_out[part] = TreeStore(entry.directory / HELD_OUT, sum(map(len, held_out.values())))
        _require_some(context, part, train[part], entry.record)
        _tell(context, part, entry.record)
        cards.append(card(context, part, entry.record, len(train[part])))
    passes = mixed(context, role, train)
    return Examples(passes, joined(held_out.values()), with_epochs(cards, passes.epochs))


@dataclass(frozen=True)
class Documents:
    """A data role's text as tokens."""

    train: DocumentMixture
    held_out: DocumentMixture
    cards: list[DataCard]


def documents(context: Context, role: str, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """The tokens of a data role's text, document by document."""
    train: dict[str, DocumentStore] = {}
    held_out: dict[str, DocumentStore] = {}
    cards: list[DataCard] = []
    record = tokenizer_record(tokenizer) | {"chat_template": ""}
    for part in parts(context, role):

        def make(directory: Path, part: str = part) -> dict[str, Any]:
            return encoding.write_documents(open_source(context, part), directory, tokenizer)

        entry = _cached(context, part, record, {"tree": "document"}, make)
        train[part], held_out[part] = (DocumentStore(entry.directory / side) for side in (TRAIN, HELD_OUT))
        _tell(context, part, entry.record)
        cards.append(card(context, part, entry.record, len(train[part])))
    passes = DocumentMixture(train, context.settings.shares(role), context.seed)
    whole = DocumentMixture(held_out, None, context.seed)
    return Documents(passes, whole, with_epochs(cards, passes.epochs))


def _cached(
    context: Context,
    role: str,
    tokenizer: Mapping[str, Any],
    options: Mapping[str, Any],
    make: Callable[[Path], Mapping[str, Any]],
) -> cache.Entry:
    source = context.data[role]
    against = {name: _identity(context, context.sources[name]) for name in context.evaluated}
    key = cache.key(
        data=_identity(context, source),
        tokenizer=tokenizer["digest"],
        template=tokenizer["chat_template"],
        options={**options, "kinds": context.settings.kinds(role), "evaluated": against},
    )
    return cache.cached(key, make, context.say)


def _identity(context: Context, source: DataSource) -> str:
    """The digest of all that decides which rows a source gives."""
    content = read.fingerprint(source, context.sources)
    # A branch of the Hub moves; what cannot be pinned down is never found again.
    commit = (sources.commit(source) or uuid.uuid4().hex) if source.scheme == "hub" else None
    others = [context.sources[name] for name in source.prepare.decontaminate] if source.prepare else []
    against = [_identity(context, each) for each in others]
    return fingerprint.digest([content, source.model_dump(mode="json"), commit, against])


def _tell(context: Context, role: str, record: Mapping[str, Any]) -> None:
    """What a user should know of a source before training goes on."""
    name = context.data[role].name
    context.say(f"{name}: read as `{record['format']}`")
    for reason, count in record["dropped"].items():
        context.say(f"{name}: {count:,} rows dropped: {reason}")
    if record["cut"]:
        context.say(f"{name}: {record['cut']:,} rows trained on with a {PROMPT_CUT.name}")
    for kind, finding in record["diagnosis"]["findings"].items():
        if finding["severity"] == "warning" and kind != PROMPT_CUT.name:  # which was said of the training rows
            context.say(f"{name}: warning: {kind}: {finding['count']:,}")


def _require_some(context: Context, role: str, train: Sequence[Tree], record: Mapping[str, Any]) -> None:
    if train:
        return
    reasons = ", ".join(f"{count} x {reason}" for reason, count in record["dropped"].items()) or "every row is held out"
    raise DataError(
        f"no usable rows for `{role}`: {reasons}",
        where=context.data[role].name,
        hint=f"raise stages.{context.name}.max_length, lower the source's held_out, or check the data",
    )


__all__ = [
    "HELD_OUT",
    "TRAIN",
    "Documents",
    "Examples",
    "Rows",
    "Texts",
    "card",
    "documents",
    "examples",
    "mixed",
    "open_source",
    "parts",
    "read_rows",
    "with_epochs",
]
