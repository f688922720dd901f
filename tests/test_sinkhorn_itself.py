"""`fewstep.sinkhorn` of a cloud with itself: one potential, each pair once, pairs left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.reference.costs import cost_matrix
from support.sinkhorn import clouds
from tolerances import assert_contract


@pytest.mark.parametrize(
    "options", [{}, {"anneal": 0.25}, {"reach": 1.0}, {"tol": 1e-5}, {"update": "averaged"}]
)
def test_one_potential_for_a_cloud_with_itself(capability: str, options: dict[str, Any]) -> None:
    x = torch.randn(2, 70, 3, dtype=torch.float64)
    a = torch.rand(2, 70, dtype=torch.float64).softmax(-1)
    common = {"eps": 0.3, "update": "symmetric", "max_iter": 30} | options
    single = fewstep.sinkhorn(x, x, a=a, b=a, **common)
    both = fewstep.sinkhorn(x, x.clone(), a=a, b=a.clone(), **common)
    assert torch.equal(single.f, single.g)
    assert torch.allclose(single.f, both.f, rtol=0, atol=1e-12)
    assert torch.allclose(single.value, both.value, rtol=1e-12)
    assert torch.equal(single.iterations, both.iterations)
    short = fewstep.sinkhorn(x.float(), x.float(), a=a.float(), b=a.float(), **common)
    assert short.value.dtype == torch.float32
    again = {k: t.float().double() for k, t in (("x", x), ("a", a))}
    both = fewstep.sinkhorn(again["x"], again["x"].clone(), a=again["a"], b=again["a"], **common)
    if "tol" not in options:
        assert_contract("potential", short.f, both.f, scale=cost_matrix(x, x, "sqeuclidean"))


def test_label_costs_of_a_cloud_with_itself_need_not_be_symmetric() -> None:
    x, labels = torch.randn(12, 2).double(), torch.randint(3, (12,))
    options = {"label_cost": torch.rand(3, 3).double(), "labels": (labels, labels), "eps": 0.3}
    same = fewstep.sinkhorn(x, x, update="symmetric", **options)
    both = fewstep.sinkhorn(x, x.clone(), update="symmetric", **options)
    assert torch.equal(same.f, both.f)
    assert torch.equal(same.value, both.value)


def test_excluded_pairs_have_no_mass() -> None:
    x = torch.randn(2, 9, 2)
    for offset in (True, 2, -3):
        plan = fewstep.sinkhorn(x, x.clone(), eps=0.5, exclude_diagonal=offset).plan()
        diagonal = plan.diagonal(offset=int(offset) if offset is not True else 0, dim1=1, dim2=2)
        assert torch.equal(diagonal, torch.zeros_like(diagonal))
        assert torch.allclose(plan.sum(1), torch.full((2, 9), 1 / 9), rtol=1e-4)
    moved = fewstep.sinkhorn(x, x.clone(), eps=0.05, exclude_diagonal=True)
    assert torch.allclose(moved.transport(x), moved.plan() @ x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(1, 1, 3), (2, 31, 2), (1, 33, 17), (2, 150, 1), (1, 700, 5)], ids=str
)
@pytest.mark.parametrize(
    "options",
    [
        {"eps": 0.3, "max_iter": 2},
        {"eps": 0.02, "max_iter": 1, "anneal": 0.5},
        {"eps": 1e-4, "max_iter": 1},  # whose first sums leave the range of float32
        {"eps": 0.1, "max_iter": 2, "cost": "euclidean"},
        {"eps": 0.1, "max_iter": 2, "cost": "l1", "reach": 1.0},
        {"eps": 3.0, "max_iter": 2, "cost": "dot"},
        {"eps": 1.0, "max_iter": 2, "exclude_diagonal": True},
        {"eps": [0.1, 1.0], "max_iter": 50, "tol": 1e-3, "memory_limit": 0},
    ],
    ids=str,
)
def test_each_pair_of_x_with_itself_once(
    capability: str, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    """Few iterations keep no kernel: then the C++ looks at one triangle of the pairs."""
    B, N, D = shape
    if "exclude_diagonal" in options and N < 3:
        pytest.skip("too few pairs are left")
    data = clouds((B, N, N, D))
    z = data["x"]
    w = data["a"] if N > 1 else torch.ones_like(data["a"])
    scale = cost_matrix(z, z, "sqeuclidean").max().clamp(min=1)

    def run(dtype: torch.dtype, backend: str) -> tuple[fewstep.SinkhornResult, Tensor]:
        x, a = z.to(dtype).requires_grad_(), w.to(dtype)
        result = fewstep.sinkhorn(x, x, a=a, b=a, update="symmetric", backend=backend, **options)
        return result, torch.autograd.grad(result.value.sum(), x)[0]

    exact, exact_grad = run(torch.float64, "reference")
    for dtype in (torch.float32, torch.float64):
        result, grad = run(dtype, "cpp")
        assert torch.equal(result.f, result.g)
        assert_contract("potential", result.f, exact.f.detach(), scale=scale)
        # Where the cost is nearly 0, what remains is the rounding of large costs.
        assert_contract("value", result.value, exact.value.detach(), scale=scale)
        if options["eps"] != 1e-4:
            assert_contract("plan", result.residual, exact.residual.detach(), scale=torch.ones(1))
        # Gradients of the two roles cancel where the cost is small.
        size = 1e-6 if dtype == torch.float32 else 1e-13
        assert (grad - exact_grad).norm() <= 1e-4 * exact_grad.norm() + size * scale
