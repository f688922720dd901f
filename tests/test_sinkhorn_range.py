"""`fewstep.sinkhorn` keeps its digits: temperatures and points far above and below the costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fewstep
from fewstep.reference.costs import cost_matrix
from support.sinkhorn import clouds
from tolerances import assert_contract

FLAT: dict[str, dict[str, Any]] = {
    "plain": {},
    "symmetric": {"update": "symmetric"},
    "over-relaxed": {"relax": 1.5},
    "annealed": {"anneal": [3e7, 3e6]},
    "reach": {"reach": 3e3},
    "several eps": {"eps": [3e3, 3e5]},
    "each its eps": {"eps": torch.tensor([3e3, 1e4])},
    "init": {"init": (torch.ones(2, 40), torch.arange(140.0).reshape(2, 70) / 140)},
    "labels": {"label_cost": torch.eye(3, 4), "labels": (torch.zeros(2, 40, dtype=int),) * 2},
    "ragged": {"cu_seqlens": (torch.tensor([0, 30, 80]), torch.tensor([0, 90, 140]))},
    "matrix": {},
    "itself": {"update": "symmetric"},
    "weights": {},
    "tol": {"tol": 1e-9},
}


@pytest.mark.parametrize("name", FLAT)
def test_temperatures_far_above_all_costs(name: str) -> None:
    """Beside eps float32 does not tell costs from 0."""
    x, y = (clouds((2, 40, 70, 3))[k] for k in "xy")
    options: dict[str, Any] = {"eps": 3e5, "max_iter": 3} | FLAT[name]
    if name == "labels":
        options["labels"] = torch.randint(3, (2, 40)), torch.randint(4, (2, 70))
    if name == "ragged":
        x, y = x.flatten(0, 1), y.flatten(0, 1)
    if name == "weights":  # that sum to 1 exactly
        options |= {"a": torch.eye(2, 40), "b": torch.eye(2, 70) / 2 + torch.eye(2, 70).flip(1) / 2}
    points = (x, x) if name == "itself" else (x, y)
    C = cost_matrix(x, points[1], "sqeuclidean")
    found = []
    for dtype, backend in ((torch.float32, "cpp"), (torch.float64, "reference")):

        def cast(v: Any, dtype: torch.dtype = dtype) -> Any:
            if isinstance(v, tuple):
                return tuple(cast(t) for t in v)
            floats = isinstance(v, Tensor) and v.is_floating_point()
            return v.to(dtype) if floats else v

        given = {k: cast(v) for k, v in options.items()}
        leaf = (C if name == "matrix" else x).to(dtype).requires_grad_()
        where = {"x": leaf, "y": leaf if name == "itself" else y.to(dtype)}
        if name == "matrix":
            where = {"x": None, "y": None, "C": leaf}
        result = fewstep.sinkhorn(**where, **given, backend=backend)
        found.append((result, *torch.autograd.grad(result.value.sum(), leaf)))
    (actual, grad), (exact, expected) = found
    for quantity, kind in (("f", "one step"), ("g", "one step"), ("value", "value")):
        right = getattr(exact, quantity).detach()
        assert_contract(kind, getattr(actual, quantity), right, scale=C)
    assert torch.equal(actual.iterations, exact.iterations)
    assert_contract("gradient", grad, expected)


def test_divergence_far_below_the_temperature() -> None:
    """Half that with eps infinite: the squared distance of the means."""
    x, y = torch.rand(300, 3) * 1e-3, torch.rand(200, 3) * 1e-3
    divergence = fewstep.sinkhorn_divergence(x, y, eps=0.05).value.item()
    means = (x.double().mean(0) - y.double().mean(0)).square().sum().item()
    assert divergence == pytest.approx(means, rel=1e-3)


@given(
    n=st.integers(1, 60),
    m=st.integers(1, 60),
    d=st.sampled_from([1, 2, 7, 2000]),
    seed=st.integers(0, 10**6),
    log_eps=st.floats(-4, 1),
    offset=st.sampled_from([0.0, 1e4]),
    outlier=st.sampled_from([0.0, 100.0]),
    zeros=st.booleans(),
    iterations=st.sampled_from([1, 3, 40]),
)
@settings(max_examples=150)
def test_float32_keeps_the_contract(
    n: int,
    m: int,
    d: int,
    seed: int,
    log_eps: float,
    offset: float,
    outlier: float,
    zeros: bool,
    iterations: int,
) -> None:
    """At every temperature from 1e-4 of the mean cost on, with and without kept kernels."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(k, d, generator=generator) for k in (n, m))
    x[0] += outlier
    x[n // 2] = x[0]  # a duplicate
    x, y = x + offset, y + offset
    a, b = (torch.rand(k, generator=generator) + 0.1 for k in (n, m))
    if zeros and n > 1 and m > 1:
        a[-1] = b[0] = 0
    a, b = a / a.sum(), b / b.sum()
    C = cost_matrix(x[None].double(), y[None].double(), "sqeuclidean")
    options = {"eps": 10**log_eps * max(float(C.mean()), 1e-6), "max_iter": iterations}
    exact = fewstep.sinkhorn(
        x.double(), y.double(), a=a.double(), b=b.double(), backend="reference", **options
    )
    for limit in (2**20, 0):
        result = fewstep.sinkhorn(x, y, a=a, b=b, memory_limit=limit, **options)
        kind = "one step" if iterations == 1 else "potential"
        assert_contract(kind, result.f, exact.f, scale=C)
        assert_contract(kind, result.g, exact.g, scale=C)
        assert_contract("value", result.value, exact.value, scale=C)
