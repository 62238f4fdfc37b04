"""PPO's own parts: the trees it checks itself on."""

from __future__ import annotations

import pytest

from stages.ppo import ECHO, _echoes


@pytest.mark.parametrize("length", [1, 2, ECHO - 1, ECHO, ECHO + 1, 500])
def test_checks_never_need_more_positions_than_a_prompt_or_two_short_ones(length: int) -> None:
    prompt = tuple(range(1, length + 1))
    (tree,) = _echoes([prompt], branches=2)
    longest = len(tree.prompt) + max(len(branch.tokens) for branch in tree.branches)
    assert longest <= max(length, 2 * ECHO)
    assert tree.branches[0].tokens == prompt[-ECHO:]
