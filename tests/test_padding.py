"""Padded clouds, whose points of weight 0 change nothing and come out as finite numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep

BACKENDS = ["cpp", "reference"]


def padded(dtype: torch.dtype) -> dict[str, Tensor]:
    """4 and 5 points far from the origin, and two and three without weight there."""
    x, y = torch.randn(6, 3, dtype=dtype) + 2, torch.randn(8, 3, dtype=dtype) + 2
    x[4:], y[5:] = 0, 0
    a, b = torch.tensor([0.25] * 4 + [0] * 2), torch.tensor([0.2] * 5 + [0] * 3)
    return {"x": x, "y": y, "a": a.to(dtype), "b": b.to(dtype)}


def alone(data: dict[str, Tensor]) -> dict[str, Tensor]:
    counts = {"x": 4, "a": 4, "y": 5, "b": 5}
    return {k: t[: counts[k]] for k, t in data.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float32, 0.1), (torch.float64, 0.1), (torch.float64, 0.003)]
)
@pytest.mark.parametrize("reach", [None, 3.0])
def test_padding_changes_nothing(
    backend: str, dtype: torch.dtype, eps: float, reach: float | None
) -> None:
    data = padded(dtype)
    options = {"eps": eps, "max_iter": 1000, "reach": reach, "backend": backend}
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    found = []
    for part in (data, alone(data)):
        leaves = {k: t.clone().requires_grad_(k in "xy") for k, t in part.items()}
        result = fewstep.sinkhorn(**leaves, **options)
        grads = torch.autograd.grad(result.value, [leaves["x"], leaves["y"]])
        products = result.transport(part["y"]), result.transport(part["x"], axis=1)
        found.append((result.plan(), *grads, *products, result.barycenter()))
    for whole, part in zip(*found, strict=True):
        assert whole.isfinite().all()
        inside = tuple(slice(n) for n in part.shape)
        assert torch.allclose(whole[inside], part, rtol=tolerance, atol=tolerance)
    for whole, part in list(zip(*found, strict=True))[:-1]:  # a barycentre is an average there too
        outside = whole.clone()
        outside[tuple(slice(n) for n in part.shape)] = 0
        assert not outside.any()
    if reach is None:
        assert torch.allclose(found[0][0].sum(), torch.ones((), dtype=dtype), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_cost_of_padding(backend: str) -> None:
    C = torch.full((6, 8), 1e9)
    C[:4, :5] = torch.rand(4, 5)
    data = padded(torch.float32)
    weights = {"a": data["a"], "b": data["b"]}
    C.requires_grad_()
    result = fewstep.sinkhorn(None, None, C=C, **weights, eps=0.1, max_iter=1000, backend=backend)
    (grad,) = torch.autograd.grad(result.value, C)
    exact = fewstep.sinkhorn(None, None, C=C.detach()[:4, :5], eps=0.1, max_iter=1000)
    for plan in (result.plan(), grad):
        assert torch.allclose(plan[:4, :5], exact.plan(), atol=1e-6)
        assert not plan[4:].any()
        assert not plan[:, 5:].any()
    assert torch.allclose(result.value, exact.value, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cost", ["sqeuclidean", "half_sqeuclidean", "euclidean"])
@pytest.mark.parametrize("far", [1e4, 1e6])
def test_far_padding(backend: str, cost: str, far: float) -> None:
    """Gradients of the value and of a gradient."""
    data = padded(torch.float32)
    data["x"][4:], data["y"][5:] = far, far

    def gradients(part: dict[str, Tensor], second: bool, **options: Any) -> list[Tensor]:
        leaves = {k: t.clone().requires_grad_(k in "xy") for k, t in part.items()}
        result = fewstep.sinkhorn(**leaves, eps=0.5, max_iter=300, cost=cost, **options)
        points = leaves["x"], leaves["y"]
        first = torch.autograd.grad(result.value, points, create_graph=second)
        if not second:
            return list(first)
        return list(torch.autograd.grad(sum(g[:4].square().sum() for g in first), points))

    for second in (False, True):
        found = gradients(data, second, backend=backend)
        doubles = {k: t.double() for k, t in alone(data).items()}
        exact = gradients(doubles, second, backend="reference")
        for whole, part in zip(found, exact, strict=True):
            error = (whole[: len(part)] - part).norm() / part.norm()
            assert error < (1e-3 if second else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("update", [{}, {"update": "symmetric"}, {"relax": 1.4}], ids=str)
def test_far_padding_of_products(backend: str, dtype: torch.dtype, update: dict) -> None:
    """Gradients for its weights are beyond every number, and 0 times them is to be 0."""
    data = padded(dtype)
    data["x"][4:], data["y"][5:] = 1e4, 1e4
    logits = [data[k].log().requires_grad_() for k in "ab"]
    weights = dict(zip("ab", (t.softmax(-1) for t in logits), strict=True))
    result = fewstep.sinkhorn(
        data["x"], data["y"], **weights, cost="dot", eps=0.5, reach=1.0, max_iter=300,
        backend=backend, **update,
    )  # fmt: skip
    of_a, of_b = torch.autograd.grad(result.value, list(weights.values()), retain_graph=True)
    for grad, n in ((of_a, 4), (of_b, 5)):
        assert grad.isfinite().all()
        assert (grad[n:] < -1e37).all()
    for grad, n in zip(torch.autograd.grad(result.value, logits), (4, 5), strict=True):
        assert grad.isfinite().all()
        assert not grad[n:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_implicit_derivatives_of_padded_clouds(backend: str) -> None:
    data = padded(torch.float64)

    def derivatives(part: dict[str, Tensor]) -> list[Tensor]:
        leaves = {k: t.clone().requires_grad_(k in "xy") for k, t in part.items()}
        result = fewstep.sinkhorn(**leaves, eps=1.0, tol=1e-12, max_iter=500, backend=backend)
        points = leaves["x"], leaves["y"]
        grads = torch.autograd.grad(result.value, points, create_graph=True)
        hvp = torch.autograd.grad(sum(g.square().sum() for g in grads), points, retain_graph=True)
        f, g = result.potentials()
        n, m = 4, 5
        moved = f[:n].square().sum() + g[:m].square().sum()
        of_potentials = torch.autograd.grad(moved, points, retain_graph=True)
        image = result.transport(part["y"], implicit=True)[:n]
        average = result.barycenter(implicit=True)[:n]
        through = torch.autograd.grad(image.square().sum() + average.square().sum(), points)
        return [*hvp, *of_potentials, *through]

    for whole, part in zip(derivatives(data), derivatives(alone(data)), strict=True):
        assert torch.allclose(whole[: len(part)], part, rtol=1e-6, atol=1e-8)
        assert not whole[len(part) :].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_beside_padding_whose_mass_would_overflow(backend: str) -> None:
    x = torch.tensor([[0.5, 0.1], [0.2, 0.7]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.3, 0.4], [0.9, 0.2]], dtype=torch.float64)
    far = torch.tensor([[3000.0, 3000.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    options: dict = {"cost": "dot", "eps": 0.3, "reach": 0.2, "tol": 1e-12, "max_iter": 999}
    found = []
    for padding, w in ((far, weights), (far[:0], weights[:2])):
        points = torch.cat([x, padding]), torch.cat([y, padding])
        result = fewstep.sinkhorn(*points, a=w, b=w, backend=backend, **options)
        (grad,) = torch.autograd.grad(result.value, x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    assert torch.allclose(*found, rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(("cost", "far"), [("sqeuclidean", 30.0), ("dot", 3e3), ("dot", -3e3)])
@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_potential_of_a_point_beyond_reach(cost: str, far: float, weight: float) -> None:
    """Its mass, times `exp(-f / rho)`, is out of range; its potential and derivatives are not."""
    if far == 3e3 and weight > 0:
        pytest.skip("the plan has infinite mass")
    y = torch.tensor([[0.3, 0.4], [0.9, 0.2]], dtype=torch.float64)
    a = torch.tensor([0.5, 0.5 - weight, weight], dtype=torch.float64)
    points = torch.tensor([[0.5, 0.1], [0.2, 0.7], [far, far / 30]], dtype=torch.float64)
    options: dict = {"cost": cost, "eps": 0.3, "reach": 0.2, "tol": 1e-13, "max_iter": 999}
    x, z = points.clone().requires_grad_(), points.clone().requires_grad_()
    result = fewstep.sinkhorn(x, y, a=a, backend="cpp", **options)
    exact = fewstep.sinkhorn(z, y, a=a, backend="reference", **options)
    (grad,) = torch.autograd.grad(result.potentials()[0][2], x)
    (expected,) = torch.autograd.grad(exact.f[2], z)
    assert expected[2].abs().min() > 0.01
    assert torch.allclose(grad, expected, rtol=1e-9, atol=1e-12)
    u = torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 1.0]], dtype=torch.float64)
    _, tangent = torch.func.jvp(
        lambda x: fewstep.sinkhorn(x, y, a=a, backend="cpp", **options).potentials()[0][2],
        (points,),
        (u,),
    )
    assert tangent.item() == pytest.approx((expected * u).sum().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plan_between_tiny_weights(dtype: torch.dtype) -> None:
    """`a b` underflows and the exponential overflows, but their product is ordinary."""
    tiny = 1e-30 if dtype == torch.float32 else 1e-250
    a = torch.tensor([tiny, 1.0], dtype=dtype)
    C = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=dtype)
    plan = fewstep.sinkhorn(None, None, C=C, a=a, b=a, eps=0.001).plan()
    assert torch.allclose(plan.diagonal(), a, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_for_costs_of_tiny_weights(backend: str, dtype: torch.dtype) -> None:
    """It is the plan, whose exponential is as large as the weights are small."""
    C = torch.tensor([[0.2, -0.57], [-0.06, -0.0622]], dtype=dtype, requires_grad=True)
    a = torch.tensor([1.0, 1e-20], dtype=dtype)
    options: dict = {"eps": 0.0029, "max_iter": 1, "backend": backend}
    result = fewstep.sinkhorn(None, None, C=C, a=a, **options)
    (grad,) = torch.autograd.grad(result.value, C)
    assert grad[1, 0].item() == pytest.approx(0.5, rel=1e-5)
    tiny = 1e-36 if dtype == torch.float32 else 1e-250
    a = torch.tensor([tiny, 1.0], dtype=dtype)
    C = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=dtype, requires_grad=True)
    result = fewstep.sinkhorn(None, None, C=C, a=a, b=a, eps=0.001, backend=backend)
    (grad,) = torch.autograd.grad(result.value, C)
    assert torch.allclose(grad.diagonal(), a, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "l1"])
def test_gradient_of_a_point_whose_plan_is_beyond_its_weight(backend: str, cost: str) -> None:
    x, y = torch.tensor([[0.0], [1.0]], requires_grad=True), torch.tensor([[0.0], [1.5]])
    a, b = torch.tensor([1.0, 6e-38]), torch.tensor([1.0, 5.0])
    options: dict = {"eps": 1e-3, "reach": (1.0, None), "max_iter": 1, "backend": backend}
    value = fewstep.sinkhorn(x, y, a=a, b=b, cost=cost, **options).value
    (grad,) = torch.autograd.grad(value, x)
    assert grad[1].item() == pytest.approx(-5, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["points", "ragged", "matrix"])
def test_annealing_starts_from_the_costs_of_points_with_weight(backend: str, form: str) -> None:
    data = padded(torch.float64)
    data["x"][4:], data["y"][5:] = 1e4, -1e4
    options: dict = {"eps": 0.1, "anneal": 0.5, "max_iter": 3, "backend": backend}
    found = []
    for part in (data, alone(data)):
        if form == "matrix":
            C = torch.cdist(part["x"], part["y"]).square()
            part = {"a": part["a"], "b": part["b"], "C": C, "x": None, "y": None}
        elif form == "ragged":
            part = part | {"cu_seqlens": tuple(torch.tensor([0, len(part[k])]) for k in "xy")}
        found.append(fewstep.sinkhorn(**part, **options))
    assert torch.equal(found[0].iterations, found[1].iterations)
    assert torch.allclose(found[0].f[:4], found[1].f, rtol=1e-9)


def test_ragged_and_several_temperatures_with_padding() -> None:
    data = padded(torch.float32)
    cu = torch.tensor([0, 6]), torch.tensor([0, 8])
    found = {}
    for backend in BACKENDS:
        options: dict[str, Any] = {"eps": [0.1, 0.3], "max_iter": 500, "backend": backend}
        x = data["x"].clone().requires_grad_()
        result = fewstep.sinkhorn(**data | {"x": x}, cu_seqlens=cu, **options)
        (grad,) = torch.autograd.grad(result.value.sum(), x)
        found[backend] = grad, result.barycenter(), result.transport(torch.ones(8))
        assert all(t.isfinite().all() for t in found[backend])
        assert not grad[4:].any()
    for mine, other in zip(*found.values(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-5)


UPDATES: list[dict[str, Any]] = [
    {},
    {"reach": 1.0},
    {"reach": (1.0, None)},
    {"update": "symmetric"},
    {"update": "averaged"},
    {"relax": 1.5},
    {"anneal": 0.5},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", UPDATES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float32, 0.1), (torch.float32, 0.02), (torch.float64, 0.003)]
)
def test_everything_is_finite_after_few_iterations(
    backend: str, options: dict[str, Any], dtype: torch.dtype, eps: float
) -> None:
    leaves = {k: t.requires_grad_() for k, t in padded(dtype).items()}
    for max_iter in (1, 3):
        result = fewstep.sinkhorn(**leaves, eps=eps, max_iter=max_iter, backend=backend, **options)
        grads = torch.autograd.grad(result.value, list(leaves.values()))
        ones = torch.ones_like(leaves["b"]), torch.ones_like(leaves["a"])
        images = result.transport(ones[0]), result.transport(ones[1], axis=1)
        for t in (*grads, *images, result.plan(), result.barycenter()):
            assert t.isfinite().all()
        assert torch.allclose(result.plan().sum(1), images[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("eps", [8e-6, 1e-2])
def test_what_is_infeasible_is_worth_inf_whatever_mass_its_plan_has(
    backend: str, eps: float
) -> None:
    """One step of under-relaxation after annealing leaves a plan of infinite mass."""
    x, y = torch.tensor([[-0.23], [0.15]]).double(), torch.tensor([[-0.17], [-0.12]]).double()
    options = {"relax": 0.3, "anneal": [2.8, 0.7], "max_iter": 1, "exclude_diagonal": True}
    a = torch.tensor([1.0, 0.0]).double()
    result = fewstep.sinkhorn(x, y, a=a, eps=eps, **options, backend=backend)
    assert result.value == torch.inf
    assert not result.converged


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_point_that_keeps_next_to_no_mass(backend: str) -> None:
    """Its barycentre is right or NaN, on all masses down to none."""
    x, y = torch.linspace(0.8, 2.3, 400)[:, None], torch.tensor([[0.3]])
    result = fewstep.sinkhorn(x, y, eps=1e-3, reach=0.15, max_iter=1, backend=backend)
    mass, means = result.transport(torch.ones(1, 1))[:, 0], result.barycenter()[:, 0]
    assert bool((mass == 0).any() & ((mass > 0) & (mass < 1e-42)).any() & (mass > 1e-3).any())
    known = ~means.isnan()
    assert bool(known[mass >= 1e-33].all())
    assert means[known].tolist() == pytest.approx([0.3] * int(known.sum()))


@pytest.mark.parametrize("relax", [0.5, 1.2, 1.8])
def test_a_column_without_partners_is_annealed_and_relaxed(relax: float) -> None:
    """Its mass is destroyed, however infinite its potential was at a temperature before."""
    C = torch.tensor([[torch.inf, 0.3], [torch.inf, 0.1]], dtype=torch.float64)
    options: dict = {"eps": 0.01, "reach": 1.0, "relax": relax, "anneal": [50.0, 1.0]}
    for max_iter in (1, 2, 20):
        found = [
            fewstep.sinkhorn(None, None, C=C, max_iter=max_iter, backend=backend, **options)
            for backend in ("cpp", "reference")
        ]
        assert all(r.g[0] > 1e20 for r in found)
        torch.testing.assert_close(found[0].value, found[1].value, rtol=1e-9, atol=0)
