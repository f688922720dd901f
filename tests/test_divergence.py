"""`fewstep.sinkhorn_divergence`: three problems, geomloss, gradcheck, positivity, warnings."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fewstep
from fewstep.ops.sinkhorn import divergence
from fewstep.reference.costs import NAMES
from tolerances import CONTRACT, assert_contract, error

# Raised inside torch when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

CONVERGED = {"tol": 1e-12, "max_iter": 20000}


def clouds(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def masses(count: int, total: float = 1.0) -> Tensor:
    w = torch.rand(count, dtype=torch.float64) + 0.1
    w[count // 2] = 0
    return total * w / w.sum()


@pytest.mark.parametrize("update", ["alternating", "symmetric"])
@pytest.mark.parametrize("shape", [(7, 7), (7, 5)])
@pytest.mark.parametrize("reach", [None, 1.5])
def test_value_is_that_of_three_problems(
    update: str, shape: tuple[int, int], reach: float | None
) -> None:
    x, y = clouds((shape[0], 2), (shape[1], 2))
    a, b = masses(shape[0], 1 if reach is None else 2), masses(shape[1])
    options = {"eps": 0.8, "reach": reach, **CONVERGED}
    result = fewstep.sinkhorn_divergence(x, y, a=a, b=b, update=update, **options)
    xy, xx, yy = (
        fewstep.sinkhorn(p, q.clone(), a=v, b=w, **options).value
        for p, q, v, w in ((x, y, a, b), (x, x, a, a), (y, y, b, b))
    )
    expected = xy - xx / 2 - yy / 2 + (0 if reach is None else 0.4 * (a.sum() - b.sum()) ** 2)
    assert torch.allclose(result.value, expected, rtol=1e-9)
    assert result.converged
    assert result.residual <= 1e-12
    assert result.iterations == max(r.iterations for r in (result.xy, result.xx, result.yy))
    assert result.f.shape == a.shape
    assert result.g.shape == b.shape
    assert torch.allclose(result.xx.transport(x), result.xx.plan() @ x)


@pytest.mark.parametrize("reach", [None, 0.5, 2.0])
def test_value_agrees_with_geomloss(reach: float | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        geomloss = pytest.importorskip("geomloss")
        loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.7, reach=reach, scaling=0.999)
        x, y = clouds((20, 2), (15, 2))
        expected = loss(x, y)
    options = {"cost": "half_sqeuclidean", "reach": reach}
    actual = fewstep.sinkhorn_divergence(x, y, eps=0.49, tol=1e-10, max_iter=9999, **options)
    # geomloss's rho is reach^2 for the cost |x - y|^2 / 2, as here.
    assert torch.allclose(actual.value, expected, rtol=1e-3)  # geomloss stops before convergence


@pytest.mark.pairwise
@pytest.mark.parametrize("reach", [None, 1.0])
@pytest.mark.parametrize("cost", NAMES)
@pytest.mark.parametrize("shape", [(3, 3), (4, 3)])
def test_first_and_second_derivatives(
    shape: tuple[int, int], cost: str, reach: float | None
) -> None:
    inputs = [
        t.requires_grad_() for t in clouds((shape[0], 2), (shape[1], 2), *((n,) for n in shape))
    ]

    def value(x: Tensor, y: Tensor, la: Tensor, lb: Tensor) -> Tensor:
        a, b = (w.softmax(-1) if reach is None else w.exp() for w in (la, lb))
        options = {"eps": 0.7, "a": a, "b": b, "cost": cost, "reach": reach}
        return fewstep.sinkhorn_divergence(x, y, **options, **CONVERGED).value

    assert gradcheck(value, inputs, check_forward_ad=True)
    assert gradgradcheck(value, inputs)


@pytest.mark.parametrize("reach", [0.3, 1.0])
def test_unbalanced_gradients_are_those_of_differences(reach: float) -> None:
    """Where geomloss is off by (rho + eps / 2) / (rho + eps)."""
    x, y, u = clouds((30, 3), (40, 3), (30, 3))

    def solved(x: Tensor) -> Tensor:
        return fewstep.sinkhorn_divergence(x, y, eps=0.25, reach=reach, tol=1e-11).value

    x.requires_grad_()
    (grad,) = torch.autograd.grad(solved(x), x)
    x = x.detach()
    difference = (solved(x + 1e-4 * u) - solved(x - 1e-4 * u)) / 2e-4
    assert torch.allclose((grad * u).sum(), difference, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::fewstep.ConvergenceWarning")
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    d=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    relative_eps=st.floats(0.05, 10),
    cost=st.sampled_from(NAMES),
    reach=st.sampled_from([None, 0.5, 3.0]),
)
@settings(max_examples=40, deadline=None)
def test_it_is_a_divergence(
    n: int, m: int, d: int, seed: int, relative_eps: float, cost: str, reach: float | None
) -> None:
    """Never negative, symmetric, 0 for equal clouds; it does not see how mass is split."""
    reach = None if cost == "dot" else reach  # whose costs are negative
    torch.manual_seed(seed)
    x, y = clouds((n, d), (m, d))
    C = fewstep.reference.sinkhorn.cost_matrix(x, y, "sqeuclidean" if cost == "cosine" else cost)
    eps = relative_eps * max(float(C.abs().mean()), 0.1)
    options = {"eps": eps, "cost": cost, "reach": reach, "tol": 1e-9, "max_iter": 20000}
    value = fewstep.sinkhorn_divergence(x, y, **options)
    if not value.converged:
        return
    tiny = 1e-7 * (1 + float(value.xy.value.abs()))
    assert value.value >= -tiny
    back = fewstep.sinkhorn_divergence(y, x, **options).value
    assert abs(value.value - back) <= tiny
    same = fewstep.sinkhorn_divergence(x, x.clone().requires_grad_(), **options)
    assert not same.converged or abs(same.value) <= tiny
    doubled = fewstep.sinkhorn_divergence(torch.cat([x, x]), y, **options).value
    assert abs(value.value - doubled) <= tiny


def test_batches_temperatures_ragged_and_labels_are_problems_alone() -> None:
    x, y = clouds((2, 5, 2), (2, 5, 2))
    eps = torch.tensor([[0.5, 1.0], [2.0, 0.7]]).double()
    whole = fewstep.sinkhorn_divergence(x, y, eps=eps, **CONVERGED)
    assert whole.value.shape == (2, 2)
    assert whole.f.shape == (2, 2, 5)
    ragged = fewstep.sinkhorn_divergence(
        *(torch.cat([t[0], t[1, :3]]) for t in (x, y)),
        cu_seqlens=(torch.tensor([0, 5, 8]), torch.tensor([0, 5, 8])),
        eps=eps,
        reach=1.0,
        **CONVERGED,
    )
    lx, ly = torch.randint(2, (2, 5)), torch.randint(2, (2, 5))
    W = torch.tensor([[0.0, 1.0], [1.0, 0.5]]).double()
    labels = {"labels": (lx, ly), "label_cost": W}
    labelled = fewstep.sinkhorn_divergence(x, y, eps=1.0, **labels, **CONVERGED)
    for i in range(2):
        alone = fewstep.sinkhorn_divergence(x[i], y[i], eps=eps[i], **CONVERGED)
        assert torch.allclose(whole.value[i], alone.value, rtol=1e-9)
        assert torch.allclose(whole.yy.f[i], alone.yy.f, rtol=1e-9)
        assert torch.allclose(whole.xx.barycenter()[i], alone.xx.barycenter(), rtol=1e-9)
        keep = slice(None, 5 - 2 * i)
        for t in range(2):
            alone = fewstep.sinkhorn_divergence(
                x[i, keep], y[i, keep], eps=float(eps[i, t]), reach=1.0, **CONVERGED
            )
            assert torch.allclose(ragged.value[i, t], alone.value, rtol=1e-9)
        labels = {"labels": (lx[i], ly[i]), "label_cost": W}
        alone = fewstep.sinkhorn_divergence(x[i], y[i], eps=1.0, **labels, **CONVERGED)
        assert torch.allclose(labelled.value[i], alone.value, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    x, y = (t.to(dtype).requires_grad_() for t in clouds((60, 3), (60, 3)))
    exact_x, exact_y = (t.detach().double().requires_grad_() for t in (x, y))
    options = {"eps": 0.5, "max_iter": 2000}
    s = fewstep.sinkhorn_divergence(x, y, tol=1e-5, **options)
    exact = fewstep.sinkhorn_divergence(exact_x, exact_y, tol=1e-12, **options)
    assert s.value.dtype == torch.float32
    assert_contract("value", s.xy.value, exact.xy.value)
    grad = torch.autograd.grad(s.value, x)[0]
    assert grad.dtype == dtype
    if dtype == torch.float32:
        expected = torch.autograd.grad(exact.value, exact_x)[0]
        assert error("gradient", grad, expected) <= CONTRACT["gradient"]


def test_symmetric_updates_give_tame_gradients_before_convergence() -> None:
    """Their last step alone leaves plans of any mass."""
    x, y = clouds((200, 3), (200, 3))
    x.requires_grad_()
    anneal = [30.0 * 0.25**k for k in range(7)]
    options = {"eps": 0.0025, "cost": "half_sqeuclidean", "anneal": anneal, "max_iter": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = fewstep.sinkhorn_divergence(x, y, update="symmetric", **options)
    (grad,) = torch.autograd.grad(s.value, x)
    assert grad.norm(dim=-1).max() < 0.1  # moves of 20 where the weights are 1 / 200
    assert torch.allclose(s.xy.plan().sum(0), torch.full((200,), 1 / 200).double())


def test_vmap_jvp_and_compiled_graphs() -> None:
    xs, y, u = clouds((3, 6, 2), (6, 2), (6, 2))

    def value(x: Tensor) -> Tensor:
        return fewstep.sinkhorn_divergence(x, y, eps=1.0, tol=1e-9, max_iter=2000).value

    loop = torch.stack([value(x) for x in xs])
    assert torch.allclose(torch.func.vmap(value)(xs), loop, rtol=1e-12)
    grads = torch.func.vmap(torch.func.grad(value))(xs)
    x = xs[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(x), x, create_graph=True)
    assert torch.allclose(grads[0], grad, rtol=1e-12)
    tangent = torch.func.jvp(value, (xs[0],), (u,))[1]
    assert torch.allclose(tangent, (grad * u).sum(), rtol=1e-12)
    (expected,) = torch.autograd.grad((grad * u).sum(), x)
    mixed = torch.func.vmap(lambda x: torch.func.jvp(torch.func.grad(value), (x,), (u,))[1])(xs)
    assert torch.allclose(mixed[0], expected, rtol=1e-9)
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    (eager,) = torch.autograd.grad(value(x), x)
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], eager)
    assert torch.allclose(eager, grad, rtol=1e-12)


def test_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "_warned", False)
    x, y = clouds((9, 2), (9, 2))
    short = {"eps": 0.01, "max_iter": 2}
    torch.func.vmap(lambda x: fewstep.sinkhorn_divergence(x, y, **short).value)(x[None])
    with pytest.warns(fewstep.ConvergenceWarning, match=r"not converged, the residual is 0\.\d+;"):
        s = fewstep.sinkhorn_divergence(x, y, **short)
    assert not s.converged
    fewstep.sinkhorn_divergence(x, y, **short)  # another warning would be an error


X, Y = torch.zeros(4, 2), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"eps": -1.0}, ValueError, "eps must be positive and finite, got -1.0"),
        ({"reach": (1.0, None, 2.0)}, ValueError, r"reach must be a number or a pair, got \(1.0,"),
        ({"reach": 0.0}, ValueError, "reach must be positive, got 0.0"),
        ({"y": torch.zeros(3, 5)}, ValueError, r"y must match x .* got \(3, 5\)"),
        ({"a": torch.ones(3) / 3}, ValueError, r"a must have shape \(4,\), got \(3,\)"),
        ({"label_cost": torch.zeros(2, 3)}, ValueError, r"label_cost must be square, got \(2, 3\)"),
        ({"cost": "manhattan"}, ValueError, "cost must be one of .* got 'manhattan'"),
        ({"x": X.long()}, TypeError, "x must have a floating dtype, got torch.int64"),
        ({"x": X + math.nan, "check_finite": True}, ValueError, "x must be finite, got 8 NaN"),
    ],
)
def test_bad_input(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"x": X, "y": Y, "eps": 0.1} | options
    with pytest.raises(kind, match=message):
        fewstep.sinkhorn_divergence(arguments.pop("x"), arguments.pop("y"), **arguments)
