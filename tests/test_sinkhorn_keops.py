"""Costs that a user writes, by KeOps and by the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.ops.sinkhorn import dispatch
from tolerances import assert_contract

pytest.importorskip("pykeops")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def formula(x: Any, y: Any) -> Any:
    return ((x - y) ** 2).sum(-1) / (1 + (x * x).sum(-1))


def clouds(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    x, y = torch.randn(2, 9, 3).to(dtype), torch.randn(2, 12, 3).to(dtype)
    a, b = torch.rand(2, 9).to(dtype), torch.rand(2, 12).to(dtype)
    return {"x": x, "y": y, "a": a / a.sum(-1, keepdim=True), "b": b / b.sum(-1, keepdim=True)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"eps": 0.1, "max_iter": 12},
        {"eps": [0.05, 1.0], "max_iter": 4, "reach": 0.7, "anneal": [2.0, 0.5]},
        {"eps": 0.3, "update": "symmetric", "tol": 1e-3, "max_iter": 300},
    ],
    ids=["plain", "unbalanced", "symmetric"],
)
def test_keops_agrees_with_the_reference(options: dict[str, Any]) -> None:
    found, data, v = [], clouds(), torch.randn(2, 12, 3, dtype=torch.float64)
    for backend in ("keops", "reference"):
        leaves = {k: t.clone().requires_grad_() for k, t in data.items()}
        result = fewstep.sinkhorn(**leaves, cost=formula, **options, backend=backend)
        problem, (f, g) = result._problem, result._potentials()
        weights = problem.a.detach(), problem.b.detach()
        grads = (
            dispatch.gradient(backend, problem.points.detached(), f, g, *weights, problem.eps),
        )
        products = result.transport(v), result.transport(v[:, :9], axis=1), result.barycenter()
        found.append((result, grads, products))
    (actual, grads, products), (exact, exact_grads, exact_products) = found
    for name in ("f", "g", "value", "residual"):
        mine, other = getattr(actual, name).detach(), getattr(exact, name).detach()
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-11)
    assert torch.equal(actual.iterations, exact.iterations)
    for mine, other in zip((*grads, *products), (*exact_grads, *exact_products), strict=True):
        assert torch.allclose(mine, other.detach(), rtol=1e-9, atol=1e-10)


def test_keops_is_the_default_for_a_function_and_agrees_with_the_kernels() -> None:
    data = clouds(torch.float32)
    exact = fewstep.sinkhorn(**{k: t.double() for k, t in data.items()}, eps=0.4, cost="l1")
    result = fewstep.sinkhorn(**data, eps=0.4, cost=lambda x, y: (x - y).abs().sum(-1))
    assert result._problem.backend == "keops"
    assert_contract("potential", result.f, exact.f, scale=exact.f)
    assert_contract("value", result.value, exact.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "cpp"}, ValueError, "'cpp' cannot serve .* no costs given as functions"),
        ({"cost": "l1", "backend": "keops"}, ValueError, "'keops' cannot serve .* functions"),
        ({"anneal": 0.5}, ValueError, "anneal must be temperatures for a cost function, got 0.5"),
        ({"cost": 3}, TypeError, "cost must be a name or a function, got 3"),
        ({"exclude_diagonal": True, "backend": "keops"}, ValueError, "no exclude_diagonal"),
    ],
)
def test_bad_functions(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fewstep.sinkhorn(**clouds(), **({"eps": 0.1, "cost": formula} | options))
