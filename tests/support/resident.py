"""Problems for the resident CUDA kernels, and the emulated ones held against the reference."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.ops.sinkhorn.inputs import PRECISIONS
from fewstep.reference import costs
from fewstep.reference import sinkhorn as reference
from fewstep.reference.sinkhorn import Inputs, Points, Schedule
from support.emulation import Emulator, arrays, split, wide
from tolerances import assert_contract

COSTS = costs.served("cuda")
SHAPES = [(2, 1, 1, 1), (1, 1, 9, 2), (2, 7, 13, 3), (1, 12, 16, 40), (3, 9, 2, 17)]
NO_DIAGONAL = -(2**63)


def header(
    op: str,
    dtype: torch.dtype,
    team: tuple[int, int],
    *,
    batch: int,
    n: int = 1,
    m: int = 1,
    d: int = 1,
    cost: str = "sqeuclidean",
    diagonal: int | None = None,
    max_iter: int = 1,
    flags: tuple[int, int, int, int] = (0, 0, 0, 0),
    precision: str = "tf32x3",
    updates: tuple[bool, bool] = (False, False),
    numbers: tuple[float, ...] = (-1.0, 1e-3, 1.0, math.inf, math.inf, 1.0),
) -> bytes:
    integers = (("solve", "direct", "drift").index(op), dtype == torch.float64, *team)
    where = NO_DIAGONAL if diagonal is None else diagonal
    sizes = (batch, n, m, d, costs.COSTS[cost].index, where, max_iter)
    how = PRECISIONS.index(precision)
    return struct.pack("19q6d", *integers, *sizes, *flags, False, how, *updates, *numbers)


def make(
    batch: int, n: int, m: int, d: int, dtype: torch.dtype, cost: str = "sqeuclidean"
) -> tuple[Tensor, ...]:
    """x, y, a, b, eps; one zero weight on either side where there is room."""
    rng = torch.Generator().manual_seed(batch + 10 * n + 100 * m + d)
    x = torch.randn(batch, n, d, generator=rng, dtype=torch.float64) / d**0.5
    y = torch.randn(batch, m, d, generator=rng, dtype=torch.float64) / d**0.5 + 0.3
    x[:, 0] = y[:, 0]
    a = torch.rand(batch, n, generator=rng, dtype=torch.float64) + 0.1
    b = torch.rand(batch, m, generator=rng, dtype=torch.float64) + 0.1
    a[:, n // 2] *= n < 3
    b[:, -1] *= m < 3
    eps = torch.linspace(0.05, 0.3, batch, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (x, y, a / a.sum(-1, True), b / b.sum(-1, True), eps))


def solve_emulated(
    run: Emulator,
    team: tuple[int, int],
    inputs: tuple[Tensor, ...],
    schedule: Schedule,
    *,
    cost: str = "sqeuclidean",
    diagonal: int | None = None,
    f0: Tensor | None = None,
    g0: Tensor | None = None,
    op: str = "solve",
    precision: str = "tf32x3",
) -> list[Tensor]:
    x, y = inputs[:2]
    (batch, n, d), m, dtype, s = x.shape, y.shape[1], x.dtype, schedule
    optional = (s.start, s.temperatures, f0, g0)
    present = (
        int(s.start is not None),
        0 if s.temperatures is None else len(s.temperatures),
        int(f0 is not None),
        int(g0 is not None),
    )
    tol = -1.0 if s.tol is None else s.tol
    rho = [math.inf if r is None else r for r in s.rho]
    numbers = (tol, reference.DEFAULT_TOL if s.tol is None else tol, s.factor, *rho, s.relax)
    request = header(
        op,
        dtype,
        team,
        batch=batch,
        n=n,
        m=m,
        d=d,
        cost=cost,
        diagonal=diagonal,
        max_iter=s.max_iter,
        flags=present,
        precision=precision,
        updates=(s.simultaneous, s.single),
        numbers=numbers,
    )
    given = [t.to(dtype) for t in optional if t is not None]
    answer = run(request + arrays(*inputs, *given))
    per_problem = [(t, (batch,)) for t in (dtype, dtype, torch.int64, torch.bool)]
    return split(answer, (dtype, (batch, n)), (dtype, (batch, m)), *per_problem)


def exact(
    inputs: tuple[Tensor, ...],
    schedule: Schedule,
    *,
    cost: str = "sqeuclidean",
    diagonal: int | None = None,
    f0: Tensor | None = None,
    g0: Tensor | None = None,
) -> tuple[Tensor, ...]:
    x, y, a, b, eps = wide(inputs)
    up = lambda t: None if t is None else t.double()  # noqa: E731
    schedule = replace(schedule, start=up(schedule.start), temperatures=up(schedule.temperatures))
    points = Points(x, y, cost, diagonal=diagonal)
    return reference.solve(Inputs(points, a, b, eps, up(f0), up(g0), schedule))


def check(
    run: Emulator,
    team: tuple[int, int],
    inputs: tuple[Tensor, ...],
    schedule: Schedule,
    *,
    op: str = "solve",
    **options: Any,
) -> list[Tensor]:
    """Held to the numerics contract against the reference in float64."""
    actual = solve_emulated(run, team, inputs, schedule, op=op, **options)
    expected = exact(inputs, schedule, **options)
    cost = options.get("cost", "sqeuclidean")
    scale = reference.cost_matrix(*wide(inputs[:2]), cost).max().clamp_min(1e-3)
    if (g0 := options.get("g0")) is not None:
        scale = scale + g0.abs().max()
    assert_contract("potential", actual[0], expected[0], scale=scale)
    assert_contract("potential", actual[1], expected[1], scale=scale)
    # Values near zero are differences of the size of the potentials.
    assert_contract("value", actual[2], expected[2], scale=scale)
    assert_contract("plan", actual[3], expected[3], scale=expected[3].max().clamp_min(1.0))
    assert torch.equal(actual[4], expected[4])
    assert torch.equal(actual[5], expected[5])
    return actual


def check_cold(
    run: Emulator, team: tuple[int, int], inputs: tuple[Tensor, ...], schedule: Schedule
) -> None:
    """Potentials alone: residuals are rounding of costs of 1e4 eps, but finite."""
    actual = solve_emulated(run, team, inputs, schedule)
    expected = exact(inputs, schedule)
    scale = reference.cost_matrix(*wide(inputs[:2]), "sqeuclidean").max()
    assert_contract("potential", actual[0], expected[0], scale=scale)
    assert_contract("potential", actual[1], expected[1], scale=scale)
    assert actual[3].isfinite().all()
