"""Random problems with random options: `python -m tests.support.search` draws many more."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import search
from tests.support.problems import draw

SEEDS = 400
# Plans that vanish or diverge, potentials beyond all costs, sums that cancel.
HARD = (30266, 30924, 31138, 31590, 34135, 34808, 40339, 43921, 44462, 44853, 45863)


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_random_problems(first: int) -> None:
    found = {}
    for seed in range(first, first + 20):
        messages = search.failures(draw(seed), seed)
        if messages:
            found[seed] = messages
    assert not found


@pytest.mark.parametrize("seed", HARD)
def test_hard_problems(seed: int) -> None:
    assert not search.failures(draw(seed), seed)


def test_a_search_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def failures(_: object, seed: int) -> list[str]:
        seen.append(seed)
        return ["value: wrong"] if seed == 130 else []

    monkeypatch.setattr(search, "failures", failures)
    notes = tmp_path / "notes"
    assert search.search(0, 200, notes, False) == 1
    assert search.search(100, 250, notes, False) == 1
    assert search.search(140, 250, notes, False) == 0
    assert seen == list(range(250))
