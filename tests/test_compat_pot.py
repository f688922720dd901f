"""`fewstep.compat.pot` against POT, and what POT is not right about."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.compat import pot, pot_plans, pot_solve
from fewstep.ops.sinkhorn.convergence import ConvergenceWarning

ot = pytest.importorskip("ot", reason="needs POT")
Array = np.ndarray[Any, Any]
N, M = 12, 17
MANY = {"stopThr": 1e-14, "numItermax": 5000}
PARTS = ("value", "value_linear", "plan", "potential_a", "potential_b", "marginal_a", "marginal_b")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def problem(seed: int = 0) -> tuple[Array, Array, Array, Array, Array]:
    """a, b, costs, and the points they are of."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(N, 2)), rng.normal(size=(M, 2)) + 0.5
    a, b = rng.random(N) + 0.1, rng.random(M) + 0.1
    return a / a.sum(), b / b.sum(), ot.dist(x, y), x, y


def close(found: Any, expected: Any, bound: float = 1e-9) -> None:
    assert type(found) is type(expected)
    assert np.shape(found) == np.shape(expected)
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("mass", [1.0, 3.0])
@pytest.mark.parametrize("method", pot_plans.SCALINGS + pot_plans.DUALS)
def test_plans_and_costs(method: str, mass: float) -> None:
    a, b, C, *_ = problem()
    options = {"method": method, **MANY}
    plan, log = ot.sinkhorn(mass * a, mass * b, C, 1.0, log=True, **options)
    found, own = pot.sinkhorn(mass * a, mass * b, C, 1.0, log=True, **options)
    close(found, plan)
    if method in pot_plans.SCALINGS:
        for name in ("u", "v", "log_u", "log_v"):
            if name in log:
                close(own[name], log[name])
    assert set(log) - {"warmstart"} <= set(own)
    if method != "sinkhorn_epsilon_scaling":
        close(
            pot.sinkhorn2(mass * a, mass * b, C, 1.0, **options),
            ot.sinkhorn2(mass * a, mass * b, C, 1.0, **options),
        )


@pytest.mark.parametrize("method", pot_plans.SCALINGS)
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.filterwarnings("ignore:Sinkhorn did not converge")
def test_every_iterate(method: str, steps: int) -> None:
    a, b, C, *_ = problem()
    options = {"method": method, "numItermax": steps, "log": True, "reg": 0.2}
    plan, log = ot.sinkhorn(a, b, C, **options)
    with pytest.warns(ConvergenceWarning, match="sinkhorn: not converged"):
        found, own = pot.sinkhorn(a, b, C, **options)
    close(found, plan)
    assert own["niter"] == log["niter"]
    for name in ("u", "v"):
        np.testing.assert_allclose(own[name], log[name], rtol=1e-9)
    names = ("log_u", "log_v") if method == "sinkhorn_log" else ("u", "v")
    start = tuple(log[name] if method == "sinkhorn_log" else np.log(log[name]) for name in names)
    more = options | {"warmstart": start, "warn": False}
    close(pot.sinkhorn(a, b, C, **more)[0], ot.sinkhorn(a, b, C, **more)[0])


@pytest.mark.parametrize("method", [*pot_plans.SCALINGS, "sinkhorn_stabilized"])
def test_several_histograms(method: str) -> None:
    a, b, C, *_ = problem()
    both = np.stack([b, b[::-1]], 1)
    options = {"method": method, **MANY}
    close(pot.sinkhorn(a, both, C, 1.0, **options), ot.sinkhorn(a, both, C, 1.0, **options))
    costs, log = pot.sinkhorn2(a, both, C, 1.0, log=True, **options)
    single = [ot.sinkhorn2(a, both[:, k], C, 1.0, method="sinkhorn_log", **MANY) for k in (0, 1)]
    close(costs, np.array(single))
    assert log["v" if method in pot_plans.SCALINGS else "beta"].shape == (M, 2)


@pytest.mark.parametrize("method", pot_plans.UNBALANCED)
@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
@pytest.mark.parametrize("reg_m", [0.7, (0.7,), [0.5, 2.0], (0.5, math.inf), math.inf])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.filterwarnings("ignore:If reg_type = entropy", "ignore:Stabilized Unbalanced")
def test_unbalanced(method: str, reg_type: str, reg_m: Any, given: bool) -> None:
    a, b, C, *_ = problem()
    a = a if reg_m == math.inf else 2 * a
    c = np.random.default_rng(1).random((N, M)) + 0.1 if given else None
    options = {"reg": 0.5, "reg_m": reg_m, "reg_type": reg_type, "c": c, "log": True}
    options |= {"stopThr": 1e-15, "numItermax": 5000}
    # By Knopp's method: the translation invariant one has another limit for two penalties.
    right = "sinkhorn" if method == "sinkhorn_translation_invariant" else method
    plan, log = ot.sinkhorn_unbalanced(a, b, C, method=right, **options)
    found, own = pot.sinkhorn_unbalanced(a, b, C, method=method, **options)
    close(found, plan, 1e-8)
    assert set(own) == set(log)
    for name in ("cost", "total_cost"):
        close(own[name], log[name], 1e-8)
    if reg_m != math.inf or method == "sinkhorn":  # else known up to a constant
        for name in ("logu", "logv"):
            close(own[name], log[name], 1e-7)
    for cost, name in (("linear", "cost"), ("total", "total_cost")):
        value = pot.sinkhorn_unbalanced2(a, b, C, method=method, returnCost=cost, **options)[0]
        close(value, log[name], 1e-8)


def test_translation_invariant_updates_of_pot_have_another_limit() -> None:
    """The objective's fixed point, by which Knopp's method and this are right."""
    a, b, C, *_ = problem()
    options = {"method": "sinkhorn_translation_invariant", "stopThr": 1e-15, "log": True}
    first, second, reg = 0.5, 2.0, 0.5

    def off(log: dict[str, Any]) -> float:
        e = np.exp(log["logv"] - C / reg) * a[:, None] * b
        return float(np.abs(log["logu"] - first / (first + reg) * np.log(a / e.sum(1))).max())

    _, mine = pot.sinkhorn_unbalanced(2 * a, b, C, reg, (first, second), **options)
    _, its = ot.sinkhorn_unbalanced(2 * a, b, C, reg, (first, second), **options)
    a = 2 * a
    assert off(mine) < 1e-9
    assert off(its) > 1e-3


@pytest.mark.filterwarnings("ignore:sinkhorn_unbalanced. not converged")
def test_unbalanced_histograms_and_unconverged_iterates() -> None:
    a, b, C, *_ = problem()
    both = np.stack([b, 3 * b[::-1]], 1)
    for steps in (3, 5000):
        options = {"stopThr": 1e-15, "numItermax": steps, "reg": 0.5, "reg_m": 0.7}
        expected = ot.sinkhorn_unbalanced(2 * a, both, C, **options)
        close(pot.sinkhorn_unbalanced(2 * a, both, C, **options), expected)
        log = pot.sinkhorn_unbalanced(2 * a, b, C, **options, log=True)[1]
        close(log["logu"], ot.sinkhorn_unbalanced(2 * a, b, C, **options, log=True)[1]["logu"])
        more = options | {"warmstart": (np.full(N, 0.3), np.linspace(0, 1, M))}
        close(pot.sinkhorn_unbalanced(a, b, C, **more), ot.sinkhorn_unbalanced(a, b, C, **more))


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
@pytest.mark.parametrize("mass", [1.0, 2.5])
@pytest.mark.parametrize("unbalanced", [None, 0.8, (0.4, 2.0)])
def test_solve(reg_type: str, mass: float, unbalanced: Any) -> None:
    a, b, C, *_ = problem()
    options = {"reg": 0.5, "reg_type": reg_type, "tol": 1e-14, "max_iter": 5000}
    options["unbalanced"] = unbalanced
    if unbalanced is not None and reg_type == "entropy":
        with pytest.raises(NotImplementedError, match="reg_type='entropy'"):
            pot.solve(C, mass * a, mass * b, **options)
        return
    expected = ot.solve(C, mass * a, mass * b, **options)
    found = pot.solve(C, mass * a, mass * b, **options)
    for name in PARTS:
        close(getattr(found, name), getattr(expected, name), 1e-8)
    assert found.status == "Converged"
    assert "value=" in repr(found)
    close(pot.solve(C, **options).plan, ot.solve(C, **options).plan, 1e-8)


@pytest.mark.parametrize("metric", pot_solve.METRICS)
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_solve_sample(metric: str, debias: bool, lazy: bool) -> None:
    a, b, _, x, y = problem()
    options = {"metric": metric, "reg": 0.5, "tol": 1e-14, "max_iter": 5000, "debias": debias}
    expected = ot.solve_sample(x, y, a, b, **options)
    found = pot.solve_sample(x, y, a, b, lazy=lazy, **options)
    for name in PARTS[:5]:
        close(getattr(found, name), getattr(expected, name), 1e-8)
    if debias:
        for name, part in expected.log.items():
            close(found.log[name].value, part.value, 1e-8)


@pytest.mark.parametrize("reg_type", ["entropy", "kl"])
@pytest.mark.parametrize("method", ["auto", "log_sinkhorn", "sinkhorn"])
def test_batches(reg_type: str, method: str) -> None:
    parts = [problem(seed) for seed in range(3)]
    a, b, C, x, y = (np.stack(part) for part in zip(*parts, strict=True))
    options = {"reg": 0.5, "tol": 1e-14, "max_iter": 5000, "method": method, "reg_type": reg_type}
    expected, found = (
        ot.solve_batch(C, a=a, b=b, **options),
        pot.solve_batch(C, a=a, b=b, **options),
    )
    for name in PARTS[:5]:
        close(getattr(found, name), getattr(expected, name), 1e-8)
    for metric in ({}, {"metric": "euclidean"}, {"metric": "minkowski", "p": 1}):
        expected = ot.solve_sample_batch(x, y, a=a, b=b, **metric, **options)
        found = pot.solve_sample_batch(x, y, a=a, b=b, **metric, **options)
        for name in PARTS[:3]:
            close(getattr(found, name), getattr(expected, name), 1e-8)


def leaves(*arrays: Array) -> list[torch.Tensor]:
    return [torch.tensor(t, requires_grad=True) for t in arrays]


def test_gradients_of_plans_and_costs_are_those_through_pots_iterations() -> None:
    a, b, C, *_ = problem()
    weights = torch.rand(N, M, dtype=torch.float64)

    def grads(make: Callable[..., Any], *data: torch.Tensor) -> list[torch.Tensor]:
        out = list(torch.autograd.grad(make(*data), data))
        # Directions along a and b that keep the mass.
        return [t if t.ndim == 2 else t - t.mean() for t in out]

    for make in (
        lambda lib: lambda a, b, C: (lib.sinkhorn(a, b, C, 1.0, **MANY) * weights).sum(),
        lambda lib: lambda a, b, C: lib.sinkhorn2(a, b, C, 1.0, method="sinkhorn_log", **MANY),
        lambda lib: lambda a, b, C: lib.solve(C, a, b, reg=1.0, tol=1e-14).value,
        lambda lib: (
            lambda a, b, C: lib.solve(C, a, b, reg=1.0, tol=1e-14, reg_type="entropy").value
        ),
        lambda lib: lambda a, b, C: lib.solve(C, a, b, reg=1.0, tol=1e-14).value_linear,
    ):
        for mine, its in zip(
            grads(make(pot), *leaves(a, b, C)), grads(make(ot), *leaves(a, b, C)), strict=True
        ):
            assert torch.allclose(mine, its, rtol=1e-6, atol=1e-8)
    for make in (
        lambda lib: lambda a, b, C: lib.solve(C, a, b, reg=1.0, unbalanced=0.7, tol=1e-14).value,
        lambda lib: lambda a, b, C: lib.sinkhorn_unbalanced2(a, b, C, 1.0, (0.7, 2), stopThr=1e-14),
    ):
        free = [leaves(2 * a, b, C) for _ in range(2)]
        mine, its = (
            torch.autograd.grad(make(lib)(*data), data)
            for lib, data in zip((pot, ot), free, strict=True)
        )
        for own, known in zip(mine, its, strict=True):
            assert torch.allclose(own, known, rtol=1e-6, atol=1e-8)


def test_envelope_gradients_are_the_derivatives_of_the_value() -> None:
    """POT's for a of "KL" is that of "entropy", and its batches have none for a and b."""
    a, b, C, *_ = problem()
    options = {"reg": 0.5, "tol": 1e-14, "max_iter": 5000, "grad": "envelope"}
    way = torch.tensor(np.random.default_rng(2).normal(size=N))
    way -= way.mean()
    for reg_type in ("KL", "entropy"):
        at, bt, Ct = leaves(a, b, C)
        found = pot.solve(Ct, at, bt, reg_type=reg_type, **options)
        assert not found.plan.requires_grad
        assert not found.value_linear.requires_grad
        grads = torch.autograd.grad(found.value, (at, Ct))
        close(grads[1].numpy(), found.plan.numpy())
        sides = [
            ot.solve(C, a + s * way.numpy(), b, reg_type=reg_type, **options).value
            for s in (1e-5, -1e-5)
        ]
        slope = (sides[0] - sides[1]) / 2e-5
        assert (grads[0] * way).sum().item() == pytest.approx(slope, rel=1e-6)
        theirs = leaves(a, b, C)
        (its,) = torch.autograd.grad(
            ot.solve(theirs[2], theirs[0], theirs[1], reg_type=reg_type, **options).value, theirs[0]
        )
        right = (its * way).sum().item() == pytest.approx(slope, rel=1e-6)
        assert right == (reg_type == "entropy")
        (batched,) = torch.autograd.grad(
            pot.solve_batch(Ct[None], 0.5, at[None], bt[None], tol=1e-14, max_iter=5000,
                            reg_type=reg_type.lower()).value.sum(), at
        )  # fmt: skip
        assert torch.allclose(batched - batched.mean(), grads[0] - grads[0].mean())
    detached = pot.solve(Ct, at, bt, reg=0.5, grad="detach")
    assert not detached.value.requires_grad


def test_a_reference_measure_of_a_balanced_problem_counts() -> None:
    """It minimises POT's own objective, and POT's plan does not."""
    a, b, C, *_ = problem()
    c = np.random.default_rng(3).random((N, M)) + 0.1

    def objective(plan: Array) -> float:
        return float((plan * C).sum() + 0.5 * (plan * np.log(plan / c)).sum())

    options = {"reg": 0.5, "tol": 1e-14, "max_iter": 5000}
    mine, its = pot.solve(C, a, b, c=c, **options), ot.solve(C, a, b, c=c, **options)
    assert mine.value == pytest.approx(objective(mine.plan), rel=1e-10)
    assert objective(mine.plan) < objective(its.plan) - 1e-3
    close(mine.plan.sum(1), a)


def test_what_pot_says_nothing_of_warns() -> None:
    a, b, C, *_ = problem()
    for call in (
        lambda: pot.sinkhorn_unbalanced(a, b, C, 0.1, 10, numItermax=3),
        lambda: pot.solve(C, a, b, reg=0.1, unbalanced=10, max_iter=3),
        lambda: pot.solve_batch(C[None], 0.1, max_iter=3),
    ):
        with pytest.warns(ConvergenceWarning, match="not converged, the residual is"):
            call()
    one = pot.sinkhorn_unbalanced([0.2], [1.0], [[0.07]], 0.004, 10, numItermax=30000)
    exact = math.exp((0.004 * math.log(0.2) + 10 * math.log(0.2) - 0.07) / 20.004)
    assert one.item() == pytest.approx(exact, rel=1e-4)


def test_small_temperatures_converge() -> None:
    x = np.arange(20.0)[:, None]
    C = ot.dist(x, x + 0.3)
    u = pot.unif(20)
    with pytest.warns(UserWarning, match="numerical errors"):
        ot.sinkhorn(u, u, C * 1e4, 0.05, warn=False)
    plan = pot.sinkhorn(u, u, C * 1e4, 0.05)
    close(plan.sum(1), u)
    close(plan.diagonal(), u, 1e-6)
    loss = pot.sinkhorn2(u, u, C, 0.01, tau=1, method="sinkhorn_stabilized")
    assert loss == pytest.approx(pot.sinkhorn2(u, u, C, 0.01, method="sinkhorn_log"))


def test_arrays_tensors_lists_dtypes_and_defaults() -> None:
    a, b, C, *_ = problem()
    plan = pot.sinkhorn(a, b, C, 1.0)
    at, bt, Ct = (torch.tensor(t) for t in (a, b, C))
    assert torch.equal(pot.sinkhorn(at, bt, Ct, 1.0), torch.tensor(plan))
    close(pot.sinkhorn(list(a), list(b), C.tolist(), 1), plan)
    short = pot.sinkhorn(at.float(), bt.float(), Ct.float(), 1.0)
    assert short.dtype == torch.float32
    assert np.abs(short.numpy() - plan).max() < 1e-4 * plan.max()
    uniform = ot.sinkhorn([], [], C, 1.0)
    close(pot.sinkhorn([], [], C, 1.0), uniform, 1e-8)
    close(pot.sinkhorn(np.array([]), np.array([]), C, 1.0), uniform, 1e-8)
    integers = np.arange(6).reshape(2, 3)
    close(pot.sinkhorn([], [], integers, 1.0), ot.sinkhorn([], [], integers.astype(float), 1.0))
    close(pot.unif(5), ot.unif(5))
    padded = np.append(a, 0.0)
    more = np.vstack([C, np.full((1, M), np.inf)])
    close(pot.sinkhorn(padded, b, more, 1.0)[:N], plan, 1e-8)


# What POT's own tests ask of these functions.
@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
@pytest.mark.parametrize("method", [*pot_plans.UNBALANCED, "sinkhorn_reg_scaling"])
def test_fixed_points_of_unbalanced_problems(method: str, reg_type: str) -> None:
    rng = np.random.default_rng(42)
    x = torch.tensor(rng.normal(size=(100, 2)))
    a, b = torch.full((100,), 0.01).double(), torch.full((100,), 0.015).double()
    C = torch.cdist(x, x).square()
    plan, log = pot.sinkhorn_unbalanced(a, b, C, 1.0, 1.0, method, reg_type, log=True)
    own = (a[:, None] * b).log() if reg_type == "kl" else torch.zeros_like(C)
    u = (a.log() - torch.logsumexp(log["logv"] - C + own, 1)) / 2
    v = (b.log() - torch.logsumexp(log["logu"] - C.mT + own.mT, 1)) / 2
    assert torch.allclose(u, log["logu"], atol=1e-5)
    assert torch.allclose(v, log["logv"], atol=1e-5)
    loss = pot.sinkhorn_unbalanced2(a, b, C, 1.0, 1.0, method, reg_type)
    assert torch.allclose((plan * C).sum(), loss, atol=1e-5)
    zeros = torch.zeros(100).double()
    again = pot.sinkhorn_unbalanced(a, b, C, 1.0, 1.0, method, reg_type, warmstart=(zeros, zeros))
    assert torch.allclose(again, plan, atol=1e-5)


def test_batches_are_their_problems() -> None:
    C = np.random.default_rng(0).random((4, 16, 16))
    batch = pot.solve_batch(C, reg=0.1, max_iter=10000, tol=1e-7, grad="detach")
    for k in range(4):
        one = pot.solve(C[k], reg=0.1, max_iter=10000, tol=1e-7)
        np.testing.assert_allclose(one.plan, batch.plan[k], atol=1e-6)
        np.testing.assert_allclose(one.value_linear, batch.value_linear[k], atol=1e-5)


A, B, C = pot.unif(4), pot.unif(3), np.ones((4, 3))
UNSERVED: list[tuple[Callable[[], Any], str]] = [
    (lambda: pot.sinkhorn(A, B, C, 1, method="greenkhorn"), "method='greenkhorn'"),
    (lambda: pot.sinkhorn(A, B, C, 1, batch=2), "batch=2"),
    (lambda: pot.solve(C), "reg=None"),
    (lambda: pot.solve(C, reg=0), "reg=0"),
    (lambda: pot.solve(C, reg=1, reg_type="L2"), "reg_type='L2'"),
    (lambda: pot.solve(C, reg=1, unbalanced=1, unbalanced_type="TV"), "unbalanced_type='TV'"),
    (lambda: pot.solve(C, reg=1, method="mm"), "method='mm'"),
    (lambda: pot.solve(C, reg=1, grad="last_step"), "grad='last_step'"),
    (lambda: pot.solve(C, reg=1).lazy_plan, "lazy_plan"),
    (lambda: pot.solve_sample(C, C, reg=1, metric="chebyshev"), "metric='chebyshev'"),
    (lambda: pot.solve_sample(C, C, reg=1, debias="split"), "debias='split'"),
    (lambda: pot.solve_sample(C, C, reg=1, method="nystroem"), "method='nystroem'"),
    (lambda: pot.solve_batch(C[None], 1, method="proximal"), "method='proximal'"),
    (lambda: pot.solve_sample_batch(C[None], C[None], 1, metric="kl"), "metric='kl'"),
]
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: pot.sinkhorn(A, B, C, 0), ValueError, "reg must be positive and finite, got 0"),
    (lambda: pot.sinkhorn(2 * A, B, C, 1), ValueError, "2 and 1; sinkhorn_unbalanced takes any"),
    (lambda: pot.sinkhorn_unbalanced(2 * A, B, C, 1, math.inf), ValueError, "a finite reg_m takes"),
    (lambda: pot.solve(C, 2 * A, B, 1, unbalanced=math.inf), ValueError, "a finite penalty, unb"),
    (lambda: pot.sinkhorn(B, B, C, 1), ValueError, r"a must be \(4,\), got \(3,\)"),
    (lambda: pot.sinkhorn(-A, -B, C, 1), ValueError, "a must not be negative"),
    (lambda: pot.sinkhorn(A, B, C, 1, method="x"), ValueError, "method must be one of .* got 'x'"),
    (lambda: pot.sinkhorn(A, B, C, 1, numItermax=0), ValueError, "max_iter must be .* got 0"),
    (lambda: pot.sinkhorn(A, B, C, 1, stopThr=-1), ValueError, "tol must be at least 0, got -1"),
    (lambda: pot.sinkhorn(A, B, C[0], 1), ValueError, r"M must have 2 dimensions, got \(3,\)"),
    (lambda: pot.sinkhorn(A, torch.ones(3), C, 1), TypeError, "an array beside a Tensor"),
    (lambda: pot.sinkhorn_unbalanced(A, B, C, 1, -1), ValueError, "reg_m must be positive, got -1"),
    (lambda: pot.sinkhorn_unbalanced(A, B, C, 1, None), ValueError, "reg_m must be a number"),
    (lambda: pot.sinkhorn_unbalanced(A, B, C, 1, (1, 2, 3)), ValueError, "a number or a pair"),
    (lambda: pot.sinkhorn_unbalanced(A, B, C, 1, 1, c=C.T), ValueError, r"c must be \(4, 3\)"),
    (
        lambda: pot.sinkhorn_unbalanced2(A, B, C, 1, 1, returnCost="x"),
        ValueError,
        "returnCost must be one of",
    ),
    (lambda: pot.solve(C, reg=1, grad="x"), ValueError, "grad must be one of .* got 'x'"),
    (lambda: pot.solve_batch(C, 1), ValueError, r"M must have 3 dimensions, got \(4, 3\)"),
]


@pytest.mark.parametrize(("call", "message"), UNSERVED, ids=[m for _, m in UNSERVED])
def test_what_is_not_served(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        call()


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[m[:24] for *_, m in BAD])
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_every_parameter_of_pot_is_there() -> None:
    for name in set(pot.__all__) - {"OTResult", "unif"}:
        theirs = inspect.signature(getattr(ot, name)).parameters
        mine = inspect.signature(getattr(pot, name)).parameters
        assert list(mine) == list(theirs), name
        for key, parameter in theirs.items():
            assert mine[key].default == parameter.default, (name, key)
    assert pot.solve(C, reg=1).value_quad is ot.solve(C, reg=1).value_quad is None
