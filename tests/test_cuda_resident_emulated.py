"""The resident CUDA solver and drift, emulated on the host."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.reference import drift as drift_reference
from fewstep.reference import sinkhorn as reference
from fewstep.reference.sinkhorn import Schedule
from support.emulation import Emulator, arrays, emulator, split, wide
from support.resident import (
    COSTS,
    SHAPES,
    check,
    check_cold,
    exact,
    header,
    make,
    solve_emulated,
)
from tolerances import assert_contract, error

# A thread alone, and warps of 32 fibers with tensor cores, under the address sanitizer; 3 warps of
# 2 threads, and clusters of such blocks, under the thread sanitizer: ranks, and warps of 32.
TEAMS = {"alone": (0, 0), "block": (1, 0), "cluster": (3, 0)}
WIDE = {"wide": (1, 2)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


@pytest.fixture(scope="session")
def emulators() -> Iterator[dict[str, Emulator]]:
    with (
        emulator("emulate_resident.cpp", "thread", optimise="-O1") as threads,
        emulator("emulate_resident.cpp", "address", optimise="-O1") as alone,
    ):
        yield dict.fromkeys(("alone", *WIDE), alone) | dict.fromkeys(("block", "cluster"), threads)


@DTYPES
@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_solve(
    emulators: dict[str, Emulator], shape: tuple[int, ...], team: str, dtype: torch.dtype
) -> None:
    for cost in COSTS if team == "alone" else COSTS[:1]:
        inputs = make(*shape, dtype)
        check(emulators[team], TEAMS[team], inputs, Schedule(max_iter=6), cost=cost)


@pytest.mark.parametrize("op", ["solve", "direct"])
def test_any_mass(emulators: dict[str, Emulator], op: str) -> None:
    x, y, a, b, eps = make(2, 8, 11, 3, torch.float64)
    mass = torch.tensor([7.0, 0.03], dtype=torch.float64)[:, None]
    inputs = (x, y, mass * a, mass * b, eps)
    check(emulators["alone"], TEAMS["alone"], inputs, Schedule(max_iter=6), op=op)


OPTIONS: dict[str, dict[str, Any]] = {
    "anneal": {"start": torch.tensor([4.0, 0.1]), "factor": 0.4, "max_iter": 3},
    "temperatures": {"temperatures": torch.tensor([2.0, 0.5, 0.3]), "max_iter": 3, "tol": 1e-1},
    "both": {"temperatures": torch.tensor([2.0]), "start": torch.tensor([1.0, 1.0]), "factor": 0.5},
    "reach": {"rho": (0.5, 0.5), "max_iter": 7, "tol": 1e-4},
    "reach of x": {"rho": (0.3, None), "max_iter": 7},
    "reach of y": {"rho": (None, 2.0), "start": torch.tensor([1.0, 1.0]), "factor": 0.3},
    "relax": {"relax": 1.4, "max_iter": 8},
    "relax and reach": {"relax": 0.7, "rho": (1.0, 3.0), "max_iter": 6},
}


@pytest.mark.pairwise
@DTYPES
@pytest.mark.parametrize("op", ["solve", "direct"])
@pytest.mark.parametrize("team", ["alone", "cluster"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(
    emulators: dict[str, Emulator],
    options: dict[str, Any],
    team: str,
    op: str,
    dtype: torch.dtype,
) -> None:
    inputs = make(2, 8, 11, 3, dtype)
    schedule = Schedule(**{"max_iter": 5} | options)
    check(emulators[team], TEAMS[team], inputs, schedule, op=op)
    check(emulators[team], TEAMS[team], inputs, schedule, op=op, diagonal=-1)


SYMMETRIC: dict[str, dict[str, Any]] = {
    "one": {"max_iter": 1},
    "many": {"max_iter": 12},
    "tol": {"max_iter": 30, "tol": 1e-2},
    "a small tol": {"max_iter": 4, "tol": 1e-4},
    "anneal": {"start": torch.tensor([4.0, 0.1]), "factor": 0.4, "max_iter": 3},
    "temperatures": {"temperatures": torch.tensor([2.0, 0.5]), "tol": 0.05, "max_iter": 9},
    "reach": {"rho": (0.5, 0.5), "max_iter": 7, "tol": 1e-3},
    "short reach": {"rho": (0.01, 0.01), "max_iter": 5},
}


@pytest.mark.pairwise
@DTYPES
@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("op", ["solve", "direct"])
@pytest.mark.parametrize("options", SYMMETRIC.values(), ids=SYMMETRIC)
def test_symmetric_updates(
    emulators: dict[str, Emulator],
    options: dict[str, Any],
    op: str,
    team: str,
    dtype: torch.dtype,
) -> None:
    check_symmetric(emulators[team], TEAMS[team], options, op, dtype)


def check_symmetric(
    run: Emulator, how: tuple[int, int], options: dict[str, Any], op: str, dtype: torch.dtype
) -> None:
    """With two potentials, and with one of x and x; also from a start, and without a diagonal."""
    x, y, a, b, eps = make(2, 8, 11, 3, dtype)
    schedule = Schedule(**options, relax=0.5, simultaneous=True)
    check(run, how, (x, y, a, b, eps), schedule, op=op)
    f0, g0 = torch.randn(2, 8).to(dtype), torch.randn(2, 11).to(dtype)
    check(run, how, (x, y, a, b, eps), schedule, op=op, f0=f0, g0=g0)
    if options.get("rho", (None, None)) == (0.5, 0.5):
        check(run, how, (x, y, a, b, eps), replace(schedule, rho=(None, 2.0)), op=op)
    schedule = replace(schedule, single=True)
    for diagonal in (None, 0):
        f, g, *_ = check(run, how, (x, x, a, a, eps), schedule, op=op, diagonal=diagonal)
        assert torch.equal(f, g)


@DTYPES
@pytest.mark.parametrize("team", TEAMS)
def test_symmetric_updates_when_cold(
    emulators: dict[str, Emulator], team: str, dtype: torch.dtype
) -> None:
    """Costs of 1e4 eps: averages are far from what K is normalised to."""
    x, y, a, b, eps = make(1, 9, 14, 3, dtype)
    for inputs, single in (((x, y, a, b, eps / 500), False), ((x, x, a, a, eps / 500), True)):
        schedule = Schedule(max_iter=6, relax=0.5, simultaneous=True, single=single)
        check_cold(emulators[team], TEAMS[team], inputs, schedule)


@DTYPES
@pytest.mark.parametrize("op", ["solve", "direct"])
def test_starts(emulators: dict[str, Emulator], op: str, dtype: torch.dtype) -> None:
    inputs = make(2, 8, 11, 2, dtype)
    f0, g0 = torch.randn(2, 8).to(dtype), torch.randn(2, 11).to(dtype)
    for schedule in (Schedule(max_iter=1), Schedule(max_iter=3, relax=1.2)):
        check(emulators["alone"], TEAMS["alone"], inputs, schedule, op=op, f0=f0, g0=g0)
        # So far off that sums around the old potentials overflow, and residuals are rounding.
        far = {"f0": 1e4 * f0, "g0": 1e4 * g0}
        actual = solve_emulated(emulators["alone"], TEAMS["alone"], inputs, schedule, op=op, **far)
        expected = exact(inputs, schedule, **far)
        assert_contract("potential", actual[0], expected[0], scale=far["g0"])
        assert_contract("potential", actual[1], expected[1], scale=far["g0"])


@DTYPES
@pytest.mark.parametrize("op", ["solve", "direct"])
@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_columns_far_from_their_penalty(
    emulators: dict[str, Emulator], shift: float, op: str, dtype: torch.dtype
) -> None:
    """Rows follow the start, so that columns are balanced, and step by 2^144 at once.

    Values are not compared: exp(-g / rho) is up to e^100 in them.
    """
    x, y, a, b, _ = make(1, 8, 11, 2, dtype)
    g0 = torch.full((1, 11), shift, dtype=dtype)
    inputs = (x, y, a, b, torch.tensor([0.005], dtype=dtype))
    options: dict[str, Any] = {"max_iter": 5, "rho": (None, 0.005)}
    for schedule in (
        Schedule(**options),
        Schedule(**options, relax=0.5, simultaneous=True),
    ):
        actual = solve_emulated(emulators["alone"], TEAMS["alone"], inputs, schedule, op=op, g0=g0)
        expected = exact(inputs, schedule, g0=g0)
        assert_contract("potential", actual[0], expected[0], scale=g0.abs().max())
        assert_contract("potential", actual[1], expected[1], scale=g0.abs().max())


@pytest.mark.parametrize("op", ["solve", "direct"])
@pytest.mark.parametrize("team", ["alone", "cluster"])
@pytest.mark.parametrize("update", [{"relax": 0.5, "simultaneous": True}, {"relax": 1.5}], ids=str)
def test_outliers_under_averaged_and_relaxed_updates(
    emulators: dict[str, Emulator], update: dict[str, Any], team: str, op: str
) -> None:
    """Sums of columns, or what rows weigh in them, leave the range of floats in each iteration."""
    run, how = emulators[team], TEAMS[team]
    x, y = torch.tensor([[[0.0], [0.1]]]), torch.tensor([[[0.0], [7.0]]])
    half = torch.full((1, 2), 0.5)
    for dtype, eps, rho in ((torch.float32, 0.3, 1.0), (torch.float64, 0.01, 0.1)):
        inputs = tuple(t.to(dtype) for t in (x, y, half, half, torch.tensor([eps])))
        for iterations in (1, 2, 5):
            schedule = Schedule(max_iter=iterations, rho=(rho, rho), **update)
            check(run, how, inputs, schedule, op=op)
        one, apart = torch.zeros(1, 1, 1), torch.tensor([[[0.0], [3**0.5]]])
        start = {"f0": torch.full((1, 1), 2.0), "g0": torch.zeros(1, 2)}
        weights = torch.ones(1, 1), half
        inputs = tuple(t.to(dtype) for t in (one, apart, *weights, torch.tensor([eps / 15])))
        found = solve_emulated(run, how, inputs, Schedule(max_iter=1, **update), op=op, **start)
        true = exact(inputs, Schedule(max_iter=1, **update), **start)
        for mine, other in zip(found[:2], true[:2], strict=True):
            assert_contract("potential", mine, other, scale=torch.tensor(3.0))


@pytest.mark.parametrize("op", ["solve", "direct"])
@pytest.mark.parametrize("team", TEAMS)
def test_weights_below_normal_numbers(emulators: dict[str, Emulator], team: str, op: str) -> None:
    """A device takes their logarithm for -inf: their points have potentials, and no mass."""
    x, y, a, b, eps = make(2, 8, 11, 3, torch.float32)
    a[:, 1], b[:, 3] = 1e-39, 1e-42
    run, how, schedule = emulators[team], TEAMS[team], Schedule(max_iter=6)
    check(run, how, (x, y, a, b, eps), schedule, op=op)
    schedule = Schedule(max_iter=6, relax=0.5, simultaneous=True)
    check(run, how, (x, y, a, b, eps), schedule, op=op)
    check(run, how, (x, x, a, a, eps), replace(schedule, single=True), op=op)


KINDS = ("potential", "potential", "value", "plan")  # of f, g, value, residual
WITHOUT_PARTNER: dict[str, dict[str, Any]] = {
    "plain": {"tol": 1e-3},
    "relax": {"relax": 1.4},
    "reach": {"rho": (0.5, 0.7)},
    "reach of x": {"rho": (0.5, None), "relax": 0.7},
    "reach of y": {"rho": (None, 0.5), "start": torch.tensor([4.0, 0.1]), "factor": 0.4},
    "symmetric": {"relax": 0.5, "simultaneous": True, "tol": 1e-3},
    "symmetric, reach": {"relax": 0.5, "simultaneous": True, "rho": (0.5, None)},
    "temperatures": {"temperatures": torch.tensor([1e3, 0.1])},
}


def check_partners(
    run: Emulator, how: tuple[int, int], inputs: tuple[Tensor, ...], schedule: Schedule, **more: Any
) -> Tensor:
    """A problem has its plan, or the value inf, of which all else is only no NaN."""
    actual = solve_emulated(run, how, inputs, schedule, **more)
    more.pop("op")
    expected = exact(inputs, schedule, **more)
    scale = reference.cost_matrix(*wide(inputs[:2]), "sqeuclidean").max()
    assert torch.equal(actual[2].isinf(), expected[2].isinf())
    for found, true, kind in zip(actual, expected, KINDS, strict=False):
        assert not found.isnan().any()
        met = expected[2].isfinite().reshape(-1, *[1] * (true.ndim - 1))
        far = true.abs().isfinite() & (true.abs() > 1e15)  # as that of a point without a partner
        assert (found[far] * true[far].sign() > 1e15).all()
        found, true = (torch.where(met & ~far, t, 0) for t in (found, true))
        assert_contract(kind, found, true, scale=torch.ones(1) if kind == "plan" else scale)
    assert torch.equal(actual[4], expected[4])
    assert torch.equal(actual[5], expected[5])
    return actual[2]


@DTYPES
@pytest.mark.parametrize("op", ["solve", "direct"])
@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("options", WITHOUT_PARTNER.values(), ids=WITHOUT_PARTNER)
def test_points_without_a_partner(
    emulators: dict[str, Emulator],
    options: dict[str, Any],
    team: str,
    op: str,
    dtype: torch.dtype,
) -> None:
    """All weight at one point, whose pair with the point opposite is left out."""
    x, y, a, b, eps = make(2, 8, 11, 3, dtype)
    run, how, schedule = emulators[team], TEAMS[team], Schedule(**{"max_iter": 6} | options)
    only_x, only_y = torch.zeros_like(a), torch.zeros_like(b)
    only_x[:, 3] = only_y[:, 2] = 1
    for weights in ((only_x, b), (a, only_y), (only_x, only_y)):
        inputs = (x, y, *weights, eps)
        value = check_partners(run, how, inputs, schedule, op=op, diagonal=-1)
        rho_x, rho_y = schedule.rho
        missed = weights[0] is only_x and rho_y is None, weights[1] is only_y and rho_x is None
        assert value.isinf().tolist() == [any(missed)] * 2
    b = b.clone()
    b[:, 2] = 0  # nothing is asked of the point without a partner
    value = check_partners(run, how, (x, y, only_x, b, eps), schedule, op=op, diagonal=-1)
    assert value.isfinite().all()
    if schedule.simultaneous:
        one = replace(schedule, single=True, rho=(schedule.rho[0],) * 2)
        check_partners(run, how, (x, x, only_x, only_x, eps), one, op=op, diagonal=0)


@DTYPES
@pytest.mark.parametrize("op", ["solve", "direct"])
@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("update", [{}, {"relax": 0.5, "simultaneous": True}], ids=str)
def test_a_tiny_weight_is_as_none(
    emulators: dict[str, Emulator], update: dict[str, Any], team: str, op: str, dtype: torch.dtype
) -> None:
    """The potential of a row that the L1 error does not see is a transform all the same."""
    x, y = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.0], [2.0], [3.0]]])
    b, eps = torch.full((1, 3), 1 / 3), torch.tensor([0.5])
    schedule = Schedule(tol=1e-6, max_iter=60, **update)
    for weight in (1e-30, 0.0):
        inputs = (t.to(dtype) for t in (x, y, torch.tensor([[1 - weight, weight]]), b, eps))
        f, _, _, residual, _, converged = solve_emulated(
            emulators[team], TEAMS[team], tuple(inputs), schedule, op=op
        )
        assert f[0, 1] - f[0, 0] == pytest.approx(-4.4597716, rel=1e-5)
        assert residual <= 1e-6
        assert converged


@DTYPES
@pytest.mark.parametrize("team", TEAMS)
def test_stop_is_per_problem(emulators: dict[str, Emulator], team: str, dtype: torch.dtype) -> None:
    x, y, a, b, eps = make(3, 8, 11, 2, dtype)
    schedule = Schedule(max_iter=25, tol=1e-3)
    actual = check(emulators[team], TEAMS[team], (x, y, a, b, 5 * eps), schedule)
    assert len(set(actual[4].tolist())) == 3


@DTYPES
@pytest.mark.parametrize("team", TEAMS)
def test_cold_and_far(emulators: dict[str, Emulator], team: str, dtype: torch.dtype) -> None:
    """Costs of 1e4 eps: scalings leave their range, and columns underflow, in every iteration."""
    x, y, a, b, eps = make(1, 9, 14, 3, dtype)
    inputs = (x + 1000, y + 1000, a, b, eps / 500)
    schedule = Schedule(max_iter=4)
    check_cold(emulators[team], TEAMS[team], inputs, schedule)


@pytest.mark.parametrize("team", TEAMS)
def test_colder_by_and_by(emulators: dict[str, Emulator], team: str) -> None:
    """Scalings drift: K is taken anew once in a while, and in between iterations have none."""
    x, y, a, b, eps = make(1, 12, 16, 2, torch.float32)
    schedule = Schedule(max_iter=40)
    check(emulators[team], TEAMS[team], (x, y, a, b, 0.05 * eps), schedule)


# Aligned to 16 bytes or not, with a last stage that is part empty, and many stages.
TENSOR_SHAPES = [(2, 13, 50, 33), (1, 16, 7, 20), (1, 11, 50, 260)]


@pytest.mark.pairwise
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("team", WIDE)
@pytest.mark.parametrize("shape", TENSOR_SHAPES, ids=str)
def test_tensor_cores(
    emulators: dict[str, Emulator], shape: tuple[int, ...], team: str, cost: str
) -> None:
    """Far from the origin, and with equal points, whose root is all cancellation."""
    x, y, *rest = make(*shape, torch.float32)
    inputs = (x + 30, y + 30, *rest)
    run, how = emulators[team], WIDE[team]
    found = check(run, how, inputs, Schedule(max_iter=5), cost=cost)
    one = solve_emulated(run, how, inputs, Schedule(max_iter=5), cost=cost, precision="tf32")
    expected = exact(inputs, Schedule(max_iter=5), cost=cost)
    worse = error("potential", one[0], expected[0]), error("potential", found[0], expected[0])
    # 2^-9 of |x|^2 + |y|^2, a root of which is off by more.
    assert 4 * worse[1] < worse[0] < (1e-2 if cost == "euclidean" else 2e-3)
    plain = solve_emulated(run, how, inputs, Schedule(max_iter=5), cost=cost, precision="float32")
    assert_contract("potential", plain[0], expected[0], scale=expected[0])


def test_far_padding_on_tensor_cores(emulators: dict[str, Emulator]) -> None:
    """Squares are expanded about a point with weight."""
    x, y, a, b, eps = make(1, 13, 50, 33, torch.float32)
    a[:, 0] = 0
    far = x.clone(), y.clone()
    far[0][a == 0] = far[1][b == 0] = 1e6
    schedule = Schedule(max_iter=5)
    found = solve_emulated(emulators["wide"], WIDE["wide"], (*far, a, b, eps), schedule)
    expected = exact((x, y, a, b, eps), schedule)
    scale = reference.cost_matrix(*wide((x, y)), "sqeuclidean").max()
    assert_contract("value", found[2], expected[2], scale=scale)
    for mine, true, w in ((found[0], expected[0], a), (found[1], expected[1], b)):
        assert_contract("potential", mine[w > 0], true[w > 0], scale=scale)


@pytest.mark.parametrize("op", ["solve", "direct"])
def test_potentials_beyond_the_digits_of_floats(emulators: dict[str, Emulator], op: str) -> None:
    x, y, a, b, eps = make(1, 8, 11, 3, torch.float32)
    inputs = (x, y, a, b, eps * 1e-8)
    found = solve_emulated(
        emulators["alone"], TEAMS["alone"], inputs, Schedule(max_iter=2, tol=1e9), op=op
    )
    assert found[3] == torch.inf
    assert not found[5]


def test_halves_have_the_range_of_floats(emulators: dict[str, Emulator]) -> None:
    """Powers of 2 change no bit, though halves reach from 2^-24 to 2^16."""
    x, y, a, b, eps = make(1, 11, 40, 33, torch.float32)
    schedule = Schedule(max_iter=3)
    plain = solve_emulated(emulators["wide"], WIDE["wide"], (x, y, a, b, eps), schedule)
    for size in (2.0**25, 2.0**-25):
        inputs = (size * x, size * y, a, b, size**2 * eps)
        scaled = solve_emulated(emulators["wide"], WIDE["wide"], inputs, schedule)
        assert torch.equal(scaled[0], size**2 * plain[0])
        assert torch.equal(scaled[1], size**2 * plain[1])


def test_nan_stays_in_its_problem(emulators: dict[str, Emulator]) -> None:
    x, *rest = make(2, 5, 6, 2, torch.float32)
    schedule = Schedule(max_iter=5, tol=1e-3)
    clean = solve_emulated(emulators["alone"], TEAMS["alone"], (x, *rest), schedule)
    x[0, 3, 0] = torch.nan
    for team, how in TEAMS.items():
        actual = solve_emulated(emulators[team], how, (x, *rest), schedule)
        assert actual[2].isnan().tolist() == [True, False]
        assert actual[5].tolist()[0] is False
        assert_contract("potential", actual[0][1], clean[0][1].double())


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("team", "dtype"),
    [
        pytest.param(*case, id=f"{case[0]}-{'f64' if case[1] == torch.float64 else 'f32'}")
        for case in itertools.product(["alone", "block", "wide"], [torch.float64, torch.float32])
        if case != ("wide", torch.float64)  # tensor cores take float32
    ],
)
@pytest.mark.parametrize("form", ["split", "joint"])
@pytest.mark.parametrize("counts", [(6, 5, 0), (6, 5, 4)], ids=str)
def test_drift(
    emulators: dict[str, Emulator],
    counts: tuple[int, int, int],
    form: str,
    team: str,
    dtype: torch.dtype,
) -> None:
    groups, n, d, temperatures = 2, 5, 135, 2
    joint = form == "joint"
    rng = torch.Generator().manual_seed(sum(counts) + joint)
    x, *clouds = (
        (torch.randn(groups, c, d, generator=rng, dtype=torch.float64) + 5).to(dtype)
        for c in (n, *counts)
    )
    weights = torch.rand(groups, sum(counts), generator=rng, dtype=torch.float64).to(dtype)
    weights[:, 1] = 0
    guidance = torch.tensor([0.5, 2.0], dtype=dtype) * (counts[2] > 0)
    eps = torch.tensor([0.1, 1.0], dtype=dtype)
    scale, unit = 1.3, 1.3**2 * d
    plans = 1 if joint else 2 + (counts[2] > 0)
    for diagonal, cost in ((None, "half_sqeuclidean"), (1, "euclidean")):
        request = header(
            "drift",
            dtype,
            (TEAMS | WIDE)[team],
            batch=groups,
            n=n,
            m=counts[0],
            d=d,
            cost=cost,
            diagonal=diagonal,
            max_iter=6,
            flags=(counts[1], counts[2], temperatures, int(joint)),
            numbers=(scale, 0.0, unit, 0.0, 0.0, 0.0),
        )
        answer = emulators[team](request + arrays(x, *clouds, weights, guidance, eps))
        metric = (dtype, (temperatures, groups, plans))
        velocity, squares, distances, pairs, *metrics = split(
            answer,
            (dtype, (temperatures, groups, n, d)),
            (dtype, (temperatures, groups)),
            *[(torch.float64, (groups,))] * 2,
            *[metric] * 3,
        )
        points = [t.double() for t in (x, *clouds)]
        # In units of `scale` only the velocity changes: the cost and eps are those of the points.
        expected = drift_reference.drift(
            *points[:3],
            points[3] if counts[2] > 0 else None,
            weights.double(),
            guidance.double(),
            eps.double() * unit,
            cost=cost,
            max_iter=6,
            joint=joint,
            scaled=False,
            unit=False,
            diagonal=diagonal,
        )
        counted = points[1 : 1 + (sum(c > 0 for c in counts) if joint else 2)]
        columns = torch.cat(counted, 1)
        w = weights.double()[:, : columns.shape[1]]
        if diagonal is None:
            columns, w = (
                torch.cat([points[0], columns], 1),
                torch.cat([torch.ones(groups, n), w], 1),
            )
        size = torch.cdist(points[0], columns)
        size = size if cost == "euclidean" else size.square()
        torch.testing.assert_close(distances, (w[:, None] * size).sum((1, 2)), rtol=1e-5, atol=0)
        torch.testing.assert_close(pairs, n * w.sum(1), rtol=1e-6, atol=0)
        assert_contract("gradient", velocity, expected[0] / scale)
        sums = (expected[0] / scale).square().sum((2, 3))
        assert_contract("gradient", squares, sums)
        for mine, true in zip(metrics, expected[3:], strict=True):
            assert_contract("plan", mine, true, scale=true.max().clamp_min(1.0))
