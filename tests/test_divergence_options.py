"""Options of `fewstep.sinkhorn_divergence`: each is that of the three problems it is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import fewstep
from fewstep.reference.costs import cost_matrix

# Raised inside torch when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

CONVERGED: dict[str, Any] = {"eps": 0.8, "tol": 1e-12, "max_iter": 20000}
BACKENDS = ["cpp", "reference"]


def problem() -> dict[str, Tensor]:
    torch.manual_seed(0)
    w = [torch.rand(n).double() + 0.1 for n in (6, 5)]
    points = {"x": torch.randn(6, 2).double(), "y": torch.randn(5, 2).double() + 0.4}
    return points | {"a": w[0] / w[0].sum(), "b": w[1] / w[1].sum()}


def matrices(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return tuple(cost_matrix(p, q, "sqeuclidean") for p, q in ((x, y), (x, x), (y, y)))


def three(data: dict[str, Tensor], selves: dict[str, Any], **options: Any) -> Tensor:
    """From separate problems, of points that are no one tensor."""
    x, y, a, b = data.values()
    xy = fewstep.sinkhorn(x, y, a=a, b=b, **options)
    xx = fewstep.sinkhorn(x, x.clone(), a=a, b=a, **options | selves)
    yy = fewstep.sinkhorn(y, y.clone(), a=b, b=b, **options | selves)
    return xy.value - xx.value / 2 - yy.value / 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_as_reach(backend: str) -> None:
    data = problem()
    data["a"] = 1.7 * data["a"]
    for pair in ((0.7, 2.0), (None, 1.0)):
        x, y, a, b = data.values()
        options = CONVERGED | {"backend": backend}
        xy, xx, yy = (
            fewstep.sinkhorn(p, q.clone(), a=v, b=w, reach=r, **options).value
            for p, q, v, w, r in ((x, y, a, b, pair), (x, x, a, a, pair[0]), (y, y, b, b, pair[1]))
        )
        expected = xy - (xx + yy) / 2 + 0.4 * (a.sum() - b.sum()) ** 2
        found = fewstep.sinkhorn_divergence(**data, reach=pair, **options)
        assert torch.allclose(found.value, expected, rtol=1e-9)
    same = fewstep.sinkhorn_divergence(**data, reach=(1.2, 1.2), **CONVERGED)
    for one in (1.2, torch.tensor([1.2, 1.2], dtype=torch.float64), np.array([1.2, 1.2])):
        other = fewstep.sinkhorn_divergence(**data, reach=one, **CONVERGED)
        assert torch.equal(same.value, other.value)

    def value(x: Tensor, la: Tensor) -> Tensor:
        more = {"x": x, "a": la.exp()}
        return fewstep.sinkhorn_divergence(**data | more, reach=(0.7, 2.0), **CONVERGED).value

    assert gradcheck(value, (data["x"].requires_grad_(), torch.randn(6).double().requires_grad_()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_of_a_point_with_itself_are_left_out(backend: str) -> None:
    data, options = problem(), CONVERGED | {"backend": backend, "exclude_diagonal": True}
    found = fewstep.sinkhorn_divergence(**data, **options)
    plain = options | {"exclude_diagonal": False}
    expected = three(data, {"exclude_diagonal": True}, **plain)
    assert torch.allclose(found.value, expected, rtol=1e-9)
    assert found.xx.plan().diagonal().eq(0).all()
    assert found.xy.plan().gt(0).all()
    x = data["x"].requires_grad_()
    assert gradcheck(lambda x: fewstep.sinkhorn_divergence(**data | {"x": x}, **options).value, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_are_the_costs_of_points(backend: str, dtype: torch.dtype) -> None:
    data = problem()
    points = fewstep.sinkhorn_divergence(**data, **CONVERGED)
    x, y, a, b = (t.to(dtype) for t in data.values())
    options = {"eps": 0.8, "max_iter": 300, "backend": backend}
    C = tuple(t.requires_grad_() for t in matrices(x, y))
    found = fewstep.sinkhorn_divergence(C=C, a=a, b=b, **options)
    most = 1e-5 if dtype == torch.float32 else 1e-9
    assert abs(found.value.item() - points.value.item()) < most
    grads = torch.autograd.grad(found.value, C)
    problems = zip(grads, (points.xy, points.xx, points.yy), (1, -0.5, -0.5), strict=True)
    for grad, result, share in problems:
        assert torch.allclose(grad.double(), share * result.plan(), atol=1e-5)
    batched = tuple(t.detach().expand(2, *t.shape) for t in C)
    several = fewstep.sinkhorn_divergence(C=batched, a=a, b=b, **options)
    assert torch.equal(several.value, found.value.detach().expand(2))
    shared = fewstep.sinkhorn_divergence(C=(batched[0], *C[1:]), a=a, b=b, **options)
    assert torch.allclose(shared.value, several.value)
    arrays = fewstep.sinkhorn_divergence(
        C=tuple(t.detach().numpy() for t in C), a=a.numpy(), b=b.numpy(), **options
    )
    assert isinstance(arrays.value, np.ndarray)
    assert arrays.value == found.value.detach().numpy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_warm_starts_and_relaxed_updates_end_where_cold_ones_do(backend: str) -> None:
    data, options = problem(), {"eps": 0.3, "tol": 1e-9, "max_iter": 9999, "backend": backend}
    cold = fewstep.sinkhorn_divergence(**data, **options)
    potentials = (cold.xy.f, cold.xy.g, cold.xx.f, cold.yy.f)
    for init in (potentials, potentials[:2]):
        warm = fewstep.sinkhorn_divergence(**data, init=init, **options)
        assert torch.allclose(warm.value, cold.value, rtol=1e-7)
        assert warm.xy.iterations <= 2 < cold.xy.iterations
        assert (warm.xx.iterations <= 2) == (len(init) == 4)
    relaxed = fewstep.sinkhorn_divergence(**data, relax=1.4, **options)
    assert torch.allclose(relaxed.value, cold.value, rtol=1e-7)
    assert relaxed.xy.iterations < cold.xy.iterations
    several = options | {"eps": [0.3, 0.5]}
    cold = fewstep.sinkhorn_divergence(**data, **several)
    init = (cold.xy.f, cold.xy.g, cold.xx.f, cold.yy.f)
    warm = fewstep.sinkhorn_divergence(**data, init=init, **several)
    assert torch.allclose(warm.value, cold.value, rtol=1e-7)
    assert torch.allclose(warm.f, cold.f, atol=1e-6)


def test_messages() -> None:
    data = problem()
    C = matrices(data["x"], data["y"])
    crooked = C[1].clone()
    crooked[0, 1] += 1
    zeros = torch.zeros(6).double(), torch.zeros(5).double()
    none: dict[str, Any] = {"x": None, "y": None}
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"C": C}, ValueError, "x must be None with a cost matrix C"),
        (none, TypeError, "x must be a Tensor, got NoneType"),
        (none | {"C": C[:2]}, TypeError, r"C must be a tuple \(C_xy, C_xx, C_yy\), got 2"),
        (none | {"C": C[0]}, TypeError, "C must be a tuple .* got Tensor"),
        (none | {"C": (C[0], C[2], C[1])}, ValueError, r"C_xx must be \[.., 6, 6\] .* \(5, 5\)"),
        (none | {"C": (C[0], crooked, C[2])}, ValueError, "C_xx must be symmetric"),
        ({"init": zeros[:1]}, TypeError, "init must be potentials .* got 1 of them"),
        ({"init": zeros[::-1]}, ValueError, r"init f must be \(6,\), got \(5,\)"),
        ({"init": (*zeros, *zeros[::-1])}, ValueError, r"init f must be \(6,\), got \(5,\)"),
        ({"relax": 2.0}, ValueError, "relax must be above 0 and below 2, got 2.0"),
        ({"exclude_diagonal": 3}, TypeError, "exclude_diagonal must be"),
    ]
    for change, kind, message in bad:
        with pytest.raises(kind, match=message):
            fewstep.sinkhorn_divergence(**data | {"eps": 0.5} | change)
