"""The mutation run (`make mutations`) takes out guards that are there, and names tests that are there."""

from __future__ import annotations

import re

import pytest
from conftest import REPOSITORY
from mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_guard_stands_where_it_is_taken_out_and_its_test_is_in_the_fast_tier(mutation: Mutation) -> None:
    assert (REPOSITORY / mutation.file).read_text(encoding="utf-8").count(mutation.text) == 1
    file, _, name = mutation.test.partition("::")
    source = (REPOSITORY / "tests" / file).read_text(encoding="utf-8")
    if name:
        defined = re.search(rf"((?:^@.*\n)*)^def {re.escape(name.partition('[')[0])}\(", source, re.MULTILINE)
        assert defined
        assert "@pytest.mark.slow\n" not in defined[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_of_what_is_collected_the_test_of_a_guard_is_not_left_to_the_slow_tier(
    mutation: Mutation, request: pytest.FixtureRequest
) -> None:
    """Cases that are marked one by one, which the source above does not tell; as far as their files are collected."""
    file = f"tests/{mutation.test.partition('::')[0]}"
    collected = [item for item in request.session.items if item.nodeid.partition("::")[0] == file]
    named = re.compile(rf"tests/{re.escape(mutation.test)}($|::|\[)")
    fast = [item for item in collected if named.match(item.nodeid) and not item.get_closest_marker("slow")]
    assert fast or not collected
