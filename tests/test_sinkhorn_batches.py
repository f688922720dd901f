"""Several problems in one call of `fewstep.sinkhorn`: ragged, and of several temperatures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from support.sinkhorn import clouds


def ragged(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Four problems, the second without points."""
    cu = torch.tensor([0, 5, 5, 22, 55]), torch.tensor([0, 7, 7, 9, 60])
    parts = []
    for n, m in zip(cu[0].diff().tolist(), cu[1].diff().tolist(), strict=True):
        if n > 0:
            parts.append({k: t[0] for k, t in clouds((1, n, m, 3)).items()})
        if n > 0 and m < 3:
            parts[-1]["b"] = torch.full((m,), 1 / m).double()
    return {k: torch.cat([p[k] for p in parts]).to(dtype) for k in parts[0]}, cu


@pytest.mark.parametrize(
    "options",
    [
        {"eps": torch.tensor([0.3, 1.0, 0.1, 0.5], dtype=torch.float64), "tol": 1e-3},
        {"eps": [0.3, 2.0], "max_iter": 9, "anneal": 0.5},
        {"eps": 0.2, "max_iter": 9, "reach": (1.0, 2.0), "update": "symmetric"},
    ],
    ids=["tol", "several eps", "unbalanced"],
)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_ragged_problems_are_those_alone(
    backend: str, options: dict[str, Any], capability: str
) -> None:
    data, cu = ragged()
    leaves = {k: t.requires_grad_() for k, t in data.items()}
    flat = fewstep.sinkhorn(**leaves, cu_seqlens=cu, **options, backend=backend)
    v = torch.randn(60, 4, dtype=torch.float64)
    moved, back = flat.transport(v), flat.transport(data["x"].detach(), axis=1)
    grads = torch.autograd.grad(flat.value.sum(), list(leaves.values()))
    for i in (0, 2, 3):
        rows, columns = (slice(int(c[i]), int(c[i + 1])) for c in cu)
        own = {k: leaves[k][rows if k in "xa" else columns] for k in leaves}
        mine = options | {
            "eps": options["eps"][i] if isinstance(options["eps"], Tensor) else options["eps"]
        }
        alone = fewstep.sinkhorn(**own, **mine, backend=backend)
        assert torch.allclose(flat.f[..., rows], alone.f, rtol=0, atol=1e-12)
        assert torch.allclose(flat.g[..., columns], alone.g, rtol=0, atol=1e-12)
        assert torch.allclose(flat.value[i], alone.value, rtol=0, atol=1e-12)
        assert torch.equal(flat.iterations[i], alone.iterations)
        assert torch.allclose(moved[..., rows, :], alone.transport(v[columns]), atol=1e-13)
        x = data["x"].detach()[rows]
        assert torch.allclose(back[..., columns, :], alone.transport(x, axis=1), atol=1e-13)
        bary = flat.barycenter()[..., rows, :]
        assert torch.allclose(bary, alone.barycenter(), rtol=0, atol=1e-12)
        expected = torch.autograd.grad(alone.value.sum(), list(own.values()))
        for name, grad, other in zip(leaves, grads, expected, strict=True):
            part = grad[rows if name in "xa" else columns]
            assert torch.allclose(part, other, rtol=0, atol=1e-12)
    assert flat.value[1].abs().sum() == 0
    assert flat.iterations[1].sum() == 0


def test_ragged_uniform_weights() -> None:
    data, cu = ragged()
    flat = fewstep.sinkhorn(data["x"], data["y"], eps=0.4, cu_seqlens=cu)
    alone = fewstep.sinkhorn(data["x"][5:22], data["y"][7:9], eps=0.4)
    assert torch.allclose(flat.f[5:22], alone.f, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_several_temperatures_are_those_alone(backend: str, capability: str) -> None:
    data = clouds((2, 20, 30, 3))
    eps = torch.tensor([[0.1, 1.0, 5.0], [0.3, 0.2, 4.0]], dtype=torch.float64)
    leaves = {k: t.requires_grad_() for k, t in data.items()}
    result = fewstep.sinkhorn(**leaves, eps=eps, max_iter=12, backend=backend)
    assert result.f.shape == (2, 3, 20)
    assert result.value.shape == (2, 3)
    v = torch.randn(2, 30, 2, dtype=torch.float64)
    w = torch.randn(2, 3, 30, 2, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(result.value.sum(), list(leaves.values()))
    total = [torch.zeros_like(g) for g in grads]
    for t in range(3):
        alone = fewstep.sinkhorn(**leaves, eps=eps[:, t], max_iter=12, backend=backend)
        assert torch.allclose(result.f[:, t], alone.f, rtol=0, atol=1e-13)
        assert torch.allclose(result.plan()[:, t], alone.plan(), rtol=0, atol=1e-14)
        assert torch.allclose(result.transport(v)[:, t], alone.transport(v), atol=1e-14)
        assert torch.allclose(result.transport(w)[:, t], alone.transport(w[:, t]), atol=1e-14)
        assert torch.allclose(result.barycenter()[:, t], alone.barycenter(), atol=1e-13)
        for sum_, g in zip(
            total, torch.autograd.grad(alone.value.sum(), list(leaves.values())), strict=True
        ):
            sum_ += g
    for mine, other in zip(grads, total, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(result.transport, w)
