"""Symmetric, relaxed and penalised updates of the C++ kernels where sums leave the range of T."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fewstep
from tolerances import assert_contract

DTYPES = (torch.float32, torch.float64)


def check(C: torch.Tensor, dtype: torch.dtype, **options) -> None:
    """Potentials and value of the C++ kernels against the reference in float64."""
    init = options.pop("init", None)

    def solve(dtype: torch.dtype, backend: str) -> fewstep.SinkhornResult:
        start = None if init is None else tuple(t.to(dtype) for t in init)
        return fewstep.sinkhorn(None, None, C=C.to(dtype), init=start, backend=backend, **options)

    exact = solve(torch.float64, "reference")
    for limit in (2**27, 0):
        options["memory_limit"] = limit
        found = solve(dtype, "cpp")
        scale = C[C.isfinite()].abs().max()
        assert_contract("potential", found.f, exact.f, scale=scale)
        assert_contract("potential", found.g, exact.g, scale=scale)
        if init is None:  # else the plan may have any mass
            assert_contract("value", found.value, exact.value, scale=scale)


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        ({"update": "symmetric"}, (-0.157171, -4.797781e-4)),
        ({"relax": 1.5}, (-0.284794, -9.961202e-4)),
    ],
)
def test_a_panel_with_an_outlier_is_relaxed_once(update: dict, expected: tuple) -> None:
    x, y = torch.tensor([[0.0], [0.1]]), torch.tensor([[0.0], [7.0]])
    cases = ((torch.float32, 0.3, 1.0), (torch.float64, 0.01, 0.1))
    for (dtype, eps, reach), g in zip(cases, expected, strict=True):
        result = fewstep.sinkhorn(
            x.to(dtype), y.to(dtype), eps=eps, reach=reach, max_iter=2, backend="cpp", **update
        )
        assert result.g[0].item() == pytest.approx(g, rel=1e-5)


@pytest.mark.parametrize("iterations", [3, 10, 30])
def test_symmetric_updates_of_products(iterations: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 8) * 1.5, torch.randn(50, 8) * 1.5
    options = {"eps": 0.5, "cost": "dot", "update": "symmetric", "max_iter": iterations}
    found = fewstep.sinkhorn(x, y, backend="cpp", **options)
    exact = fewstep.sinkhorn(x.double(), y.double(), backend="reference", **options)
    if iterations == 10:
        assert exact.value.item() == pytest.approx(-10.14627, abs=1e-5)
    assert_contract("value", found.value, exact.value)
    assert_contract("potential", found.g, exact.g, scale=x @ y.mT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", [{"update": "symmetric"}, {"relax": 1.5}, {"relax": 0.5}])
def test_an_outlier_beside_many_points(dtype: torch.dtype, update: dict) -> None:
    x, y = torch.rand(300, 2), torch.rand(256, 2)
    y[17] = 8
    C = torch.cdist(x, y).square()
    for eps, iterations in ((0.05, 2), (0.05, 7), (0.004, 2)):
        check(C, dtype, eps=eps, reach=1.0, max_iter=iterations, **update)


@pytest.mark.filterwarnings("ignore:sinkhorn_divergence")
@pytest.mark.parametrize("labels", [False, True])
def test_divergence_at_small_eps(labels: bool) -> None:
    x, y = torch.rand(60, 2), torch.rand(50, 2) + 0.2
    y[3] = 7
    options: dict = {"eps": 0.02, "max_iter": 4}
    if labels:
        kinds = (torch.arange(60) % 2, torch.arange(50) % 2)
        options |= {"labels": kinds, "label_cost": 0.3 * (1 - torch.eye(2))}
    found, exact = (
        fewstep.sinkhorn_divergence(
            x.to(dtype),
            y.to(dtype),
            backend=backend,
            **options | {key: t.to(dtype) for key, t in options.items() if key == "label_cost"},
        )
        for dtype, backend in ((torch.float32, "cpp"), (torch.float64, "reference"))
    )
    assert_contract("value", found.value, exact.value)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 0.02), (torch.float64, 0.002)])
def test_heavy_rows_do_not_lift_entries_that_underflow(dtype: torch.dtype, eps: float) -> None:
    C = torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, -1.0]])
    result = fewstep.sinkhorn(
        None, None, C=C.to(dtype), eps=eps, update="symmetric", max_iter=1, backend="cpp"
    )
    value, g = {0.02: (-0.315321, 0.988244), 0.002: (-0.331532, 0.998824)}[eps]
    assert result.value.item() == pytest.approx(value, rel=1e-5)
    assert result.g[0].item() == pytest.approx(g, rel=1e-5)
    for iterations in (2, 3, 10):
        check(C, dtype, eps=eps, update="symmetric", max_iter=iterations)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_relaxed_updates_from_given_potentials(dtype: torch.dtype, iterations: int) -> None:
    C = torch.tensor([[-2.0, 1.0]])
    options: dict = {"init": (torch.zeros(1), torch.zeros(2)), "max_iter": iterations}
    check(C, dtype, eps=0.02, relax=0.5, **options)
    check(C, dtype, eps=0.002, relax=0.5, **options)
    init = (torch.tensor([1.5, -1.0, 0.0]), torch.zeros(3))
    check(torch.rand(3, 3) * 2 - 1, dtype, eps=0.02, relax=0.7, init=init, max_iter=iterations)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", [{}, {"update": "symmetric"}, {"relax": 1.3}])
def test_annealing_of_scores(dtype: torch.dtype, update: dict) -> None:
    C = torch.randn(20, 40)
    check(C, dtype, eps=0.03, anneal=(2.0, 0.2), max_iter=3, **update)


@pytest.mark.parametrize("rows", [(9.0, 0.1, 0.1, 0.1), (3.0, 3.0, 3.0, 0.3)])
@pytest.mark.parametrize("limit", [2**27, 0])
def test_penalties_far_below_eps(rows: tuple[float, ...], limit: int) -> None:
    result = fewstep.sinkhorn(
        None,
        None,
        C=torch.full((4, 9), 6.921),
        a=torch.tensor(rows),
        b=torch.full((9,), 6.921),
        eps=10.0,
        reach=0.01,
        tol=1e-5,
        backend="cpp",
        memory_limit=limit,
    )
    assert result.converged
    assert result.iterations <= 3


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("eps", [1.62e-4, 0.06, 0.1, 0.3, 0.65])
def test_potentials_beyond_the_digits_of_float32_have_no_plan(backend: str, eps: float) -> None:
    """Their rounding is more than eps, and the plan is any; the value is right."""
    C = torch.tensor([[1e9]], requires_grad=True)
    points = torch.zeros(1, 1, requires_grad=True), torch.full((1, 1), 1e9**0.5)
    ones = torch.ones(1)
    for args, options in (((None, None), {"C": C}), (points, {})):
        result = fewstep.sinkhorn(*args, **options, eps=eps, backend=backend)
        assert result.residual == torch.inf
        assert not result.converged
        assert result.value.item() == pytest.approx(1e9, rel=1e-5)
        beyond = r"eps must be at least 86 .* or float64"
        for more in ({}, {"axis": 1, "implicit": True}):
            with pytest.raises(ValueError, match=beyond):
                result.transport(ones, **more)
        with pytest.raises(ValueError, match=beyond):
            result.plan() if options else result.barycenter()
        with pytest.raises(ValueError, match=beyond):
            torch.autograd.grad(result.value, options.get("C", points[0]))
    found = fewstep.sinkhorn(None, None, C=C.detach(), eps=90.0, backend=backend)
    assert found.transport(ones).item() == pytest.approx(1, rel=1)
    found = fewstep.sinkhorn(None, None, C=C.detach().double(), eps=eps, backend=backend)
    assert found.converged
    assert found.transport(ones.double()).item() == pytest.approx(1, rel=1e-3)
    # Far points without weight are no matter, nor are forbidden pairs.
    C, a = torch.tensor([[0.0, 1e9], [1e9, 0.0], [1e9, 1e9]]), torch.tensor([0.5, 0.5, 0.0])
    found = fewstep.sinkhorn(None, None, C=C, a=a, eps=eps, backend=backend)
    assert found.converged
    assert torch.allclose(found.transport(C.new_ones(2)), a)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("form", ["points", "batch", "ragged"])
def test_far_points_that_are_destroyed_have_a_plan(backend: str, form: str) -> None:
    """Their potentials are as large, but rounding brings none of their mass back."""
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1e5, 1e5]])
    y = torch.tensor([[0.5, 0.0], [1.0, 0.3]])
    options: dict = {"eps": 0.1, "reach": 1.0, "max_iter": 300}
    exact = fewstep.sinkhorn(x.double(), y.double(), **options)
    if form == "batch":
        x, y = x.expand(2, -1, -1), y.expand(2, -1, -1)
    if form == "ragged":
        options["cu_seqlens"] = torch.tensor([0, 3]), torch.tensor([0, 2])
    x = x.clone().requires_grad_()
    found = fewstep.sinkhorn(x, y, backend=backend, **options)
    assert found.converged.all()
    (grad,) = torch.autograd.grad(found.value.sum(), x)
    assert grad.isfinite().all()
    assert torch.allclose(found.value.double(), exact.value, rtol=1e-5)
    moved = exact.transport(exact._problem.points.y[0])
    assert torch.allclose(found.transport(y).double(), moved, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_barycentre_of_a_row_that_nearly_vanishes(dtype: torch.dtype, backend: str) -> None:
    """Before convergence rows of the plan may have any mass, down to the least that there is."""
    C_of_mass = 72.0 if dtype == torch.float32 else 640.0
    x, y = torch.tensor([[0.0, 0.0], [C_of_mass, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    init = torch.zeros(2), torch.zeros(2)
    plan = fewstep.sinkhorn(
        x.to(dtype),
        y.to(dtype),
        cost="l1",
        eps=1.0,
        init=tuple(t.to(dtype) for t in init),
        relax=1e-6,
        max_iter=1,
        backend=backend,
    )
    expected = (1 + 3 * math.exp(-2)) / (1 + math.exp(-2))
    assert plan.barycenter()[1].tolist() == pytest.approx([0, expected], rel=1e-3)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e9, 1e10, 1e12])
def test_points_that_are_far_beyond_eps(backend: str, dtype: torch.dtype, scale: float) -> None:
    """Costs of 1e18 to 1e24 eps, as features have that nobody scaled."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, dtype=dtype) * scale, torch.randn(7, 3, dtype=dtype) * scale
    x.requires_grad_()
    result = fewstep.sinkhorn(x, y, eps=1.0, max_iter=100, backend=backend)
    assert result.residual == torch.inf
    assert not result.converged
    for use in (result.plan, lambda: torch.autograd.grad(result.value, x)):
        with pytest.raises(ValueError, match="eps must be at least"):
            use()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("rho", [None, 2.0])
def test_averaged_updates_are_those_of_the_definition(backend: str, rho: float | None) -> None:
    torch.manual_seed(0)
    C, steps = torch.rand(2, 9, 14).double() * 4, [4.0, 2.0, 2.0, 0.5, 0.2]
    a, b = (torch.rand(2, k).double().softmax(-1) for k in (9, 14))

    def transforms(f: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        damping = 1.0 if rho is None else rho / (rho + eps)
        of_g = torch.logsumexp((g[:, None] - C) / eps + b.log()[:, None], 2)
        of_f = torch.logsumexp((f[:, :, None] - C) / eps + a.log()[:, :, None], 1)
        return -eps * damping * of_g, -eps * damping * of_f

    f, g = transforms(torch.zeros_like(a), torch.zeros_like(b), steps[0])
    for eps in steps[1:]:
        f_next, g_next = transforms(f, g, eps)
        f, g = (f + f_next) / 2, (g + g_next) / 2
    result = fewstep.sinkhorn(
        C=C, a=a, b=b, eps=steps[-1], anneal=steps[:-1], max_iter=1, update="averaged", reach=rho,
        backend=backend,
    )  # fmt: skip
    assert (result.iterations == len(steps)).all()
    assert torch.allclose(result.f, f, rtol=0, atol=1e-13)
    assert torch.allclose(result.g, g, rtol=0, atol=1e-13)
    P = a[:, :, None] * b[:, None] * ((f[:, :, None] + g[:, None] - C) / steps[-1]).exp()
    masses = [(1.0 if rho is None else (-t / rho).exp()) * w for t, w in ((f, a), (g, b))]
    errors = [(P.sum(d) - mass).abs().sum(1) for d, mass in zip((2, 1), masses, strict=True)]
    assert torch.allclose(result.residual, torch.maximum(*errors), rtol=1e-12)
