"""A rule against derivatives of the same network in float64: traces, products and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fewstep

F64 = torch.float64
Function = Callable[[Tensor], Any]
W = torch.linspace(-1, 1, 16, dtype=F64).reshape(4, 4)
V = torch.linspace(0.5, 2, 4, dtype=F64)


def velocity_of(f: Function, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A network that has f between two linear maps, and no f of which is known whole."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        h = x.flatten(1)
        h = F.linear(h, weight).tanh() + 0.1 * h
        return f(h.view(x.shape)).reshape(x.shape) + 0.1 * t

    return velocity


def jacobians(v: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
    """`[B, D, D]`, of each sample among all the others, differentiable."""
    J = torch.autograd.functional.jacobian(lambda y: v(y, t).flatten(1), x, create_graph=True)
    assert isinstance(J, Tensor)
    B = x.shape[0]
    return J.flatten(3).diagonal(dim1=0, dim2=2).movedim(-1, 0)[:B]


def check(f: Function, shape: tuple[int, ...], rtol: float, right: Function | None = None) -> None:
    torch.manual_seed(4)
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    d = x[0].numel()
    weight = (torch.randn(d, d, dtype=F64) / d**0.5).requires_grad_()
    v, t = velocity_of(f, weight), torch.tensor(0.3, dtype=F64)
    known = v if right is None else velocity_of(right, weight)
    whole = jacobians(known, x, t)
    exact = whole.diagonal(dim1=1, dim2=2).sum(1)
    expected = known(x, t)
    out = fewstep.divergence(v, x, t, estimator="exact")
    assert out.info == ""
    torch.testing.assert_close(out.velocity, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.value, exact, rtol=rtol, atol=rtol)
    with torch.no_grad():
        plain = fewstep.divergence(v, x, t, estimator="exact")
    torch.testing.assert_close(plain.value, out.value, rtol=1e-11, atol=1e-11)
    wanted = (exact.square().sum() + expected.square().sum(), (x, weight))
    found = (out.value.square().sum() + out.velocity.square().sum(), (x, weight))
    for a, b in zip(
        torch.autograd.grad(*found), torch.autograd.grad(*wanted, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=100 * rtol, atol=100 * rtol)
    check_constant(v, x, weight, whole.detach(), expected, rtol)


def check_constant(
    v: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    weight: Tensor,
    whole: Tensor,
    expected: Tensor,
    rtol: float,
) -> None:
    """Tangents beside the primal, which autograd does not see."""
    t, u = torch.tensor(0.3, dtype=F64), torch.randn(2, *x.shape, dtype=F64)
    options: Any = {"engine": "duals", "check": "never"}
    out = fewstep.jvp(v, (x, t), (u, None), **options)
    products = torch.einsum("bij,kbj->kbi", whole, u.flatten(2)).reshape(u.shape)
    torch.testing.assert_close(out.value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.tangent, products, rtol=rtol, atol=rtol)
    one = fewstep.jvp(v, (x, t), (u[1], None), **options)
    torch.testing.assert_close(one.tangent, out.tangent[1], rtol=1e-12, atol=1e-12)
    pair = [
        torch.autograd.grad(z.square().sum(), (x, weight), retain_graph=True)
        for z in (out.value, expected)
    ]
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=100 * rtol, atol=100 * rtol)
