"""Rows as trees of tokens: a prompt and its responses, and which of their tokens are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from data.findings import EQUAL_TOKENS, NOTHING_TRAINED, TOO_FEW_RESPONSES, TOO_LONG
from data.schema import Conversation, Message, Preference, Rated
from data.template import ChatTemplate


@dataclass(frozen=True)
class Branch:
    """One response: its tokens and which of them are read (trained on or scored)."""

    tokens: tuple[int, ...]
    read: tuple[bool, ...]

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Branch:
        """A branch of which every token is read."""
        return cls(tuple(tokens), (True,) * len(tokens))

    @property
    def reads(self) -> int:
        """Number of tokens read."""
        return sum(self.read)


@dataclass(frozen=True)
class Tree:
    """A prompt and its k >= 1 responses, in tokens.

    `number` is the tree's own, so that results can be told apart after packing; `margin` is the preference's, or the
    verdict on a single response; `cut` counts the tokens that the prompt has lost at its beginning.
    """

    prompt: tuple[int, ...]
    branches: tuple[Branch, ...]
    number: int = 0
    margin: float = 0.0
    origin: str = ""
    cut: int = 0
    starts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt or not all(branch.tokens for branch in self.branches):
            raise ValueError("a tree needs a prompt and no empty branch")

    @cached_property
    def length(self) -> int:
        """Tokens in the tree layout: the prompt once, and every branch."""
        return len(self.prompt) + sum(len(branch.tokens) for branch in self.branches)

    @property
    def reads(self) -> int:
        """Number of tokens read over all branches."""
        return sum(branch.reads for branch in self.branches)

    def split(self) -> list[Tree]:
        """The same tree as one single-branch tree per response, for models that need the plain layout."""
        return [dataclasses.replace(self, branches=(branch,)) for branch in self.branches]

    def documents(self) -> list[Tree]:
        """A block of text as one tree a document, so that none attends to another; a single token predicts nothing."""
        if not self.starts:
            return [self]
        tokens = (*self.prompt, *self.branches[0].tokens)
        pieces = (tokens[start:stop] for start, stop in pairwise((0, *self.starts, len(tokens))))
        return [
            Tree(piece[:1], (Branch.of(piece[1:]),), self.number, origin=self.origin)
            for piece in pieces
            if len(piece) > 1
        ]


def conversation_tree(template: ChatTemplate, row: Conversation, number: int, max_length: int) -> Tree | str:
    """A conversation as a tree with one branch, which begins at the first trained token.

    Every assistant turn is read. Returns the reason instead when the row cannot be used.
    """
    encoded = template.encode(row.messages)
    if not any(encoded.trained):
        return NOTHING_TRAINED.name
    start = encoded.trained.index(True)
    stop = len(encoded.trained) - encoded.trained[::-1].index(True)
    prompt, tokens, read = encoded.tokens[:start], encoded.tokens[start:stop], encoded.trained[start:stop]
    branch = Branch(tuple(tokens), tuple(read))
    return _fitted(Tree(tuple(prompt), (branch,), number, origin=row.origin), max_length)


def preference_tree(template: ChatTemplate, row: Preference, number: int, max_length: int) -> Tree | str:
    """A preference as a tree with a branch per response, best first. Returns the reason when it cannot be used."""
    branches = tuple(Branch.of(template.response(response)) for response in row.responses)
    if len({branch.tokens for branch in branches}) < len(branches):
        return EQUAL_TOKENS.name
    tree = Tree(tuple(template.prompt(row.prompt)), branches, number, row.margin, row.origin)
    return _fitted(tree, max_length)


def pair_tree(template: ChatTemplate, row: Preference, number: int, max_length: int) -> Tree | str:
    """The first and the last of a preference's responses as a tree with two branches."""
    pair = dataclasses.replace(row, responses=(row.responses[0], row.responses[-1]))
    return preference_tree(template, pair, number, max_length)


def triple_tree(template: ChatTemplate, row: Preference, number: int, max_length: int) -> Tree | str:
    """The best, the second and the worst of a ranking as a tree with three branches."""
    if len(row.responses) < 3:
        return TOO_FEW_RESPONSES.name
    best, second, *_, worst = row.responses
    return preference_tree(template, dataclasses.replace(row, responses=(best, second, worst)), number, max_length)


def verdict_tree(template: ChatTemplate, row: Rated | Preference, number: int, max_length: int) -> Tree | str:
    """What is good and what is bad: a preference's first response and its last, or a rated response alone.

    A rated response is a tree of one branch, whose margin is the verdict: 1 for a good one, -1 for a bad one.
    """
    if isinstance(row, Preference):
        return pair_tree(template, row, number, max_length)
    rated = Preference(row.prompt, (row.response,), 1.0 if row.good else -1.0, row.origin)
    return preference_tree(template, rated, number, max_length)


def prompt_tokens(template: ChatTemplate, prompt: tuple[Message, ...], longest: int) -> tuple[int, ...]:
    """A prompt's tokens, its beginning cut off where it is longer than `longest`."""
    return tuple(template.prompt(prompt)[-longest:])


def usable(trees: Iterable[Tree | str]) -> tuple[list[Tree], dict[str, int]]:
    """Part trees from the reasons that stand where a row could not be used, and count those."""
    kept: list[Tree] = []
    dropped: dict[str, int] = {}
    for tree in trees:
        if isinstance(tree, str):
            dropped[tree] = dropped.get(tree, 0) + 1
        else:
            kept.append(tree)
    return kept, dropped


def _fitted(tree: Tree, max_length: int) -> Tree | str:
    """Cut the prompt's beginning so that the longest path has at most `max_length` tokens."""
    longest = max(len(branch.tokens) for branch in tree.branches)
    if longest >= max_length:
        return TOO_LONG.name
    prompt = tree.prompt[-(max_length - longest) :]
    return dataclasses.replace(tree, prompt=prompt, cut=len(tree.prompt) - len(prompt))
