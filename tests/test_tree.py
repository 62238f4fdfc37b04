"""Trees, how they are packed, and what a packed token may see."""

from __future__ import annotations

import random

import models
import pytest
import torch

from data.batch import Layout, TreeBatch, batches, one_row
from data.findings import EQUAL_TOKENS, NOTHING_TRAINED, TOO_LONG
from data.schema import Conversation, Message, Preference
from data.template import ChatTemplate
from data.tree import (
    Branch,
    Tree,
    conversation_tree,
    preference_tree,
    prompt_tokens,
    usable,
)

LAYOUTS: tuple[Layout, ...] = ("packed", "tree", "plain")


def path_tokens(tree: Tree, branch: Branch) -> list[int]:
    return [*tree.prompt, *branch.tokens]


def seen(batch: TreeBatch, row: int, column: int) -> list[int]:
    """Tokens that a place attends to, in order."""
    if batch.packing is not None:
        return seen_in_packing(batch, column)
    width = batch.tokens.shape[1]
    allowed = batch.mask[row, 0, column] if batch.mask is not None else torch.arange(width) <= column
    return batch.tokens[row][allowed].tolist()


def seen_in_packing(batch: TreeBatch, column: int) -> list[int]:
    """The prompt of the span and the own branch up to the place."""
    assert batch.packing is not None
    (span,) = (span for span in batch.packing.spans if span.start <= column < span.stop)
    begin = span.start + span.prompt
    prompt = batch.tokens[0, span.start : min(begin, column + 1)].tolist()
    for length in span.branches:
        if begin <= column < begin + length:
            return prompt + batch.tokens[0, begin : column + 1].tolist()
        begin += length
    return prompt


def numbered(count: int, seed: int = 0) -> list[Tree]:
    """Trees in which every token is another, so that no two places can be mistaken for each other."""
    chance, following = random.Random(seed), iter(range(1, 100_000))

    def tokens() -> tuple[int, ...]:
        return tuple(next(following) for _ in range(chance.randint(1, 6)))

    return [Tree(tokens(), tuple(Branch.of(tokens()) for _ in range(chance.randint(1, 4))), n) for n in range(count)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 40, 100, 1000])
def test_every_token_sees_its_own_path_up_to_itself_and_nothing_else(layout: Layout, budget: int) -> None:
    trees = numbered(12, seed=budget)
    paths = {path[place]: path[: place + 1] for tree in trees for b in tree.branches for path in [path_tokens(tree, b)]
             for place in range(len(path))}  # fmt: skip
    met = set()
    for batch in batches(trees, budget, layout):
        for row, column in batch.tokens.nonzero().tolist():
            token = int(batch.tokens[row, column])
            assert seen(batch, row, column) == paths[token]
            assert batch.positions[row, column] == len(paths[token]) - 1
            met.add(token)
    assert met == paths.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 60, 1000])
def test_a_source_is_the_place_before_its_target_on_the_path(layout: Layout, budget: int) -> None:
    trees = models.forest(10, seed=budget)
    for batch in batches(trees, budget, layout):
        branches = [(tree, branch) for tree in batch.trees for branch in tree.branches]
        width = batch.tokens.shape[1]
        expected = []
        for number, (tree, branch) in enumerate(branches):
            path = path_tokens(tree, branch)
            for place, read in enumerate(branch.read):
                if read:
                    before = path[: len(tree.prompt) + place]
                    expected.append((number, before, branch.tokens[place]))
        found = [
            (int(branch), seen(batch, int(source) // width, int(source) % width), int(target))
            for branch, source, target in zip(batch.branch_of_read, batch.sources, batch.targets, strict=True)
        ]
        assert found == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_end_is_the_branchs_last_token(layout: Layout) -> None:
    for batch in batches(numbered(10), 100, layout):
        lasts = [branch.tokens[-1] for tree in batch.trees for branch in tree.branches]
        assert batch.tokens.flatten()[batch.ends].tolist() == lasts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 20, 50, 100, 10_000])
def test_every_tree_is_in_one_batch_whole_and_once(layout: Layout, budget: int) -> None:
    trees = numbered(30, seed=budget)
    found = [tree for batch in batches(trees, budget, layout) for tree in batch.trees]
    assert sorted(found, key=lambda tree: tree.number) == trees


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 20, 50, 100, 1000])
def test_only_a_tree_that_is_longer_itself_exceeds_the_budget(layout: Layout, budget: int) -> None:
    for batch in batches(numbered(30), budget, layout):
        assert batch.token_count <= budget or len(batch.trees) == 1


def test_rows_of_trees_waste_little_and_a_packed_row_nothing() -> None:
    trees = models.forest(200, seed=5)
    tokens = sum(tree.length for tree in trees)
    assert sum(batch.token_count for batch in batches(trees, 2000, "tree")) < 1.1 * tokens
    assert sum(batch.token_count for batch in batches(trees, 2000, "packed")) == tokens


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_do_not_depend_on_the_order_of_trees(layout: Layout) -> None:
    trees = models.forest(20)
    orders = trees, trees[::-1]
    first, second = ([batch.tokens.tolist() for batch in batches(each, 100, layout)] for each in orders)
    assert first == second


def test_plain_rows_need_no_mask_and_count_through_padding() -> None:
    for batch in batches(models.forest(10), 200, "plain"):
        assert batch.mask is None
        assert torch.equal(batch.positions, torch.arange(batch.tokens.shape[1]).expand_as(batch.positions))


def test_a_padding_token_always_sees_something() -> None:
    masks = [batch.mask for batch in batches(models.forest(15), 120, "tree") if batch.mask is not None]
    assert masks
    assert all(mask.any(-1).all() for mask in masks)


def test_one_row_holds_everything() -> None:
    trees = numbered(5)
    batch = one_row(trees)
    assert batch.tokens.shape == (1, sum(tree.length for tree in trees))
    assert batch.trees == tuple(trees)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_by_branch_are_those_of_a_loop(layout: Layout) -> None:
    for batch in batches(models.forest(9), 90, layout):
        values = torch.randn(len(batch.targets), dtype=torch.float64)
        slow = [0.0] * batch.branches
        for value, branch in zip(values.tolist(), batch.branch_of_read.tolist(), strict=True):
            slow[branch] += value
        assert batch.sum_by_branch(values).tolist() == pytest.approx(slow)


def test_split_keeps_prompt_number_and_margin() -> None:
    tree = Tree((1, 2), (Branch.of((3,)), Branch.of((4, 5))), 7, 0.5, "file:1")
    assert tree.split() == [
        Tree((1, 2), (Branch.of((3,)),), 7, 0.5, "file:1"),
        Tree((1, 2), (Branch.of((4, 5)),), 7, 0.5, "file:1"),
    ]


@pytest.mark.parametrize("prompt", [(), (1,)])
def test_an_empty_prompt_or_branch_is_refused(prompt: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no empty branch"):
        Tree(prompt, (Branch.of(() if prompt else (1,)),))


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(models.tokenizer())


def conversation(*turns: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[n % 2], turn) for n, turn in enumerate(turns)), "chats:1")


def test_a_conversation_reads_exactly_the_trained_tokens(template: ChatTemplate) -> None:
    row = conversation("Where is Ada?", "In Oslo.", "And Ben?", "In Lima.")
    tree, encoded = conversation_tree(template, row, 0, 1000), template.encode(row.messages)
    assert isinstance(tree, Tree)
    (branch,) = tree.branches
    read = [False] * len(tree.prompt) + list(branch.read)
    assert [*tree.prompt, *branch.tokens] == encoded.tokens[: len(read)]
    assert read == encoded.trained[: len(read)]
    assert not any(encoded.trained[len(read) :])
    assert branch.read[0]
    assert branch.read[-1]
    assert tree.origin == "chats:1"


def test_a_conversation_with_nothing_to_train_on_is_dropped(template: ChatTemplate) -> None:
    assert conversation_tree(template, conversation("Where is Ada?"), 0, 100) == NOTHING_TRAINED.name


def test_a_long_prompt_loses_its_beginning_and_nothing_of_the_response(template: ChatTemplate) -> None:
    row = conversation("Where is Ada? " * 20, "In Oslo.")
    whole, cut = conversation_tree(template, row, 0, 1000), conversation_tree(template, row, 0, 30)
    assert isinstance(whole, Tree)
    assert isinstance(cut, Tree)
    assert cut.length == 30
    assert cut.branches == whole.branches
    assert cut.prompt == whole.prompt[-len(cut.prompt) :]
    assert (whole.cut, cut.cut) == (0, len(whole.prompt) - len(cut.prompt))


def test_the_longest_path_is_cut_to_the_length_not_the_whole_tree(template: ChatTemplate) -> None:
    row = Preference((Message("user", "Where is Ada? " * 20),), ("In Oslo, of course.", "No.", "In Lima."))
    tree = preference_tree(template, row, 0, 40)
    assert isinstance(tree, Tree)
    assert len(tree.prompt) + max(len(branch.tokens) for branch in tree.branches) == 40


def test_a_response_as_long_as_the_limit_is_dropped(template: ChatTemplate) -> None:
    row = Preference((Message("user", "Where is Ada?"),), ("In Oslo.", "No."))
    longest = len(template.response("In Oslo."))
    assert preference_tree(template, row, 0, longest) == TOO_LONG.name
    assert isinstance(preference_tree(template, row, 0, longest + 1), Tree)


def test_equal_responses_are_dropped(template: ChatTemplate) -> None:
    row = Preference((Message("user", "Where is Ada?"),), ("In Oslo.", "No.", "In Oslo."))
    assert preference_tree(template, row, 0, 1000) == EQUAL_TOKENS.name


def test_a_preference_keeps_order_margin_and_place(template: ChatTemplate) -> None:
    row = Preference((Message("user", "Where is Ada?"),), ("In Oslo.", "No."), 0.4, "pairs:3")
    tree = preference_tree(template, row, 5, 1000)
    assert isinstance(tree, Tree)
    assert [template.decode(branch.tokens) for branch in tree.branches] == ["In Oslo.", "No."]
    assert (tree.margin, tree.origin, tree.number) == (0.4, "pairs:3", 5)
    assert all(all(branch.read) and branch.tokens[-1] == template.stop_id for branch in tree.branches)


def test_a_prompt_is_cut_at_its_beginning(template: ChatTemplate) -> None:
    prompt = (Message("user", "Where is Ada?"),)
    whole = prompt_tokens(template, prompt, 1000)
    assert whole == tuple(template.prompt(prompt))
    assert prompt_tokens(template, prompt, 4) == whole[-4:]


def test_reasons_are_counted_and_trees_kept_in_order() -> None:
    trees = models.forest(3)
    kept, dropped = usable([trees[0], "too long", trees[1], "too long", "equal", trees[2]])
    assert kept == trees
    assert dropped == {"too long": 2, "equal": 1}
