"""Packed rows, and the groups in which their trees are padded."""

from __future__ import annotations

from itertools import pairwise

import architectures
import pytest

from data.batch import batches, packed
from data.packing import MULTIPLE, SIMILAR, Packing, Span, rounded_up
from data.tree import Branch, Tree


@pytest.mark.parametrize("count", [1, 2, 60])
def test_trees_stand_one_after_another_in_their_order(count: int) -> None:
    trees = architectures.ragged(count, seed=count)
    row = packed(trees)
    assert row.packing is not None
    assert row.mask is None
    assert row.packing.spans[0].start == 0
    for tree, span in zip(trees, row.packing.spans, strict=True):
        tokens = [*tree.prompt, *(token for branch in tree.branches for token in branch.tokens)]
        assert row.tokens[0, span.start : span.stop].tolist() == tokens
        assert span.prompt == len(tree.prompt)
        assert span.branches == tuple(len(branch.tokens) for branch in tree.branches)
    assert row.packing.spans[-1].stop == row.token_count == sum(tree.length for tree in trees)


@pytest.mark.parametrize("count", [1, 2, 17, 200])
def test_groups_are_a_partition_of_the_trees(count: int) -> None:
    packing = Packing.of(architectures.ragged(count, seed=count))
    found = [span for group in packing.groups for span in group.spans]
    assert sorted(found, key=lambda span: span.start) == list(packing.spans)


def test_a_groups_width_covers_its_trees_and_exceeds_none_by_much() -> None:
    for group in Packing.of(architectures.ragged(200)).groups:
        longest = max(span.length for span in group.spans)
        assert longest <= group.width < longest + MULTIPLE
        assert group.width % MULTIPLE == 0
        assert min(span.length for span in group.spans) >= SIMILAR * longest


def test_padding_is_bounded_by_the_tokens_and_the_multiple() -> None:
    packing = Packing.of(architectures.ragged(200))
    slots = sum(len(group.spans) * group.width for group in packing.groups)
    assert slots <= sum(span.length / SIMILAR + MULTIPLE for span in packing.spans)


def test_trees_of_one_branch_are_kept_apart() -> None:
    packing = Packing.of(architectures.ragged(60))
    assert not packing.causal
    assert {group.causal for group in packing.groups} == {True, False}
    for group in packing.groups:
        assert {span.causal for span in group.spans} == {group.causal}
    assert Packing.of(architectures.ragged(20, branches=(1,))).causal


def test_a_span_counts_its_prompt_and_all_branches() -> None:
    tree = Tree((1, 2, 3), (Branch.of((4,)), Branch.of((5, 6))))
    first, second = Packing.of([tree, tree]).spans
    assert (first, second) == (Span(0, 3, (1, 2)), Span(6, 3, (1, 2)))
    assert (second.length, second.stop) == (6, 12)


def test_a_packing_equals_itself_only() -> None:
    trees = architectures.ragged(3)
    assert len({Packing.of(trees), Packing.of(trees)}) == 2


def test_packed_batches_are_full() -> None:
    trees, budget = architectures.ragged(100), 400
    found = list(batches(trees, budget))
    for batch, following in pairwise(found):
        assert batch.token_count <= budget < batch.token_count + following.trees[0].length


def test_rounded_numbers_are_few_and_not_much_larger() -> None:
    found = {count: rounded_up(count) for count in range(1, 4097)}
    assert all(count <= up < 1.125 * count + MULTIPLE and up % MULTIPLE == 0 for count, up in found.items())
    assert len({up for up in found.values() if up > 512}) == 3 * 8
    assert all(rounded_up(up) == up for up in found.values())


@pytest.mark.parametrize("count", [1, 2, 17, 60])
def test_a_rounded_row_holds_the_same_trees_and_padding_behind_them(count: int) -> None:
    trees = architectures.ragged(count, seed=count)
    plain = packed(trees)
    row = packed(trees, plain.token_count + 7)
    assert row.packing is not None
    assert plain.packing is not None
    assert (row.packing.spans, row.packing.padding) == (plain.packing.spans, 7)
    assert row.packing.sequences[-1] == Span(plain.token_count, 7, ())
    assert plain.packing.sequences == plain.packing.spans
    assert row.token_count == row.packing.width == plain.token_count + 7
    assert row.tokens[0, : plain.token_count].tolist() == plain.tokens[0].tolist()
    assert not row.tokens[0, plain.token_count :].any()
    assert row.sources.tolist() == plain.sources.tolist()


def test_groups_of_a_rounded_row_have_few_sizes() -> None:
    packing = Packing.of(architectures.ragged(200), 10**6)
    found = [span for group in packing.groups for span in group.spans]
    assert sorted(found, key=lambda span: span.start) == list(packing.spans)
    for group in packing.groups:
        assert len(group.spans).bit_count() == 1
        assert group.width == rounded_up(max(span.length for span in group.spans))


def test_rounded_batches_keep_to_the_budget_but_for_longer_trees() -> None:
    trees = architectures.ragged(300)
    for budget in (10, 150, 400, 1024):
        for rounded, plain in zip(batches(trees, budget, rounded=True), batches(trees, budget), strict=True):
            assert rounded.trees == plain.trees
            wanted = rounded_up(plain.token_count)
            assert rounded.token_count == (min(budget, wanted) if plain.token_count <= budget else wanted)


def test_a_width_that_is_too_small_is_refused() -> None:
    trees = architectures.ragged(3)
    tokens = sum(tree.length for tree in trees)
    with pytest.raises(ValueError, match=f"{tokens} tokens do not fit a row of {tokens - 1}"):
        packed(trees, tokens - 1)
    assert packed(trees, tokens).token_count == tokens


def test_packed_batches_are_the_same_each_time() -> None:
    trees = architectures.ragged(50)
    first, second = ([batch.trees for batch in batches(each, 300)] for each in (trees, trees[::-1]))
    assert first == second
