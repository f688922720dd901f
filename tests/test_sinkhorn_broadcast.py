"""Clouds and weights that problems share, and several leading dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep

pytestmark = pytest.mark.filterwarnings("ignore::fewstep.ConvergenceWarning")
BACKENDS = ["cpp", "reference"]
OPTIONS: dict[str, Any] = {"eps": 0.5, "max_iter": 30}


def grads(result: Any, *leaves: Tensor) -> tuple[Tensor, ...]:
    scale = torch.arange(1, result.value.numel() + 1).reshape(result.value.shape)
    return torch.autograd.grad((result.value * scale).sum(), leaves, retain_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [fewstep.sinkhorn, fewstep.sinkhorn_divergence])
@pytest.mark.parametrize("shared", ["x", "y"])
def test_a_shared_cloud_is_one_for_every_problem(op: Any, shared: str, backend: str) -> None:
    own, one = torch.randn(3, 5, 2).double(), torch.randn(4, 2).double().requires_grad_()
    w = torch.rand(4).double().requires_grad_()
    own.requires_grad_()

    def solve(one: Tensor, w: Tensor) -> Any:
        x, y, weights = (one, own, {"a": w}) if shared == "x" else (own, one, {"b": w})
        return op(x, y, **weights, **OPTIONS, backend=backend)

    normal = w / w.sum()
    found = solve(one, normal)
    each = solve(one.expand(3, 4, 2), normal.expand(3, 4))
    assert found.value.shape == (3,)
    assert torch.equal(found.value, each.value)
    for got, expected in zip(grads(found, own, one, w), grads(each, own, one, w), strict=True):
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)
    mixed = solve(one, normal.expand(3, 4)), solve(one.expand(1, 4, 2), normal[None])
    for result in mixed:
        assert torch.equal(result.value, each.value)
    ot = found if op is fewstep.sinkhorn else found.xy
    alike = each if op is fewstep.sinkhorn else each.xy
    assert torch.equal(ot.plan(), alike.plan())
    assert torch.equal(ot.barycenter(), alike.barycenter())
    assert torch.allclose(ot.cost(), alike.cost(), rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_leading_dimensions_are_a_flat_batch(backend: str) -> None:
    x, y = torch.randn(2, 3, 5, 2), torch.randn(3, 4, 2)
    a, eps = torch.rand(2, 1, 5) + 0.1, torch.rand(2, 3) + 0.5
    a = a / a.sum(-1, keepdim=True)
    labels = torch.randint(2, (3, 5)), torch.randint(2, (4,))
    extra = {"label_cost": torch.rand(2, 2), "max_iter": 9, "backend": backend}
    found = fewstep.sinkhorn(x, y, a=a, labels=labels, eps=eps, **extra)
    flat = fewstep.sinkhorn(
        x.reshape(6, 5, 2),
        y.expand(2, 3, 4, 2).reshape(6, 4, 2),
        a=a.expand(2, 3, 5).reshape(6, 5),
        labels=(labels[0].repeat(2, 1), labels[1].repeat(6, 1)),
        eps=eps.flatten(),
        **extra,
    )
    v = torch.rand(2, 3, 4, 3)
    pairs = [
        *((getattr(found, n), getattr(flat, n)) for n in ("f", "g", "value", "residual", "eps")),
        (found.plan(), flat.plan()),
        (found.barycenter(), flat.barycenter()),
        (found.cost(), flat.cost()),
        (found.entropy(), flat.entropy()),
        (found.transport(v), flat.transport(v.reshape(6, 4, 3))),
        (found.assignment(), flat.assignment()),
        *zip(found.potentials(), flat.potentials(), strict=True),
    ]
    for got, expected in pairs:
        assert got.shape == (2, 3, *expected.shape[1:])
        assert torch.equal(got.flatten(0, 1), expected)
    seeds = (torch.Generator().manual_seed(0) for _ in range(2))
    drawn = (r.sample(5, generator=s) for r, s in zip((found, flat), seeds, strict=True))
    assert all(torch.equal(i.flatten(0, -2), j) for i, j in zip(*drawn, strict=True))
    again = fewstep.sinkhorn(x, y, a=a, labels=labels, eps=eps, init=(found.f, found.g), **extra)
    assert again.f.shape == (2, 3, 5)
    several = fewstep.sinkhorn(x, y, eps=[0.5, 1.0, 2.0, 3.0], **extra | {"label_cost": None})
    assert several.f.shape == (2, 3, 4, 5)
    assert several.transport(y.expand(2, 3, 4, 2)[:, :, None].expand(2, 3, 4, 4, 2)).shape == (
        *(2, 3, 4, 5, 2),
    )
    C = torch.rand(2, 1, 5, 4)
    costs = fewstep.sinkhorn(C=C, a=a[0, 0], eps=0.3, backend=backend)
    assert costs.f.shape == (2, 1, 5)
    one = fewstep.sinkhorn(C=C[1, 0], a=a[0, 0], eps=0.3, backend=backend)
    assert torch.equal(costs.value[1, 0], one.value)


def test_a_shared_cloud_is_not_copied() -> None:
    x, y = torch.randn(50, 3, 2), torch.randn(4, 2)
    for cloud in (y, y[None], y[None, None]):
        points = fewstep.sinkhorn(x, cloud, eps=0.5)._problem.points
        assert points.y.data_ptr() == y.data_ptr()
        assert points.y.stride(0) == 0


def test_empty_batches_of_any_dimensions() -> None:
    x, y = torch.randn(2, 0, 5, 2), torch.randn(4, 2)
    result = fewstep.sinkhorn(x, y, eps=0.5)
    assert result.value.shape == (2, 0)
    assert result.plan().shape == (2, 0, 5, 4)
    assert fewstep.sinkhorn_divergence(x, y, eps=0.5).value.shape == (2, 0)


def test_transforms_and_graphs_with_a_shared_cloud() -> None:
    x, y = torch.randn(2, 3, 5, 2), torch.randn(4, 2)

    def value(x: Tensor, y: Tensor) -> Tensor:
        return fewstep.sinkhorn(x, y, eps=0.5).value

    whole = value(x, y)
    mapped = torch.func.vmap(value, in_dims=(0, None))(x, y)
    assert torch.allclose(mapped, whole, rtol=1e-6)
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    leaf = y.clone().requires_grad_()
    (grad,) = torch.autograd.grad(compiled(x, leaf).sum(), leaf)
    (expected,) = torch.autograd.grad(value(x, leaf).sum(), leaf)
    assert torch.allclose(grad, expected, rtol=1e-5)


def test_messages() -> None:
    x = torch.randn(2, 3, 5, 2)
    for change, message in (
        ({"y": torch.randn(2, 4, 2)}, r"y must match x \(2, 3, 5, 2\) except .* got \(2, 4, 2\)"),
        ({"y": torch.randn(4, 3)}, r"y must match x"),
        ({"a": torch.ones(2, 5) / 5}, r"a must have shape \(2, 3, 5\), got \(2, 5\)"),
        ({"a": torch.ones(1, 1, 1, 5) / 5}, r"a must have shape .*got \(1, 1, 1, 5\)"),
        ({"a": torch.ones(3, 1) / 5}, r"a must have shape \(2, 3, 5\), got \(3, 1\)"),
        ({"eps": torch.ones(3)}, r"eps must have shape \(2, 3\), or .* got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fewstep.sinkhorn(**{"x": x, "y": torch.randn(4, 2), "eps": 0.5} | change)
