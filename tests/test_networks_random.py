"""Traces of random programs: `python -m tests.support.programs` draws many more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support import programs

SEEDS = 160


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_random_programs(first: int) -> None:
    found = {seed: programs.verdict(programs.draw(seed)) for seed in range(first, first + 20)}
    wrong = {s: v.messages for s, v in found.items() if v.kind == "wrong"}
    shown = next((programs.draw(s).describe() for s in wrong), "")
    assert not wrong, shown
    assert sum(v.kind == "right" for v in found.values()) >= 15


def test_programs_say_what_is_wrong() -> None:
    """A velocity whose trace is not that of its values is told from one whose trace is."""
    layer, step = "self.l0 = nn.Linear(4, 4)", "h = F.silu(self.l0(h))"
    own = programs.Program(
        *((layer,), (step,), "return h", (3, 4), torch.float64, 0.25, {"estimator": "exact"}),
        *(True, True, True, False),
    )
    call = own.call()
    exact = programs.rows.by_autograd(call, None)
    _, found = programs.rows.by_fewstep(call)
    assert programs.rows.differences(call, found, exact, None) == []
    off = programs.replace(found, value=found.value * (1 + 1e-9))
    assert programs.rows.differences(call, off, exact, None)[0].startswith("value")
    off = programs.replace(found, gradients=[0 * g for g in found.gradients])
    assert programs.rows.differences(call, off, exact, None) == ["gradient: off by 1 of its scale"]


def test_a_search_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def verdict(p: programs.Program) -> programs.Verdict:
        seen.append(p.options["seed"])
        wrong = p.options["seed"] == 130
        return programs.Verdict("wrong", ("value: wrong",)) if wrong else programs.Verdict("right")

    def draw(seed: int) -> programs.Program:
        return programs.replace(drawn, options={"seed": seed})

    drawn = programs.draw(0)
    monkeypatch.setattr(programs, "verdict", verdict)
    monkeypatch.setattr(programs, "draw", draw)
    notes = tmp_path / "notes"
    assert programs.search(0, 200, notes, False) == 1
    assert programs.search(100, 250, notes, False) == 1
    assert programs.search(140, 250, notes, False) == 0
    assert seen == list(range(250))
