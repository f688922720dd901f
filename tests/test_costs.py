"""The table of costs in Python and the enum that C++ and CUDA share are one list."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fewstep.reference.costs import COSTS, NAMES, OF_DISTANCE, Traced, served

# Raised inside torch when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

HEADER = Path(__file__).parents[1] / "csrc/shared/cost.h"


def test_the_enum_is_the_table() -> None:
    """An op's argument is an index into both. A formula has no kernel."""
    (body,) = re.findall(r"enum class Cost : int \{(.*?)\};", HEADER.read_text(), re.S)
    rows = [row for row in COSTS.values() if row.index >= 0 and row.directions is None]
    indices = {row.name: row.index for row in rows}
    assert {name: k for k, name in enumerate(re.split(r",\s*", body.strip()))} == indices
    assert served("cuda") == served("triton") == OF_DISTANCE


def test_no_source_knows_a_cost_by_its_number() -> None:
    sources = [p for p in HEADER.parents[1].rglob("*") if p.suffix in {".h", ".inl", ".cpp", ".cu"}]
    assert len(sources) > 30
    numbers = re.compile(r"\bcost\)? *(==|!=|<=?|>=?) *\d")
    assert [p.name for p in sources if numbers.search(p.read_text())] == []


@pytest.mark.parametrize("cost", NAMES)
def test_derivatives_and_bounds_are_those_of_the_cost(cost: str) -> None:
    """By autograd: the gradient, and products with the first and second derivative."""
    generator = torch.Generator().manual_seed(0)
    x, y, ux, uy = (
        torch.randn(2, n, 3, generator=generator, dtype=torch.float64) for n in (5, 4, 5, 4)
    )
    w = torch.rand(2, 5, 4, generator=generator, dtype=torch.float64)
    row = COSTS[cost]
    assert row.matrix is not None
    assert row.span is not None
    matrix = row.matrix
    x, y = x.requires_grad_(), y.requires_grad_()
    C = matrix(x, y)
    both = torch.cat([x, y], 1).detach()
    low, high = both.amin(1), both.amax(1)
    if row.directions is None:
        assert (row.span(low, high, low, high) >= C.amax((1, 2)) - C.amin((1, 2))).all()
    own, traced = row.derivatives(x, y, C), Traced(x, y, C)
    dC = traced.push(ux, uy)
    torch.testing.assert_close(own.push(ux, uy), dC)
    torch.testing.assert_close(own.pull(w), traced.pull(w))
    torch.testing.assert_close(own.bend(w, ux, uy, dC), traced.bend(w, ux, uy, dC))
    if row.gradient is not None:
        torch.testing.assert_close(
            row.gradient(w, x, y, torch.ones(2, 4).double()), traced.pull(w)[0]
        )
    if not row.traced and row.directions is None:
        x, y = x.detach(), y.detach()
        tangent = torch.func.jvp(matrix, (x, y), (ux, uy))[1]
        torch.testing.assert_close(tangent, dC)
        both_ways = torch.func.jacrev(matrix)(x, y), torch.func.jacfwd(matrix)(x, y)
        torch.testing.assert_close(*both_ways)

        def along(x: torch.Tensor) -> torch.Tensor:
            return (w * torch.func.jvp(matrix, (x, y), (ux, uy))[1]).sum()

        bent = traced.bend(w, ux, uy, dC)[0]
        torch.testing.assert_close(torch.func.grad(along)(x), bent)
        torch.testing.assert_close(torch.func.jvp(along, (x,), (ux,))[1], (bent * ux).sum())
