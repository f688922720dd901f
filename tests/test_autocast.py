"""Transport under autocast: the numbers are those without it, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep

X, Y = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (40, 50))
LABELS = torch.arange(40) % 3, torch.arange(50) % 3
CU = torch.tensor([0, 15, 40]), torch.tensor([0, 20, 50])
CASES: dict[str, dict[str, Any]] = {
    **{cost: {"cost": cost} for cost in ("sqeuclidean", "euclidean", "cosine", "dot", "l1")},
    "labels": {"cost": "dot", "labels": LABELS, "label_cost": torch.rand(3, 3)},
    "reach": {"cost": "dot", "reach": 1.0},
    "ragged": {"cost": "dot", "cu_seqlens": CU},
    "function": {"cost": lambda x, y: ((x - y) ** 2).sum(-1) / 2},
}
autocast = torch.autocast("cpu", dtype=torch.bfloat16)
Parts = dict[str, Callable[[], Any]]


def parts(options: dict[str, Any]) -> Parts:
    """What there is of a solve, each as a function that can be called elsewhere."""
    x, y, v = (t.clone().requires_grad_() for t in (X, Y, Y))
    result = fewstep.sinkhorn(x, y, eps=3.0, max_iter=20, **options)
    average, image = result.barycenter(implicit=True), result.transport(Y, implicit=True)
    f, g = result.potentials()
    product = result.transport(v)

    def gradient(of: Tensor, *at: Tensor, graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(of, at, retain_graph=True, create_graph=graph)

    def second() -> tuple[Tensor, ...]:
        grads = gradient(result.value.sum(), x, y, graph=True)
        return gradient(sum((t * (1 + t)).sum() for t in grads), x, y)

    return {
        "value": lambda: [result.value],
        "plan": lambda: [] if "cu_seqlens" in options else [result.plan()],
        "barycenter": lambda: [result.barycenter(), average],
        "transport": lambda: [result.transport(X, axis=1), product, image],
        "potentials": lambda: [f, g],
        "gradient": lambda: gradient(result.value.sum(), x, y),
        "second": second,
        "of v": lambda: gradient(product.square().sum(), v),
        "of barycenter": lambda: gradient(average.square().sum(), x, y),
        "of transport": lambda: gradient(image.square().sum(), x, y),
        "of potentials": lambda: gradient(f.square().sum() + g.square().sum(), x, y),
    }


def assert_same(found: Parts, exact: Parts) -> None:
    for name, part in found.items():
        with torch.autocast("cpu", enabled=False):
            expected = exact[name]()
        for mine, other in zip(part(), expected, strict=True):
            assert mine.dtype == torch.float32, name
            assert torch.equal(mine, other), name


@pytest.mark.parametrize("backend", ["cpp", "reference", "keops"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_is_lowered(case: str, backend: str) -> None:
    if (backend == "keops") != (case == "function") and backend != "reference":
        pytest.skip("it does not serve this cost")
    if backend == "keops":
        pytest.importorskip("pykeops")
    options = CASES[case] | {"backend": backend}
    exact = parts(options)
    with autocast:
        inside = parts(options)
        assert_same(inside, exact)
    assert_same(inside, exact)
    outside = parts(options)
    with autocast:
        assert_same(outside, exact)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_divergence_drift_and_forward_mode(backend: str) -> None:
    def divergence(x: Tensor) -> Tensor:
        options = {"eps": 3.0, "cost": "dot", "backend": backend, "max_iter": 20}
        return fewstep.sinkhorn_divergence(x, Y, **options).value

    def second() -> Tensor:
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(divergence(x), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    def drift(form: str) -> Tensor:
        options = {"eps": [0.1, 0.5], "uncond": Y[:10], "guidance": 0.5, "form": form}
        return fewstep.sinkhorn_drift(X, Y, X.flip(0), **options, backend=backend).velocity

    quantities = (
        second,
        lambda: drift("split"),
        lambda: drift("joint"),
        lambda: torch.func.jvp(divergence, (X,), (X,))[1],
        lambda: torch.func.vmap(torch.func.grad(divergence))(X[None])[0],
    )
    for quantity in quantities:
        exact = quantity()
        with autocast:
            assert torch.equal(quantity(), exact)


# Dynamo itself does what the warning is about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("cost", ["dot", "cosine"])
def test_compiled_graphs(cost: str) -> None:
    def loss(x: Tensor) -> Tensor:
        result = fewstep.sinkhorn(x, Y, eps=3.0, cost=cost, max_iter=5, backend="reference")
        return result.value + result.transport(Y).sum()

    x = X.clone().requires_grad_()
    exact = loss(x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with autocast:
        found = compiled(x)
        (grad,) = torch.autograd.grad(found, x)
    assert torch.equal(found, exact)
    assert torch.allclose(grad, torch.autograd.grad(exact, x)[0], rtol=1e-5, atol=1e-8)
