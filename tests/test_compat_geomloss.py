"""`fewstep.compat.geomloss` against geomloss itself, and what geomloss is not right about."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.compat.geomloss import SamplesLoss
from support.sinkhorn import clouds

Cost = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def original() -> Any:
    return pytest.importorskip("geomloss", reason="needs geomloss").SamplesLoss


def distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def halves(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, :, None] - y[:, None]).square().sum(-1) / 2


def problem(batched: bool, mass: float = 1.0) -> list[Tensor]:
    """x, y, a and b."""
    torch.manual_seed(1)
    data = clouds((3, 15, 21, 2))
    a, b = (mass * w / w.sum(1, keepdim=True) for w in (data["a"], data["b"]))
    out = [data["x"], data["y"] + 0.5, a, b]
    return [(t if batched else t[0]).detach().requires_grad_() for t in out]


def outcome(loss: torch.nn.Module, data: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    x, y, a, b = data
    value = loss(a, x, b, y)
    weights = torch.arange(1.0, value.numel() + 1).double().reshape(value.shape)
    return value.detach(), torch.autograd.grad((value * weights).sum(), data)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("reach", [None, 0.7])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("more", [{}, {"blur": 0.3, "scaling": 0.8, "diameter": 5.0}], ids=str)
def test_values_gradients_and_potentials(
    original: Any, batched: bool, debias: bool, reach: float | None, p: int, more: dict[str, Any]
) -> None:
    data = problem(batched)
    options = {"p": p, "reach": reach, "debias": debias, "blur": 0.05} | more
    # geomloss takes distances of 0 as 1e-4.
    theirs = {"backend": "tensorized", "cost": distances if p == 1 else None} | options
    value, grads = outcome(SamplesLoss(**options), data)
    expected, expected_grads = outcome(original(**theirs), data)
    close(value, expected)
    rho, eps = None if reach is None else reach**p, options["blur"] ** p
    off = 1.0 if rho is None else (rho + eps / 2) / (rho + eps)
    for k, (grad, known) in enumerate(zip(grads, expected_grads, strict=True)):
        if k < 2 or debias or rho is None:
            close(off * grad, known)
    x, y, a, b = data
    found = SamplesLoss(**options, potentials=True)(a, x, b, y)
    known = original(**theirs, potentials=True)(a, x, b, y)
    for mine, its in zip(found, known, strict=True):
        close(mine, its)
    sums = (sum((t * w).sum() for t, w in zip(ts, (a, b), strict=True)) for ts in (found, known))
    for mine, its in zip(*(torch.autograd.grad(t, (x, y)) for t in sums), strict=True):
        close(mine, its)


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("p", [1, 2])
def test_any_equal_masses(original: Any, p: int, debias: bool) -> None:
    data = problem(True, 3.7)
    options = {"p": p, "debias": debias, "cost": distances if p == 1 else None}
    value, grads = outcome(SamplesLoss(**options), data)
    expected, expected_grads = outcome(original(**options, backend="tensorized"), data)
    close(value, expected)
    for grad, known in zip(grads, expected_grads, strict=True):
        close(grad, known)


def test_weights_of_zero_columns_and_none(original: Any) -> None:
    x, y, a, b = (t.detach() for t in problem(False))
    a, b = a.clone(), b.clone()
    a[:3], b[5:9] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    for options in ({}, {"reach": 0.5}):
        mine, its = SamplesLoss(**options), original(**options, backend="tensorized")
        close(mine(a, x, b, y), its(a, x, b, y))
        close(mine(a[:, None], x, b[:, None], y), its(a[:, None], x, b[:, None], y))
        close(mine(x, y), its(x, y))
        many = (a[None, :, None], x[None], b[None, :, None], y[None])
        close(mine(*many), its(*many))
        close(mine(x[None], y[None]), its(x[None], y[None]))
        both = mine, its
        for loss in both:
            loss.potentials = True
        for f, known in zip(*(loss(a, x, b, y) for loss in both), strict=True):
            close(f, known)


@pytest.mark.parametrize("p", [1, 2, 1.5])
def test_costs_as_functions(original: Any, p: float) -> None:
    def cost(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, :, None] - y[:, None]).abs().sum(-1)

    data = problem(True)
    for options in ({"reach": 1.3}, {}):
        options = options | {"p": p, "cost": cost}
        value, grads = outcome(SamplesLoss(**options), data)
        expected, known = outcome(original(**options, backend="tensorized"), data)
        close(value, expected)
        rho, eps = options.get("reach", 0) ** p, 0.05**p
        off = (rho + eps / 2) / (rho + eps) if rho else 1.0
        for grad, its in zip(grads, known, strict=True):
            close(off * grad, its)


@pytest.mark.parametrize("p", [1, 2])
def test_the_last_step_stays_in_range(original: Any, p: int) -> None:
    """Potentials so far from converged that masses of rows under- and overflow."""
    x, y, *weights = problem(True)
    a, b = ((w + 0.01) / (w + 0.01).sum(1, keepdim=True) for w in weights)
    options = {"p": p, "blur": 1e-3, "scaling": 0.01, "potentials": True}
    cost = distances if p == 1 else halves
    found = SamplesLoss(**options)(a, x, b, y)
    for mine, its in zip(found, original(**options, cost=cost)(a, x, b, y), strict=True):
        close(mine, its)


@pytest.mark.parametrize("p", [1, 2])
def test_float32_keeps_its_accuracy(p: int) -> None:
    data = problem(True)
    short = [t.detach().float().requires_grad_() for t in data]
    value, grads = outcome(SamplesLoss(p=p), data)
    x, y, a, b = short
    found = SamplesLoss(p=p)(a, x, b, y)
    weights = torch.arange(1.0, 4)
    own = torch.autograd.grad((found * weights).sum(), short)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), value, rtol=1e-4, atol=1e-5)
    for grad, exact in zip(own[:2], grads, strict=False):
        assert (grad - exact).norm() < 1e-3 * exact.norm()
    half = SamplesLoss(p=p)(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, SamplesLoss(p=p)(x.bfloat16().float(), y.bfloat16().float()))


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("p", [1, 2])
def test_gradients_with_reach_are_those_of_the_converged_value(p: int, debias: bool) -> None:
    """Where geomloss is off, by finite differences in float64; for masses that are not 1 too."""
    x, y, a, b = problem(False)
    a, b = (0.1 + 1.7 * a.detach()).requires_grad_(), (0.01 + 0.6 * b.detach()).requires_grad_()
    # A hundred iterations at what is one temperature.
    steps = {"diameter": 0.5 + 5e-10, "scaling": 1 - 1e-11}
    loss = SamplesLoss(p=p, reach=0.8, blur=0.5, debias=debias, **steps)

    def value(*data: Tensor) -> Tensor:
        return loss(data[2], data[0], data[3], data[1])

    leaves = [x, y, a, b]
    exact = {"eps": 0.5**p, "reach": 0.8, "cost": "half_sqeuclidean" if p == 2 else "euclidean"}
    solve = fewstep.sinkhorn_divergence if debias else fewstep.sinkhorn
    right = solve(x, y, a=a, b=b, max_iter=1000, tol=1e-12, **exact)
    close(value(*leaves), right.value)
    for grad, known in zip(
        torch.autograd.grad(value(*leaves), leaves),
        torch.autograd.grad(right.value, leaves),
        strict=True,
    ):
        assert torch.allclose(grad, known, rtol=1e-6, atol=1e-7)
    for k, leaf in enumerate(leaves):
        step = torch.rand_like(leaf) * leaf.detach().abs().mean()
        moved = [
            value(*(t.detach() + (s * step if i == k else 0) for i, t in enumerate(leaves)))
            for s in (1e-5, -1e-5)
        ]
        slope = (torch.autograd.grad(value(*leaves), leaf)[0] * step).sum()
        assert torch.allclose(slope, (moved[0] - moved[1]) / 2e-5, rtol=1e-5, atol=1e-8)


def test_equal_points_are_at_a_distance_of_0() -> None:
    x = torch.ones(4, 3, dtype=torch.float64)
    for p in (1, 2):
        assert abs(SamplesLoss(p=p)(x, x).item()) < 1e-15
        assert SamplesLoss(p=p)(x, x + 1).item() == pytest.approx(3 ** (p / 2) / p)
    x = torch.randn(20, 2, dtype=torch.float64)
    exact = SamplesLoss(p=1, cost=distances)(x, x + 0.1)
    assert torch.allclose(SamplesLoss(p=1)(x, x + 0.1), exact, rtol=1e-12)


def test_second_derivatives_raise_and_gradients_stay_off() -> None:
    x, y = torch.randn(6, 2, requires_grad=True), torch.randn(7, 2)
    (grad,) = torch.autograd.grad(SamplesLoss()(x, y), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="sinkhorn_divergence"):
        torch.autograd.grad(grad.sum(), x)
    with torch.no_grad():
        assert not SamplesLoss()(x, y).requires_grad
        assert not torch.is_grad_enabled()


def test_gradients_under_torch_func() -> None:
    x, y, a, b = problem(True)
    for options in ({}, {"p": 1, "reach": 0.5}, {"cost": halves, "debias": False}):
        loss = SamplesLoss(**options)

        def total(
            x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, loss: SamplesLoss = loss
        ) -> Tensor:
            return loss(a, x, b, y).sum()

        constants = (t.detach() for t in (x, y, a, b))
        grads = torch.func.grad(total, (0, 1, 2, 3))(*constants)
        known = torch.autograd.grad(loss(a, x, b, y).sum(), (x, y, a, b))
        for grad, its in zip(grads, known, strict=True):
            close(grad, its)


def test_every_parameter_of_geomloss_is_there(original: Any) -> None:
    mine, its = (inspect.signature(loss).parameters for loss in (SamplesLoss, original))
    assert [(p.name, p.default) for p in mine.values()] == [
        (p.name, p.default) for p in its.values()
    ]


# What geomloss's own tests ask of its solvers, of this loss.
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("blur", [0.1, 3.0])
def test_one_point_on_each_side(batch: tuple[int, ...], blur: float) -> None:
    x, y = torch.randn(2, *batch, 1, 3, dtype=torch.float64) * 5
    value = (x - y).square().sum((-1, -2)) / 2
    loss = SamplesLoss(blur=blur, debias=False)
    assert torch.allclose(loss(x, y), value)
    assert torch.allclose(SamplesLoss(blur=blur)(x, y), value)
    loss.potentials = True
    for potential in loss(x, y):
        assert torch.allclose(potential[..., 0], value / 2)


def test_the_gradient_of_a_convex_function_is_optimal() -> None:
    x = torch.rand(30, 2, dtype=torch.float64)
    z, v = torch.rand(2, 30, 2, dtype=torch.float64).unbind()
    way = x[:, None] - z
    y = x + (v[:, :1] * way / way.norm(dim=-1, keepdim=True)).sum(1) / 30
    value = (x - y).square().sum(-1).mean() / 2
    found = SamplesLoss(blur=1e-3, scaling=0.98, debias=False)(x, y)
    assert torch.allclose(found, value, rtol=1e-2)


def test_a_permutation_is_found() -> None:
    n, order = 9, torch.randperm(9)
    C = torch.rand(1, n, n, dtype=torch.float64) + 2
    C[0, torch.arange(n), order] -= 2
    value = C[0, torch.arange(n), order].clamp(min=0).mean()
    C = C.clamp(min=0)
    x, y = torch.zeros(1, n, 1, dtype=torch.float64), torch.ones(1, n, 1, dtype=torch.float64)
    loss = SamplesLoss(
        p=1,
        blur=1e-4,
        diameter=3.0,
        scaling=0.9,
        debias=False,
        cost=lambda p, q: C if p[0, 0] == 0 else C.mT,
    )
    assert torch.allclose(loss(x, y)[0], value, atol=1e-2)


X, Y = torch.zeros(4, 2), torch.ones(3, 2)
UNSERVED: list[tuple[dict[str, Any], str]] = [
    ({"loss": "energy"}, "loss='energy'"),
    ({"loss": "gaussian"}, "fewstep.metrics.mmd_rbf"),
    ({"loss": "hausdorff"}, "loss='hausdorff'"),
    ({"kernel": halves}, "kernel="),
    ({"backend": "multiscale"}, "backend='multiscale'"),
    ({"cost": "Norm2(X-Y)"}, r"cost='Norm2\(X-Y\)'"),
]
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"loss": "ot"}, ValueError, "loss must be one of .* got 'ot'"),
    ({"p": 3}, ValueError, "p must be 1 or 2 without a cost, got 3"),
    ({"blur": 0.0}, ValueError, "blur must be positive and finite, got 0.0"),
    ({"reach": -1.0}, ValueError, "reach must be positive and finite, got -1.0"),
    ({"diameter": float("nan")}, ValueError, "diameter must be positive and finite, got nan"),
    ({"scaling": 1.0}, ValueError, r"scaling must be in \(0, 1\), got 1.0"),
    ({"debias": 1}, TypeError, "debias must be True or False, got 1"),
    ({"backend": "gpu"}, ValueError, "backend must be one of .* got 'gpu'"),
    ({"cost": 3}, TypeError, "cost must be callable, got 3"),
]
CALLS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((X,), ValueError, "got 1 arguments"),
    ((X, Y, X, Y, X, Y), NotImplementedError, "labels=.*label_cost"),
    ((X, Y[:, :1]), ValueError, r"one D and one B, got \(4, 2\) and \(3, 1\)"),
    ((X[None], Y), ValueError, r"one D and one B, got \(1, 4, 2\) and \(3, 2\)"),
    ((X, Y.double()), TypeError, "one dtype"),
    ((torch.ones(3), X, torch.ones(3), Y), ValueError, r"a must be \(4,\), got \(3,\)"),
    (
        (torch.ones(4), X, torch.ones(3), Y),
        ValueError,
        "equal positive masses without reach, got 4 and 3",
    ),
    ((-torch.ones(4) / 4, X, -torch.ones(3) / 3, Y), ValueError, "equal positive masses"),
    ((X.long(), Y.long()), TypeError, "x must have a floating dtype"),
    ((X + torch.nan, Y), ValueError, "finite, got a diameter of nan"),
]


@pytest.mark.parametrize(("options", "message"), UNSERVED, ids=lambda v: str(v)[:24])
def test_what_is_not_served(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        SamplesLoss(**options)


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=lambda v: str(v)[:24])
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplesLoss(**options)


@pytest.mark.parametrize(("args", "error", "message"), CALLS, ids=lambda v: str(v)[:20])
def test_bad_calls(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplesLoss()(*args)
    with pytest.raises(ValueError, match=r"cost must return a Tensor \(1, 4, 3\), got \(1, 4, 2\)"):
        SamplesLoss(cost=lambda x, y: x)(X, Y)


def test_it_loads_without_the_libraries_it_stands_for() -> None:
    code = "import sys, fewstep.compat.geomloss, fewstep.compat.pot, fewstep.compat.torchcfm; "
    code += "print([m for m in ('geomloss', 'ot', 'torchcfm') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
