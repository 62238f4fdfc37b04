"""The one batch of Baton: trees laid out in rows, so that a prompt is computed once for all its responses.

A row holds one tree or several: the prompt, then each branch, whose positions restart at the prompt's end and
which attends to the prompt and to itself only. Only the positions that are read (the ones that predict a trained
token) are named in `sources`, so that the language-model head runs nowhere else.

packed   all trees in one row, without padding or rounded up; attention is computed tree by tree
tree     several rows of trees with a mask, for architectures whose attention cannot be replaced
plain    every branch in a row of its own behind a copy of the prompt, for those that cannot compute trees
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data.packing import Packing, rounded_up
from data.tree import Branch, Tree

Layout = Literal["packed", "tree", "plain"]

LOOKAHEAD = 256
"""Trees that are passed over before a batch is taken as full."""


@dataclass(frozen=True)
class TreeBatch:
    """Trees laid out as rows, ready for one forward.

    Attributes:
        tokens: [rows, width] token ids; padding is 0, and no token of a tree attends to it.
        positions: [rows, width] position of each token on its own path from the start of the prompt.
        mask: [rows, 1, width, width] True where attention is allowed; None for plain rows (causal) and packed ones.
        packing: Where the trees stand in the row of a packed batch; None for the other layouts.
        sources: [reads] index into the flattened rows of the position that predicts a read token.
        targets: [reads] the read tokens, in order of tree, branch, token.
        branch_of_read: [reads] number of the branch each read belongs to.
        ends: [branches] index into the flattened rows of each branch's last token.
        trees: The trees as they were given, in the batch's order, which numbers the branches too.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor | None
    packing: Packing | None
    sources: Tensor
    targets: Tensor
    branch_of_read: Tensor
    ends: Tensor
    trees: tuple[Tree, ...]

    @property
    def branches(self) -> int:
        """Number of branches over all trees."""
        return len(self.ends)

    @property
    def token_count(self) -> int:
        """Tokens computed, padding included."""
        return self.tokens.numel()

    def to(self, device: torch.device) -> TreeBatch:
        """The batch with its tensors on a device."""
        return dataclasses.replace(
            self,
            tokens=self.tokens.to(device),
            positions=self.positions.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            sources=self.sources.to(device),
            targets=self.targets.to(device),
            branch_of_read=self.branch_of_read.to(device),
            ends=self.ends.to(device),
        )

    def sum_by_branch(self, values: Tensor) -> Tensor:
        """Sum values of reads [reads] over each branch: [branches]."""
        return values.new_zeros(self.branches).index_add(0, self.branch_of_read, values)


def batches(
    trees: Iterable[Tree], tokens_per_batch: int, layout: Layout = "packed", *, rounded: bool = False
) -> Iterator[TreeBatch]:
    """Put trees into batches of at most `tokens_per_batch` tokens, padding included; longest first.

    A tree longer than the budget has a batch of its own. In the `plain` layout every branch stands in its own
    row behind its own copy of the prompt, with causal attention and padding at the end; the branches of a tree
    stay in one batch. `rounded`, packed rows have one of few widths.
    """
    waiting = sorted(trees, key=lambda tree: (-tree.length, tree.number))
    while waiting:
        if layout == "packed":
            taken = _take(waiting, tokens_per_batch)
            together, waiting = waiting[:taken], waiting[taken:]
            tokens = sum(tree.length for tree in together)
            yield packed(together, _width(tokens, tokens_per_batch) if rounded else None)
        elif layout == "tree":
            rows, waiting = _fill(waiting, tokens_per_batch)
            yield _lay_out(rows, [tree for row in rows for tree in row])
        else:
            taken = _stack(waiting, tokens_per_batch)
            together, waiting = waiting[:taken], waiting[taken:]
            yield _lay_out([[part] for tree in together for part in tree.split()], together)


def one_row(trees: Sequence[Tree]) -> TreeBatch:
    """All trees in a single row with a mask, however long."""
    return _lay_out([list(trees)], trees)


def packed(trees: Sequence[Tree], width: int | None = None) -> TreeBatch:
    """All trees in a single row, however long: without padding, or of a given width.

    Raises:
        ValueError: The trees do not fit the width.
    """
    packing = Packing.of(trees, width)
    return dataclasses.replace(_lay_out([list(trees)], trees, packing.width), packing=packing)


def _width(tokens: int, budget: int) -> int:
    """The rounded width of a packed row, within the budget where its tokens are."""
    return min(rounded_up(tokens), budget) if tokens <= budget else rounded_up(tokens)


def _take(waiting: list[Tree], budget: int) -> int:
    """How many trees fit without padding; at least one."""
    tokens = 0
    for taken, tree in enumerate(waiting):
        tokens += tree.length
        if taken and tokens > budget:
            return taken
    return len(waiting)


def _fill(waiting: list[Tree], budget: int) -> tuple[list[list[Tree]], list[Tree]]:
    """First fit: each tree goes into the first row with room, else opens a row while the budget lasts.

    The search for small trees that fill the gaps ends after some misses, so that packing stays linear in the trees.
    """
    width = waiting[0].length
    most_rows = max(1, budget // width)
    rows: list[list[Tree]] = []
    room: list[int] = []
    left: list[Tree] = []
    for taken, tree in enumerate(waiting):
        if len(left) == LOOKAHEAD:
            return rows, left + waiting[taken:]
        length = tree.length
        place = next((row for row, free in enumerate(room) if free >= length), None)
        if place is None and len(rows) < most_rows:
            place = len(rows)
            rows.append([])
            room.append(width)
        if place is None:
            left.append(tree)
            continue
        rows[place].append(tree)
        room[place] -= length
    return rows, left


def _stack(waiting: list[Tree], budget: int) -> int:
    """How many trees fit with one branch per row; all branches of a tree stay together."""
    rows = width = 0
    for taken, tree in enumerate(waiting):
        width = max(width, len(tree.prompt) + max(len(branch.tokens) for branch in tree.branches))
        rows += len(tree.branches)
        if taken and width * rows > budget:
            return taken
    return len(waiting)


def _lay_out(rows: list[list[Tree]], trees: Sequence[Tree], packed_width: int | None = None) -> TreeBatch:
    """Rows of trees, or of parts of `trees` in the same order of branches; a packed row needs no mask."""
    masked = packed_width is None
    width = packed_width or max(sum(tree.length for tree in row) for row in rows)
    plain = masked and all(len(row) == 1 and len(row[0].branches) == 1 for row in rows)
    sheet = _Sheet(len(rows), width)
    for row, placed in enumerate(rows):
        start = 0
        for number, tree in enumerate(placed):
            sheet.write(tree, row, start, number)
            start += tree.length
    # Plain rows keep counting through the padding: transformers takes a restart for a second packed sequence.
    positions = torch.arange(width).repeat(len(rows), 1) if plain else sheet.positions
    return TreeBatch(
        tokens=sheet.tokens,
        positions=positions,
        mask=_attention_mask(sheet.tree_of, sheet.branch_of) if masked and not plain else None,
        packing=None,
        sources=torch.tensor(sheet.sources),
        targets=torch.tensor(sheet.targets),
        branch_of_read=torch.tensor(sheet.branch_of_read),
        ends=torch.tensor(sheet.ends),
        trees=tuple(trees),
    )


class _Sheet:
    """Rows being filled with trees. Branch 0 is a tree's prompt; tree -1 is padding."""

    def __init__(self, rows: int, width: int) -> None:
        self.width = width
        self.tokens = torch.zeros(rows, width, dtype=torch.long)
        self.positions = torch.zeros(rows, width, dtype=torch.long)
        self.tree_of = torch.full((rows, width), -1)
        self.branch_of = torch.zeros(rows, width, dtype=torch.long)
        self.sources: list[int] = []
        self.targets: list[int] = []
        self.branch_of_read: list[int] = []
        self.ends: list[int] = []

    def write(self, tree: Tree, row: int, start: int, number: int) -> None:
        """Write a tree into a row from column `start` on, as the row's tree `number`."""
        fork = start + len(tree.prompt)
        self._write_tokens(tree.prompt, row, start, 0)
        at = fork
        for index, branch in enumerate(tree.branches, 1):
            self._write_tokens(branch.tokens, row, at, fork - start)
            self.branch_of[row, at : at + len(branch.tokens)] = index
            self._note_reads(branch, row * self.width + fork - 1, row * self.width + at)
            at += len(branch.tokens)
        self.tree_of[row, start:at] = number

    def _write_tokens(self, tokens: Sequence[int], row: int, start: int, position: int) -> None:
        stop = start + len(tokens)
        self.tokens[row, start:stop] = torch.tensor(tokens)
        self.positions[row, start:stop] = torch.arange(position, position + len(tokens))

    def _note_reads(self, branch: Branch, prompt_end: int, start: int) -> None:
        """Each read token is predicted by the one before it; a branch's first by the prompt's last."""
        before = [prompt_end, *range(start, start + len(branch.tokens) - 1)]
        self.sources.extend(place for place, read in zip(before, branch.read, strict=True) if read)
        self.targets.extend(token for token, read in zip(branch.tokens, branch.read, strict=True) if read)
        self.branch_of_read.extend([len(self.ends)] * branch.reads)
        self.ends.append(start + len(branch.tokens) - 1)


def _attention_mask(tree_of: Tensor, branch_of: Tensor) -> Tensor:
    """[rows, 1, width, width]: a token sees what precedes it in its tree's prompt and in its own branch."""
    width = tree_of.shape[1]
    same_tree = tree_of[:, :, None] == tree_of[:, None, :]
    same_path = (branch_of[:, None, :] == 0) | (branch_of[:, :, None] == branch_of[:, None, :])
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    # Padding sees padding before it: never empty, so softmax stays finite.
    return (same_tree & same_path & causal)[:, None]
