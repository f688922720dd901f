"""A few cases that hold every pair of values, in place of a whole product."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations

Pair = tuple[tuple[int, Hashable], tuple[int, Hashable]]


def all_pairs(cases: Sequence[Sequence[Hashable]]) -> list[int]:
    """Indices of cases that hold each pair of values of two factors that any case holds.

    Greedy: the case with most pairs that are still missing comes next, and of several the first.
    With one factor, cases that hold each value.
    """
    held = [_pairs(case) for case in cases]
    missing = set().union(*held)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(held[i] & missing))
        chosen.append(best)
        missing -= held[best]
    return sorted(chosen)


def _pairs(case: Sequence[Hashable]) -> set[Pair]:
    values = list(enumerate(case))
    return set(combinations(values, 2)) | {(value, value) for value in values}
