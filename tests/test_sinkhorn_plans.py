"""What a result tells of its plan: marginals, cost, entropy, random pairs, assignments."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import fewstep
from fewstep.ops.sinkhorn import plans
from fewstep.ops.sinkhorn.plans import least_cost
from fewstep.reference.costs import NAMES
from support.sinkhorn import clouds
from tolerances import assert_contract

# Raised inside torch when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

CONVERGED = {"tol": 1e-12, "max_iter": 20000}
W = torch.tensor([[0.0, 0.3], [1.0, 0.1]], dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperatures": {"eps": [0.3, 2.0]},
    "reach": {"reach": (1.0, None)},
    "diagonal": {"exclude_diagonal": 1},
    "labels": {
        "labels": (torch.arange(10).reshape(2, 5) % 2, torch.arange(14).reshape(2, 7) // 7),
        "label_cost": W,
    },
    "euclidean": {"cost": "euclidean"},
    "cosine": {"cost": "cosine", "eps": 0.1},
    "function": {"cost": lambda x, y: (x - y).abs().sum(-1), "backend": "reference"},
}


def solved(options: dict[str, Any], dtype: torch.dtype = torch.float64) -> fewstep.SinkhornResult:
    torch.manual_seed(0)
    data = {k: t.to(dtype) for k, t in clouds((2, 5, 7, 3)).items()}
    options = {k: t.to(dtype) if k == "label_cost" else t for k, t in options.items()}
    return fewstep.sinkhorn(**data, **{"eps": 0.5, "max_iter": 50} | options)


def costs(result: fewstep.SinkhornResult) -> Tensor:
    C = result._problem.points.costs()
    return C[:, None] if result._problem.temperatures else C


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of a problem at a time."""
    monkeypatch.setattr("fewstep.ops.sinkhorn.blocks.BLOCK_PAIRS", 14)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIONS)
def test_sums_are_those_of_the_plan(name: str, dtype: torch.dtype) -> None:
    exact, result = solved(OPTIONS[name]), solved(OPTIONS[name], dtype)
    P, C = exact.plan(), costs(exact)
    rows, columns = result.marginals()
    assert_contract("plan", rows, P.sum(-1))
    assert_contract("plan", columns, P.sum(-2))
    spent = torch.where(P > 0, P * C, 0.0).sum((-1, -2))
    assert_contract("plan", result.cost(), spent)
    p = P / P.sum((-1, -2), keepdim=True)
    r, c = p.sum(-1), p.sum(-2)
    of_r, of_c, joint = (-torch.special.xlogy(t, t) for t in (r, c, p))
    h_r, h_c = of_r.sum(-1), of_c.sum(-1)
    share = 1 - (h_r + h_c - joint.sum((-1, -2))) / torch.minimum(h_r, h_c)
    assert result.entropy().shape == result.value.shape
    assert (result.entropy().double() - share).abs().max() < (1e-12 if dtype == P.dtype else 1e-5)
    assert torch.equal(
        result.assignment(), result.plan().argmax(-1).where(r > 0, result.assignment())
    )


def test_entropy_of_a_permutation_of_the_independent_plan_and_of_one_point() -> None:
    x = torch.randn(6, 2).double()
    cold = fewstep.sinkhorn(x, x.flip(0), eps=1e-3, tol=1e-9, max_iter=9999)
    assert cold.entropy() < 1e-6
    hot = fewstep.sinkhorn(x, x.flip(0), eps=1e6)
    assert hot.entropy() > 1 - 1e-6
    P = fewstep.sinkhorn(x, x + 1, eps=0.8, tol=1e-12).plan()
    expected = -torch.special.xlogy(P, P).sum() / np.log(6) - 1
    assert torch.allclose(fewstep.sinkhorn(x, x + 1, eps=0.8, tol=1e-12).entropy(), expected)
    assert fewstep.sinkhorn(x[:1], x, eps=0.1).entropy() == 1


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("eps", [1e-6, 1e-7, 1e-9])
@pytest.mark.parametrize("options", [{}, {"cost": "euclidean"}, {"cost": "dot"}, {"reach": 0.5}])
def test_entropy_far_from_convergence_at_a_tiny_eps(options: dict[str, Any], eps: float) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(6, 2).double(), torch.randn(5, 2).double()
    result = fewstep.sinkhorn(x, y, eps=eps, max_iter=400, anneal=0.9, **options)
    p = result.plan() / result.plan().sum()
    h_r, h_c, h = (-torch.special.xlogy(t, t).sum() for t in (p.sum(1), p.sum(0), p))
    ulps = torch.finfo(x.dtype).eps * max(result.f.abs().max(), result.g.abs().max()) / eps
    error = (result.entropy() - (1 - (h_r + h_c - h) / min(h_r, h_c))).abs()
    assert error < 16 * ulps


@pytest.mark.parametrize("update", ["alternating", "symmetric"])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("cost", ["dot", "sqeuclidean", "euclidean", "l1"])
def test_the_cost_of_a_point_without_a_partner(update: Any, backend: Any, cost: Any) -> None:
    x, y = torch.randn(2, 2, 2, 3).double()
    a = torch.tensor([[0.0, 1.0], [0.5, 0.5]]).double()  # the first problem has no partner for y_1
    options = {"eps": 0.3, "update": update, "backend": backend, "exclude_diagonal": 0}
    result = fewstep.sinkhorn(x, y, a=a, cost=cost, **options)
    assert result.value[0] == result.cost()[0] == torch.inf
    assert not result.converged[0]
    assert result.cost()[1].isfinite()


def through_weights(x: Tensor, y: Tensor, la: Tensor, lb: Tensor, options: dict[str, Any]) -> Any:
    free = options.get("reach") is not None
    a, b = (w.exp() if free else w.softmax(-1) for w in (la, lb))
    return fewstep.sinkhorn(x, y, a=a, b=b, **{"eps": 0.7} | options, **CONVERGED)


@pytest.mark.parametrize("name", ["plain", "temperatures", "reach", *NAMES])
def test_derivatives_of_the_cost_and_of_the_plan(name: str) -> None:
    options = {"cost": name} if name in NAMES else OPTIONS[name]
    inputs = [torch.randn(s).double().requires_grad_() for s in ((4, 2), (3, 2), (4,), (3,))]
    assert gradcheck(lambda *t: through_weights(*t, options).cost(), inputs, check_forward_ad=True)
    if name in ("plain", "reach"):
        assert gradcheck(lambda *t: through_weights(*t, options).plan(implicit=True), inputs)
        assert gradcheck(lambda *t: through_weights(*t, options).marginals(implicit=True), inputs)
    result = through_weights(*inputs, options)
    eye = torch.eye(3).double()
    if name != "temperatures":
        assert torch.allclose(result.plan(implicit=True), result.transport(eye, implicit=True))
    grads = torch.autograd.grad(result.cost().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grads[0].sum(), inputs[0])


def test_derivatives_of_the_cost_for_a_matrix_and_ragged_points() -> None:
    C = torch.rand(4, 3).double()
    C[1, 2] = torch.inf
    leaf = C.clone().requires_grad_()
    fewstep.sinkhorn(C=leaf, eps=0.5, **CONVERGED).cost().backward()
    step, move = 1e-6, torch.randn(4, 3).double()
    move[1, 2] = 0
    up, down = (
        fewstep.sinkhorn(C=C + s * move, eps=0.5, **CONVERGED).cost() for s in (step, -step)
    )
    assert leaf.grad is not None
    assert torch.allclose((leaf.grad * move).sum(), (up - down) / (2 * step), rtol=1e-6)
    assert leaf.grad[1, 2] == 0
    x, y = torch.randn(7, 2).double().requires_grad_(), torch.randn(9, 2).double()
    cu = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 5, 5, 9])
    options = {"eps": [0.5, 1.0], **CONVERGED}
    flat = fewstep.sinkhorn(x, y, cu_seqlens=cu, **options)
    (grad,) = torch.autograd.grad(flat.cost().sum(), x)
    assert flat.cost().shape == flat.entropy().shape == (3, 2)
    for i in (0, 2):
        rows, columns = slice(cu[0][i], cu[0][i + 1]), slice(cu[1][i], cu[1][i + 1])
        alone = fewstep.sinkhorn(x[rows], y[columns], **options)
        assert torch.allclose(flat.cost()[i], alone.cost(), rtol=1e-10)
        assert torch.allclose(flat.entropy()[i], alone.entropy(), rtol=1e-10)
        expected = torch.autograd.grad(alone.cost().sum(), x)[0][rows]
        assert torch.allclose(grad[rows], expected, rtol=1e-8)


def test_the_cost_under_transforms() -> None:
    x, y = torch.randn(3, 5, 2).double(), torch.randn(4, 2).double()

    def cost(x: Tensor) -> Tensor:
        return fewstep.sinkhorn(x, y, eps=0.5, tol=1e-12).cost()

    alone = torch.stack([torch.func.grad(cost)(one) for one in x])
    assert torch.allclose(torch.func.vmap(torch.func.grad(cost))(x), alone)


# Random pairs


def chi_square(found: Tensor, law: Tensor) -> float:
    """In standard deviations of the statistic, over the cells with any law."""
    expected = law * found.sum()
    kept = expected > 0
    assert not found[~kept].any()
    statistic = ((found - expected)[kept].square() / expected[kept]).sum()
    freedom = kept.sum() - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("name", OPTIONS)
def test_pairs_are_drawn_from_the_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_DRAWN_PAIRS", 2**14)  # about a fifth of them at a time
    monkeypatch.setattr("fewstep.ops.sinkhorn.blocks.BLOCK_PAIRS", 7001)
    result = solved(OPTIONS[name])
    n = 5000
    i, j = result.sample(n, generator=torch.Generator().manual_seed(1))
    P = result.plan()
    assert i.shape == j.shape == (*P.shape[:-2], n)
    for rows, columns, law in zip(
        i.reshape(-1, n), j.reshape(-1, n), P.flatten(0, -3), strict=True
    ):
        found = torch.zeros_like(law).index_put_((rows, columns), torch.ones(n).double(), True)
        assert abs(chi_square(found, law / law.sum())) < 5
        first, second = rows[: n // 2] * 7 + columns[: n // 2], rows[n // 2 :]
        assert abs(torch.corrcoef(torch.stack([first, second]).double())[0, 1]) < 0.05


def test_pairs_of_a_matrix_of_ragged_problems_and_of_arrays() -> None:
    C = torch.rand(6, 4)
    result = fewstep.sinkhorn(C=C, eps=0.2)
    i, j = result.sample(5000, generator=torch.Generator().manual_seed(0))
    found = torch.zeros(6, 4).index_put_((i, j), torch.ones(5000), True)
    assert abs(chi_square(found.double(), result.plan().double())) < 5
    x, y = torch.randn(7, 2), torch.randn(9, 2)
    cu = torch.tensor([0, 3, 7]), torch.tensor([0, 5, 9])
    flat = fewstep.sinkhorn(x, y, cu_seqlens=cu, eps=[0.5, 1.0])
    i, j = flat.sample(100)
    assert i.shape == (2, 2, 100)
    assert i[0].max() < 3 <= i[1].min()
    assert j[0].max() < 5 <= j[1].min()
    same = [flat.sample(9, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*(torch.stack(s) for s in same))
    arrays = fewstep.sinkhorn(x.numpy(), y.numpy(), eps=0.5).sample(5)
    assert all(isinstance(t, np.ndarray) and t.shape == (5,) for t in arrays)
    assert flat.sample(0)[0].shape == (2, 2, 0)
    empty = fewstep.sinkhorn(x[None][:0], y[None][:0], eps=0.5)
    assert empty.sample(3)[0].shape == (0, 3)
    assert empty.cost().shape == empty.entropy().shape == (0,)
    assert empty.assignment().shape == (0, 7)


def test_extreme_uniform_numbers_find_a_share() -> None:
    cdf = torch.tensor([0.0, 0.25, 0.25, 1.0, 1.0]).double()
    u = torch.tensor([0.0, 0.25, 1.0, 1 - 2**-53]).double()
    assert plans._inverse(cdf, u).tolist() == [1, 3, 3, 3]


# Assignments


def by_force(C: Tensor) -> tuple[int, ...]:
    n = len(C)
    return min(itertools.permutations(range(n)), key=lambda j: C[range(n), j].sum().item())


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_the_permutation_is_the_one_of_least_cost(n: int, backend: str) -> None:
    x, y = torch.randn(3, n, 2), torch.randn(3, n, 2)
    for options in ({"max_iter": 1}, {"eps": 0.05}, {"reach": 0.5}):
        result = fewstep.sinkhorn(x, y, **{"eps": 1.0, "backend": backend} | options)
        found = result.assignment("permutation")
        for one, C in zip(found, torch.cdist(x, y).square(), strict=True):
            assert tuple(one.tolist()) == by_force(C)


def test_permutations_of_many_points_and_ragged_ones() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    for n, kind in ((60, "random"), (60, "ties"), (150, "points")):
        C = torch.rand(n, n).double() if kind == "random" else torch.randint(4, (n, n)).double()
        if kind == "points":
            C = torch.cdist(torch.randn(n, 3), torch.randn(n, 3)).square().double()
        rows, columns = optimize.linear_sum_assignment(C.numpy())
        for g in (torch.zeros(n).double(), torch.randn(n).double(), torch.full((n,), torch.inf)):
            found = least_cost(C, g.double())
            assert sorted(found.tolist()) == list(range(n))
            assert abs(C[range(n), found].sum() - C.numpy()[rows, columns].sum()) < 1e-9
    x, y = torch.randn(6, 2), torch.randn(6, 2)
    cu = torch.tensor([0, 4, 6]), torch.tensor([0, 4, 6])
    for kind in ("argmax", "permutation"):
        flat = fewstep.sinkhorn(x, y, cu_seqlens=cu, eps=0.5).assignment(kind)
        parts = [
            fewstep.sinkhorn(x[s], y[s], eps=0.5).assignment(kind) for s in (slice(4), slice(4, 6))
        ]
        assert torch.equal(flat, torch.cat([parts[0], parts[1] + 4]))


def test_rows_without_a_partner_have_no_assignment() -> None:
    C = torch.rand(3, 3)
    C[1] = torch.inf
    result = fewstep.sinkhorn(C=C, eps=0.5, reach=1.0)
    assert result.assignment()[1] == -1
    with pytest.raises(ValueError, match="each row must have a finite cost"):
        result.assignment("permutation")
    C[1, 0] = C[0, 0] = 0.1
    C[0, 1:] = torch.inf
    with pytest.raises(ValueError, match="no permutation has a finite cost"):
        fewstep.sinkhorn(C=C, eps=0.5, reach=1.0).assignment("permutation")
    C[0, 1] = 0.3
    assert fewstep.sinkhorn(C=C, eps=0.5).assignment("permutation").tolist() == [1, 0, 2]
    x = torch.randn(4, 2)
    moved = fewstep.sinkhorn(x, x, eps=0.5, exclude_diagonal=True).assignment("permutation")
    assert (moved != torch.arange(4)).all()


def test_messages() -> None:
    result = solved({})
    for call, kind, message in (
        (lambda: result.sample(-1), ValueError, "n must be an integer of at least 0, got -1"),
        (lambda: result.sample(1.5), ValueError, "n must be an integer .* got 1.5"),
        (lambda: result.sample(3, generator=4), TypeError, "generator must be a torch.Generator"),
        (lambda: result.assignment("best"), ValueError, "kind must be .* got 'best'"),
        (lambda: result.assignment("permutation"), ValueError, "as many points .* got 5 and 7"),
        (lambda: result.plan(implicit=2), TypeError, "implicit must be"),
    ):
        with pytest.raises(kind, match=message):
            call()
    x = torch.randn(3, 2)
    lost = fewstep.sinkhorn(x, x + 100, eps=0.01, reach=0.1, max_iter=5)
    with pytest.raises(ValueError, match="the plan must have a finite mass above 0"):
        lost.sample(3)
    cu = torch.tensor([0, 3, 3]), torch.tensor([0, 3, 3])
    with pytest.raises(ValueError, match="each problem must have points"):
        fewstep.sinkhorn(x, x, eps=0.5, cu_seqlens=cu).sample(3)
    result = fewstep.sinkhorn(x, x + 1, eps=0.5)
    x.mul_(2)
    for name, arguments in {"cost": (), "entropy": (), "marginals": (), "sample": (2,)}.items():
        with pytest.raises(RuntimeError, match=rf"^{name}: x has changed in place"):
            getattr(result, name)(*arguments)
    with pytest.raises(RuntimeError, match="assignment: x has changed in place"):
        result.assignment()
