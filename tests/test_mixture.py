"""Mixtures: every item as often as its source's share says, in an order that can be entered anywhere."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

import pytest

from data.mixture import Mixture, draws, epochs, joined, shuffled, stream
from pipeline.config import Share
from pipeline.errors import DataError

Item = TypeVar("Item")
RATES = [1.0, 2.0, 0.5, 0.1, 0.7, 1 / 3, 2.5, 3.44, 0.999999, 1.0000000000000002, 0.30000000000000004]


def shuffled_forever(items: Sequence[Item], seed: int) -> Iterator[Item]:
    """What a stream over a single source has always given."""
    for number in itertools.count():
        order = list(range(len(items)))
        random.Random(f"{seed} pass {number}").shuffle(order)
        yield from (items[index] for index in order)


def by_epochs(**rates: float) -> dict[str, Share]:
    return {name: Share(epochs=rate) for name, rate in rates.items()}


def by_weight(**weights: float) -> dict[str, Share]:
    return {name: Share(weight=weight) for name, weight in weights.items()}


def example(seed: int = 3) -> Mixture[str]:
    sources = {
        name: [f"{name}{index}" for index in range(count)] for name, count in zip("abc", (7, 12, 1), strict=True)
    }
    return Mixture(sources, by_epochs(a=2.5, b=0.3, c=1.0), seed)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("count", [1, 2, 10, 37])
def test_after_any_number_of_passes_rows_are_used_equally_often(rate: float, count: int) -> None:
    used = Counter(dict.fromkeys(range(count), 0))
    exact = Fraction(rate).limit_denominator(10**9)
    for number in range(25):
        used.update(draws(count, rate, number, 5, "a"))
        passed = exact * (number + 1)
        assert set(used) == set(range(count))
        assert set(used.values()) <= {math.floor(passed), math.ceil(passed)}
        assert abs(used.total() - passed * count) <= Fraction(1, 2)


def test_a_whole_source_is_drawn_in_its_own_order() -> None:
    assert draws(9, 1.0, 4, 0, "a") == range(9)
    assert list(draws(3, 2.0, 0, 0, "a")) == [0, 1, 2, 0, 1, 2]


def test_two_halves_are_a_whole_and_the_second_pass_goes_on_where_the_first_ended() -> None:
    first, second, third = (list(draws(11, 0.5, number, 0, "a")) for number in range(3))
    assert sorted(first + second) == list(range(11))
    assert third != first


def test_a_fraction_runs_on_into_the_next_permutation() -> None:
    taken = [row for number in range(5) for row in draws(10, 0.8, number, 0, "a")]
    assert [sorted(taken[start : start + 10]) for start in (0, 10, 20, 30)] == [list(range(10))] * 4


def test_draws_depend_on_the_seed_the_name_and_the_pass() -> None:
    several = [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1)]
    found = {tuple(draws(1000, 0.5, number, seed, name)) for seed, name, number in several}
    assert len(found) == 4
    assert list(draws(1000, 0.5, 1, 1, "a")) == list(draws(1000, 0.5, 1, 1, "a"))


def test_shares_by_epochs_are_what_they_say() -> None:
    assert epochs({"a": 5, "b": 900}, by_epochs(a=3.0, b=0.25)) == {"a": 3.0, "b": 0.25}


def test_shares_by_weight_are_shares_of_a_pass_as_long_as_all_sources() -> None:
    chance = random.Random(0)
    for _ in range(200):
        sizes = {name: chance.randint(1, 10**6) for name in "abcd"[: chance.randint(1, 4)]}
        weights = {name: chance.uniform(0.01, 9) for name in sizes}
        rates = epochs(sizes, by_weight(**weights))
        taken = {name: rates[name] * sizes[name] for name in sizes}
        assert sum(taken.values()) == pytest.approx(sum(sizes.values()))
        for name in sizes:
            assert taken[name] / sum(taken.values()) == pytest.approx(weights[name] / sum(weights.values()))


def test_the_worked_example_of_two_weights() -> None:
    assert epochs({"wiki": 3, "web": 57}, by_weight(wiki=1, web=3)) == {"wiki": 5.0, "web": 45 / 57}
    mixture = Mixture({"wiki": range(3), "web": range(100, 157)}, by_weight(wiki=1, web=3), 0)
    assert len(mixture) == 60
    assert Counter(item < 100 for item in mixture.pass_(0)) == {True: 15, False: 45}


def test_an_empty_source_is_named() -> None:
    for shares in (by_weight(a=1, b=1), by_epochs(a=1, b=1)):
        with pytest.raises(DataError, match=r"^b: no usable rows"):
            epochs({"a": 4, "b": 0}, shares)


def test_a_mixture_of_which_a_pass_takes_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="a pass over the mixture takes no row"):
        Mixture({"a": [1, 2, 3]}, by_epochs(a=0.1), 0)


@pytest.mark.parametrize("shares", [None, by_epochs(a=1), by_weight(a=7.3)])
@pytest.mark.parametrize("count", [1, 2, 20])
def test_a_mixture_of_one_source_streams_as_the_source_does(shares: dict[str, Share] | None, count: int) -> None:
    items = [str(index) for index in range(count)]
    expected = list(itertools.islice(shuffled_forever(items, 11), 70))
    assert list(itertools.islice(stream(items, 11), 70)) == expected
    assert list(itertools.islice(stream(Mixture({"a": items}, shares, 11), 11), 70)) == expected


def test_a_stream_begins_anywhere_as_if_the_items_before_had_been_taken() -> None:
    whole = list(itertools.islice(stream(example(), 4), 200))
    plain = list(itertools.islice(stream(range(13), 4), 200))
    for start in range(150):
        assert list(itertools.islice(stream(example(), 4, start), 50)) == whole[start : start + 50]
        assert list(itertools.islice(stream(range(13), 4, start), 50)) == plain[start : start + 50]


def test_a_stream_goes_through_every_pass_in_an_order_of_its_own() -> None:
    mixture, taken = example(), stream(example(), 4)
    orders = []
    for number in range(8):
        pass_ = mixture.pass_(number)
        orders.append(list(itertools.islice(taken, len(pass_))))
        assert Counter(orders[-1]) == Counter(pass_)
        assert orders[-1] != list(pass_)
    assert len(set(map(tuple, orders))) == 8


def test_an_item_is_looked_at_only_when_it_is_its_turn() -> None:
    class Watched(Sequence[int]):
        seen: list[int]

        def __init__(self) -> None:
            self.seen = []

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            self.seen.append(index)
            return index

    watched = Watched()
    assert len(list(itertools.islice(stream(Mixture({"a": watched}, by_epochs(a=0.5), 0), 0, start=10_000), 3))) == 3
    assert len(watched.seen) == 3


def test_a_pass_can_be_indexed_from_both_ends_and_sliced() -> None:
    pass_ = example().pass_(2)
    items = list(pass_)
    assert [pass_[index] for index in range(len(items))] == items
    assert [pass_[index] for index in range(-len(items), 0)] == items
    assert pass_[2:-1:3] == items[2:-1:3]
    with pytest.raises(IndexError):
        pass_[len(items)]


def test_without_shares_every_source_is_taken_whole() -> None:
    mixture = Mixture({"a": range(5), "b": range(10, 13)}, None, 0)
    assert list(mixture.pass_(3)) == [0, 1, 2, 3, 4, 10, 11, 12]


def test_joined_sequences_are_one() -> None:
    parts = [range(3), [], [7, 8], range(100, 101), []]
    assert list(joined(parts)) == list(itertools.chain(*parts))
    assert joined(parts)[-3:] == [7, 8, 100]
    assert list(joined([])) == []


def test_passes_may_be_empty_of_a_source_but_none_of_its_rows_is_forgotten() -> None:
    mixture = Mixture({"a": ["rare"], "b": range(4)}, by_epochs(a=0.2, b=1), 0)
    assert [list(mixture.pass_(number)).count("rare") for number in range(10)] == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0]


def test_shuffling_is_that_of_a_list() -> None:
    expected = list(range(50))
    random.Random("7 documents").shuffle(expected)
    assert list(shuffled(50, "7 documents")) == expected
