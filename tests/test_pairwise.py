"""Cases that stand for a product of factors."""

from __future__ import annotations

import itertools

import pytest

from support.pairwise import all_pairs


@pytest.mark.parametrize("sizes", [(4,), (3, 5), (2, 2, 2), (5, 3, 2, 4), (2,) * 7], ids=str)
def test_every_pair_is_held(sizes: tuple[int, ...]) -> None:
    cases = list(itertools.product(*map(range, sizes)))
    chosen = [cases[i] for i in all_pairs(cases)]
    for i, j in itertools.combinations(range(len(sizes)), 2):
        held = {(case[i], case[j]) for case in chosen}
        assert held == set(itertools.product(range(sizes[i]), range(sizes[j])))
    assert {case[0] for case in chosen} == set(range(sizes[0]))
    largest = sorted(sizes)[-2:]
    assert len(chosen) <= 2 * largest[0] * largest[-1]
    assert len(chosen) < len(cases) or len(sizes) < 3


def test_pairs_that_no_case_holds_are_not_asked_for() -> None:
    cases = [("a", 1, "x"), ("a", 2, "x"), ("b", 1, "y"), ("b", 1, "x")]
    assert all_pairs(cases) == [0, 1, 2, 3]
    assert all_pairs(cases[:1]) == [0]
    assert all_pairs([]) == []
