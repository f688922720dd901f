"""Balanced problems of any mass: those of mass 1, scaled, and what becomes of the entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fewstep
from fewstep.ops.sinkhorn.inputs import mass_range
from fewstep.reference.costs import cost_matrix
from support import sinkhorn as support
from tolerances import assert_contract

# Raised inside torch when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

BACKENDS = ["cpp", "reference"]
EPS = 1.5
CONVERGED = {"tol": 1e-12, "max_iter": 20000}
UPDATES: dict[str, dict[str, Any]] = {
    "alternating": {},
    "symmetric": {"update": "symmetric"},
    "relaxed": {"relax": 1.4},
}


def clouds(shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Whose weights sum to 1 in float64."""
    data = support.clouds(shape)
    for side in "ab":
        w = data[side].nan_to_num(1.0)  # of a point alone, which has no weight there
        data[side] = w / w.sum(-1, keepdim=True)
    return data


def of_mass(value: Tensor, M: Tensor, eps: float) -> Tensor:
    """From the value at mass 1: `KL(M p | M^2 q) = M KL(p | q) - M log M - M + M^2`."""
    return M * value - eps * M * (M.log() + 1 - M)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 5, 7, 2), (3, 33, 65, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_problem_of_mass_m_is_that_of_mass_1_scaled(
    dtype: torch.dtype, shape: tuple[int, int, int, int], backend: str, update: str
) -> None:
    data = clouds(shape)
    M = torch.tensor([3.7, 0.02, 1.0], dtype=torch.float64)
    exact = fewstep.sinkhorn(**data, eps=EPS, **CONVERGED)
    scaled = data | {side: M[:, None] * data[side] for side in "ab"}
    options = {"eps": EPS, "max_iter": 400, "backend": backend} | UPDATES[update]
    leaves = {k: t.to(dtype).requires_grad_() for k, t in scaled.items()}
    result = fewstep.sinkhorn(**leaves, **options)
    assert_contract("value", result.value, of_mass(exact.value, M, EPS))
    assert_contract("plan", result.plan(), M[:, None, None] * exact.plan())
    assert_contract("plan", result.barycenter(), exact.barycenter(), scale=data["y"])
    assert result.converged.all()
    P, cost = exact.plan(), cost_matrix(data["x"], data["y"], "sqeuclidean")
    independent = data["a"][:, :, None] * data["b"][:, None]
    log_ratio = torch.where(P > 0, P / independent, 1.0).log()
    entropy = M * (P * (log_ratio + M.reciprocal().log()[:, None, None])).sum((1, 2)) - M + M**2
    primal = M * (P * cost).sum((1, 2)) + EPS * entropy
    assert torch.allclose(of_mass(exact.value, M, EPS), primal, rtol=1e-10)
    grads = torch.autograd.grad(result.value.sum(), list(leaves.values()))
    exact_leaves = {k: t.clone().requires_grad_() for k, t in scaled.items()}
    of_1 = {k: (t if k in "xy" else t / M[:, None]) for k, t in exact_leaves.items()}
    value = of_mass(fewstep.sinkhorn(**of_1, eps=EPS, **CONVERGED).value, M, EPS)
    expected = torch.autograd.grad(value.sum(), list(exact_leaves.values()))
    for name, grad, known in zip(data, grads, expected, strict=True):
        if name in "xy":
            assert_contract("gradient", grad, known)
    # Those of the weights are defined up to a constant of a that is taken from b.
    off = [g.detach().double() - k for g, k in zip(grads[2:], expected[2:], strict=True)]
    assert (off[0] - off[0][:, :1]).abs().max() < 1e-4 * cost.max()
    assert (off[1] - off[1][:, :1]).abs().max() < 1e-4 * cost.max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_for_weights_of_a_changing_mass(backend: str) -> None:
    data = {k: t[0] for k, t in clouds((1, 4, 3, 2)).items()}

    def value(x: Tensor, la: Tensor, lb: Tensor, log_mass: Tensor) -> Tensor:
        a, b = (log_mass.exp() * w.softmax(-1) for w in (la, lb))
        options = {"eps": EPS, "backend": backend, "tol": 1e-13, "max_iter": 300}
        return fewstep.sinkhorn(x, data["y"], a=a, b=b, **options).value

    inputs = [
        data["x"],
        torch.randn(4).double(),
        torch.randn(3).double(),
        torch.tensor(0.9).double(),
    ]
    leaves = [t.requires_grad_() for t in inputs]
    assert gradcheck(value, leaves)
    assert gradgradcheck(value, leaves)


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_derivatives_through_the_plan_at_any_mass(size: float) -> None:
    data = {k: t[0] for k, t in clouds((1, 5, 4, 2)).items()}
    x, weights = data["x"].requires_grad_(), {side: size * data[side] for side in "ab"}
    grads = []
    for scale, masses in ((1.0, {s: data[s] for s in "ab"}), (size, weights)):
        # Far from converged, where Newton's method has to go on.
        result = fewstep.sinkhorn(x, data["y"], eps=EPS, tol=1e-3, **masses)
        out = result.transport(data["y"], implicit=True) / scale
        grads.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert torch.allclose(*grads, rtol=1e-8)


@pytest.mark.parametrize("update", ["alternating", "symmetric"])
def test_a_divergence_is_homogeneous_of_degree_1(update: str) -> None:
    data = clouds((2, 6, 5, 2))
    M = torch.tensor([40.0, 0.3], dtype=torch.float64)
    exact = fewstep.sinkhorn_divergence(**data, eps=EPS, update=update, **CONVERGED)
    scaled = data | {side: M[:, None] * data[side] for side in "ab"}
    result = fewstep.sinkhorn_divergence(**scaled, eps=EPS, update=update, **CONVERGED)
    assert torch.allclose(result.value, M * exact.value, rtol=1e-9)
    assert torch.allclose(result.f - result.f[:, :1], exact.f - exact.f[:, :1], atol=1e-9)
    x = data["x"].requires_grad_()
    for update in ("alternating", "symmetric"):  # of a cloud with itself too
        of_1, itself = (
            fewstep.sinkhorn(x, x, a=w, b=w, eps=EPS, update=update, **CONVERGED)
            for w in (data["a"], scaled["a"])
        )
        assert torch.allclose(itself.value, of_mass(of_1.value, M, EPS), rtol=1e-9)


def test_a_reach_without_end_is_no_reach() -> None:
    data = {k: t[0] for k, t in clouds((1, 6, 5, 2)).items()}
    data |= {side: 2.5 * data[side] for side in "ab"}
    fixed = fewstep.sinkhorn(**data, eps=EPS, **CONVERGED)
    free = fewstep.sinkhorn(**data, eps=EPS, reach=1e5, **CONVERGED)
    assert torch.allclose(free.value, fixed.value, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_problems_of_several_masses_and_temperatures(backend: str) -> None:
    x, y = torch.randn(7, 2).double(), torch.randn(9, 2).double()
    a, b = torch.rand(7).double() + 0.1, torch.rand(9).double() + 0.1
    cu_x, cu_y = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 5, 5, 9])
    b[:5] *= a[:3].sum() / b[:5].sum()
    b[5:] *= a[3:].sum() / b[5:].sum()
    options = {"eps": [EPS, 1.0], "backend": backend, **CONVERGED}
    result = fewstep.sinkhorn(x, y, a=a, b=b, cu_seqlens=(cu_x, cu_y), **options)
    for i in (0, 2):
        rows, columns = slice(cu_x[i], cu_x[i + 1]), slice(cu_y[i], cu_y[i + 1])
        alone = fewstep.sinkhorn(x[rows], y[columns], a=a[rows], b=b[columns], **options)
        assert torch.allclose(result.value[i], alone.value, rtol=1e-12)
    with pytest.raises(ValueError, match=r"a and b must have the same mass, got sums of "):
        fewstep.sinkhorn(x, y, a=a, b=2 * b, cu_seqlens=(cu_x, cu_y), **options)


@pytest.mark.parametrize("eps", [0.5, 1e4])
def test_float32_keeps_the_contract_at_any_mass(eps: float) -> None:
    data = clouds((6, 9, 8, 3))
    M = torch.tensor([1e-20, 1e-6, 0.3, 5.0, 1e5, 1e15], dtype=torch.float64)
    scaled = data | {side: M[:, None] * data[side] for side in "ab"}
    exact = fewstep.sinkhorn(**scaled, eps=eps, max_iter=100)
    leaves = {k: t.float().requires_grad_() for k, t in scaled.items()}
    result = fewstep.sinkhorn(**leaves, eps=eps, max_iter=100)
    assert (result.value.double() / exact.value - 1).abs().max() < 1e-5
    (grad,) = torch.autograd.grad(result.value.sum(), leaves["x"])
    x = data["x"].clone().requires_grad_()
    value = fewstep.sinkhorn(**(scaled | {"x": x}), eps=eps, max_iter=100).value
    (expected,) = torch.autograd.grad(value.sum(), x)
    for one, known in zip(grad, expected, strict=True):
        assert_contract("gradient", one, known)
    assert (result.plan().double() / exact.plan().sum((1, 2), keepdim=True)).sum() - 6 < 1e-4


def test_masses_that_differ_or_are_out_of_range() -> None:
    data = clouds((2, 4, 3, 2))
    for reach, problem in ((None, 1), ((1.0, None), None)):
        weights = {"a": data["a"], "b": data["b"].clone()}
        weights["b"][1] *= 1.5
        given = {"eps": EPS, "reach": reach} | data | weights
        if problem is None:
            fewstep.sinkhorn(**given)
            continue
        for op in (fewstep.sinkhorn, fewstep.sinkhorn_divergence):
            with pytest.raises(
                ValueError, match=r"sums of 1 and 1.5; scale one of them, or give r"
            ):
                op(**given)
    C = torch.rand(3, 2)
    fewstep.sinkhorn(C=C, a=torch.ones(3) * 2, b=torch.ones(2) * 3, eps=EPS)
    with pytest.raises(ValueError, match="got sums of 3 and 2"):
        fewstep.sinkhorn(C=C.numpy(), a=torch.ones(3).numpy(), b=torch.ones(2).numpy(), eps=EPS)
    fewstep.sinkhorn(
        C=C, a=torch.ones(3) / 3, b=torch.ones(2) / 2 * (1 + 5e-4), eps=EPS
    )  # rounding
    for dtype in (torch.float32, torch.float64):
        least, most = mass_range(dtype)
        for mass in (0.0, least / 2, most * 2):
            weights = {"a": torch.full((3,), mass / 3, dtype=dtype)}
            with pytest.raises(ValueError, match=r"a must have a mass from .* got a sum of"):
                fewstep.sinkhorn(C=C.to(dtype), eps=EPS, reach=1.0, **weights)
