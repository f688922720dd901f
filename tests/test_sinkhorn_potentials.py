"""`fewstep.from_potentials` and `fewstep.eps_for_entropy`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import fewstep
from support.sinkhorn import clouds
from tolerances import assert_contract

# Raised inside torch when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

BACKENDS = ["cpp", "reference"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperatures": {"eps": [0.3, 2.0]},
    "reach": {"reach": (1.0, 2.0)},
    "reach of x": {"reach": (1.0, None)},
    "diagonal": {"exclude_diagonal": -1},
    "euclidean": {"cost": "euclidean"},
    "cosine": {"cost": "cosine"},
    "labels": {
        "labels": (torch.arange(10).reshape(2, 5) % 2, torch.arange(14).reshape(2, 7) // 7),
        "label_cost": torch.tensor([[0.0, 0.3], [1.0, 0.1]], dtype=torch.float64),
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIONS)
def test_potentials_of_a_result_give_it_again(name: str, dtype: torch.dtype, backend: str) -> None:
    options = {"eps": 0.5, "backend": backend} | OPTIONS[name]
    options = {k: t.to(dtype) if k == "label_cost" else t for k, t in options.items()}
    data = {k: t.to(dtype).requires_grad_() for k, t in clouds((2, 5, 7, 3)).items()}
    free = {} if "reach" in options else {"tol": 0.1}
    found = fewstep.sinkhorn(**data, **options, max_iter=200)
    again = fewstep.from_potentials(found.f.detach(), found.g.detach(), **data, **options, **free)
    scale = found.value.detach().double()
    assert_contract("value", again.value, found.value.double(), scale=scale)
    assert_contract("plan", again.plan(), found.plan().double())
    assert torch.equal(again.eps, found.eps)
    assert (again.residual - found.residual).abs().max() < 1e-5
    assert not again.iterations.any()
    assert torch.equal(again.barycenter(), found.barycenter())
    leaves = list(data.values())
    grads = [torch.autograd.grad(r.value.sum(), leaves) for r in (again, found)]
    for got, expected in zip(*grads, strict=True):
        assert_contract("gradient", got, expected.double())


def test_any_potentials_have_the_value_and_the_residual_of_their_plan() -> None:
    data = {k: t[0] for k, t in clouds((1, 5, 4, 2)).items()}
    f, g = torch.randn(5).double(), torch.randn(4).double()
    for reach in (None, 1.5):
        result = fewstep.from_potentials(f, g, **data, eps=0.7, reach=reach)
        C = torch.cdist(data["x"], data["y"]).square()
        P = data["a"][:, None] * data["b"] * ((f[:, None] + g - C) / 0.7).exp()
        assert torch.allclose(result.plan(), P)
        rho = None if reach is None else reach**2
        phi = [t if rho is None else -rho * torch.expm1(-t / rho) for t in (f, g)]
        value = (data["a"] * phi[0]).sum() + (data["b"] * phi[1]).sum() - 0.7 * (P.sum() - 1)
        assert torch.allclose(result.value, value, rtol=1e-6)  # the weights' sums are rounded
        slopes = [torch.ones_like(t) if rho is None else (-t / rho).exp() for t in (f, g)]
        off = [(P.sum(1 - k) - data["ab"[k]] * slopes[k]).abs().sum() for k in range(2)]
        assert torch.allclose(result.residual, max(off), rtol=1e-6)
        best = fewstep.sinkhorn(**data, eps=0.7, reach=reach, tol=1e-9, max_iter=9999)
        assert result.value < best.value
        assert not result.converged

    def value_of(x: Tensor, y: Tensor) -> Tensor:
        weights = {"a": data["a"], "b": data["b"]}
        return fewstep.from_potentials(f, g, x, y, **weights, eps=0.7).value

    assert gradcheck(value_of, tuple(data[k].requires_grad_() for k in "xy"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_problems_matrices_arrays_and_empty_batches(backend: str) -> None:
    x, y = torch.randn(7, 2), torch.randn(9, 2)
    cu = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 5, 5, 9])
    options = {"eps": [0.5, 1.0], "cu_seqlens": cu, "backend": backend}
    found = fewstep.sinkhorn(x, y, **options)
    again = fewstep.from_potentials(found.f, found.g, x, y, **options)
    assert torch.allclose(again.value, found.value, rtol=1e-5)
    assert torch.allclose(again.cost(), found.cost(), rtol=1e-5)
    assert torch.equal(again.converged, found.converged)
    C = torch.rand(4, 3)
    C[0, 1] = torch.inf
    found = fewstep.sinkhorn(C=C, eps=0.5, backend=backend)
    again = fewstep.from_potentials(found.f, found.g, C=C, eps=0.5, backend=backend)
    assert torch.equal(again.plan(), found.plan())
    arrays = fewstep.from_potentials(
        found.f.numpy(), found.g.numpy(), C=C.numpy(), eps=0.5, backend=backend
    )
    assert isinstance(arrays.value, np.ndarray)
    assert arrays.value == again.value.numpy()
    nothing = torch.zeros(0, 4), torch.zeros(0, 3)
    empty = fewstep.from_potentials(*nothing, C=C[None][:0], eps=0.5, backend=backend)
    assert empty.value.shape == (0,)


def test_messages_of_potentials() -> None:
    x, y, f, g = torch.randn(4, 2), torch.randn(3, 2), torch.zeros(4), torch.zeros(3)
    for change, message in (
        ({"f": g}, r"from_potentials: f must be \(4,\), got \(3,\)"),
        ({"g": g.clone().requires_grad_()}, "from_potentials: g must not require a gradient"),
        ({"f": f / 0, "check_finite": True}, "from_potentials: f must be finite, got 4 NaN"),
        ({"eps": -1.0}, "eps must be positive"),
        ({"y": y[:, :1]}, "y must match x"),
    ):
        with pytest.raises(ValueError, match=message):
            fewstep.from_potentials(**{"f": f, "g": g, "x": x, "y": y, "eps": 0.5} | change)
    large = fewstep.from_potentials(f + 1e9, g - 1e9, x, y, eps=0.5)
    assert large.residual == torch.inf
    assert not large.converged


def normalised(P: Tensor) -> Tensor:
    p = P / P.sum()
    r, c = p.sum(1), p.sum(0)
    h_r, h_c, h = (-torch.special.xlogy(t, t).sum() for t in (r, c, p))
    return 1 - (h_r + h_c - h) / torch.minimum(h_r, h_c)


@pytest.mark.parametrize(
    ("entropy", "backend"), [(0.1, "cpp"), (0.3, "cpp"), (0.9, "cpp"), (0.9, "reference")]
)
def test_the_plan_at_the_temperature_found_has_the_entropy(entropy: float, backend: str) -> None:
    n = 8 if entropy < 0.2 else 9  # plans of equal sides alone may be nearly permutations
    x, y = torch.randn(3, n, 2).double(), torch.randn(3, 8, 2).double()
    x[1], y[1], y[2] = 1e3 * x[1], 1e3 * y[1], y[2] + 5
    given = {"entropy": entropy, "rtol": 1e-3, "tol": 1e-7, "max_iter": 5000, "backend": backend}
    a = torch.rand(n).double() + 0.1
    weighted = {} if entropy < 0.2 else {"a": a / a.sum()}
    for cost, weights in (("sqeuclidean", {}), ("euclidean", weighted)):
        eps = fewstep.eps_for_entropy(x, y, cost=cost, **weights, **given)
        assert eps.shape == (3,)
        solved = {"tol": 1e-9, "max_iter": 50000}
        result = fewstep.sinkhorn(x, y, eps=eps, cost=cost, **weights, **solved)
        for P in result.plan():
            assert abs(normalised(P) - entropy) < 3e-3


def test_temperatures_of_matrices_functions_and_arrays() -> None:
    x, y = torch.randn(9, 2), torch.randn(9, 2)
    eps = fewstep.eps_for_entropy(x, y, entropy=0.4)
    assert eps.shape == ()
    assert eps.dtype == torch.float32
    C = torch.cdist(x, y).square()
    assert abs(fewstep.eps_for_entropy(C=C, entropy=0.4) / eps - 1) < 2e-2
    arrays = fewstep.eps_for_entropy(x.numpy(), y.numpy(), entropy=0.4)
    assert isinstance(arrays, np.ndarray)
    assert abs(arrays / eps.numpy() - 1) < 1e-6
    called = fewstep.eps_for_entropy(
        x, y, entropy=0.4, cost=lambda x, y: (x - y).square().sum(-1), backend="reference"
    )
    assert abs(called / eps - 1) < 2e-2
    shared = fewstep.eps_for_entropy(x.expand(2, 1, 9, 2), y, entropy=0.4)
    assert torch.allclose(shared, eps.expand(2, 1), rtol=1e-2)
    leaf = x.clone().requires_grad_()
    assert not fewstep.eps_for_entropy(leaf, y, entropy=0.4).requires_grad
    assert fewstep.eps_for_entropy(x[None][:0], y, entropy=0.4).shape == (0,)


def test_messages_of_entropies() -> None:
    x, y = torch.randn(4, 2), torch.randn(3, 2)
    for change, message in (
        ({"entropy": 0.0}, "entropy must be above 0 and below 1, got 0.0"),
        ({"entropy": 1.5}, "entropy must be above 0 and below 1, got 1.5"),
        ({"rtol": 0.0}, "rtol must be above 0 and below 1, got 0.0"),
        ({"max_iter": 0}, "max_iter must be an integer of at least 1, got 0"),
        ({"x": x[:1]}, "entropy must be that of a plan, got 0.5"),
        ({"x": x * 0, "y": y * 0}, "costs must differ, by a finite amount, got 0"),
        ({"x": x * torch.nan}, "x must be finite, got 8 NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            fewstep.eps_for_entropy(**{"x": x, "y": y, "entropy": 0.5} | change)
    with pytest.warns(fewstep.ConvergenceWarning, match="eps_for_entropy: not converged"):
        fewstep.eps_for_entropy(x, y, entropy=0.1, max_iter=1, tol=1e-7)
