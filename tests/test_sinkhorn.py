"""`fewstep.sinkhorn` on the CPU: the reference against POT and gradcheck, kernels against it."""

from __future__ import annotations

import functools
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fewstep
from fewstep.ops.sinkhorn import dispatch
from fewstep.reference.costs import OF_POINTS, cost_matrix
from fewstep.reference.sinkhorn import Inputs, Points, Schedule
from tolerances import assert_contract, assert_no_worse_than_eager

# B, N, M, D: single points, below and above every tile width, rows left over, several row chunks.
SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 7, 2),
    (2, 33, 65, 3),
    (1, 130, 257, 17),
    (2, 64, 64, 32),
]


def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64, *, weighted: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two clouds and weights, a zero among each where there is more than one point."""
    B, N, M, D = shape
    x, y = torch.randn(B, N, D, dtype=dtype), torch.randn(B, M, D, dtype=dtype) + 0.5
    a, b = torch.rand(B, N, dtype=dtype) + 0.1, torch.rand(B, M, dtype=dtype) + 0.1
    if weighted and N > 1 and M > 1:
        a[:, 0] = 0
        b[:, M // 2] = 0
    return x, y, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def mean_cost(x: Tensor, y: Tensor, cost: str) -> float:
    return float(cost_matrix(x, y, cost).abs().mean())


@pytest.mark.parametrize("cost", OF_POINTS)
@pytest.mark.parametrize("iterations", [1, 7, 800])
def test_reference_agrees_with_pot(cost: str, iterations: int) -> None:
    ot = pytest.importorskip("ot")
    x, y, a, b = (t[0] for t in problem((1, 23, 31, 3), weighted=False))
    C = cost_matrix(x[None], y[None], cost)[0]
    eps = 0.05 * float(C.abs().mean())
    # POT updates the columns first, so the marginals swap roles, and it starts at log u = 0.
    plan = ot.bregman.sinkhorn_log(b, a, C.T, eps, numItermax=iterations, stopThr=0, warn=False).T
    options = {"eps": eps, "a": a, "b": b, "cost": cost, "max_iter": iterations}
    init = (torch.zeros_like(a), -eps * b.log())
    result = fewstep.sinkhorn(x, y, init=init, backend="reference", **options)
    assert (result.plan() - plan).abs().max() < 1e-10
    exact = (plan * C).sum() + eps * (plan * (plan / (a[:, None] * b)).log()).sum()
    if iterations == 800:
        assert abs(result.value - exact) < 1e-10 * abs(exact)


@pytest.mark.parametrize("cost", OF_POINTS)
def test_reference_gradients(cost: str) -> None:
    x, y, _, _ = problem((1, 3, 2, 2))
    la, lb = torch.randn(1, 3, dtype=x.dtype), torch.randn(1, 2, dtype=x.dtype)
    inputs = tuple(t.requires_grad_() for t in (x, y, la, lb))

    def value(x: Tensor, y: Tensor, la: Tensor, lb: Tensor) -> Tensor:
        a, b = la.softmax(-1), lb.softmax(-1)
        return fewstep.sinkhorn(
            x, y, eps=2.0, a=a, b=b, cost=cost, max_iter=40, backend="reference"
        ).value

    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


def test_reference_gradient_at_coinciding_points_is_zero() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    value = fewstep.sinkhorn(x, x.detach(), eps=0.1, cost="euclidean", backend="reference").value
    assert torch.equal(torch.autograd.grad(value, x)[0], torch.zeros_like(x))


Case = tuple[tuple[int, int, int, int], str, torch.dtype]
CASES = [(s, c, d) for s in SHAPES for c in OF_POINTS for d in (torch.float32, torch.float64)]


@dataclass(frozen=True)
class Solved:
    leaves: list[Tensor]
    options: dict
    C: Tensor
    weights: Tensor
    result: fewstep.SinkhornResult
    grads: tuple[Tensor, ...]


@functools.cache
def solved(case: Case, eps: float, iterations: int, dtype: torch.dtype) -> Solved:
    """Inputs rounded to the case's dtype, solved by the reference in `dtype`, with gradients."""
    shape, cost, rounded = case
    torch.manual_seed(1)
    x, y, a, b = leaves = [t.to(rounded).to(dtype).requires_grad_() for t in problem(shape)]
    C = cost_matrix(x.detach(), y.detach(), cost)
    options = {"eps": eps * float(C.double().abs().mean()), "cost": cost, "max_iter": iterations}
    result = fewstep.sinkhorn(x, y, a=a, b=b, backend="reference", **options)
    weights = torch.arange(1, shape[0] + 1, dtype=dtype)
    grads = torch.autograd.grad((result.value * weights).sum(), leaves)
    return Solved(leaves, options, C, weights, result, grads)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(capability: str, case: Case) -> None:
    dtype = case[2]
    for eps, iterations, kind in ((0.2, 1, "one step"), (0.05, 30, "potential")):
        exact = solved(case, eps, iterations, torch.float64)
        eager = solved(case, eps, iterations, dtype)
        x, y, a, b = eager.leaves
        result = fewstep.sinkhorn(x, y, a=a, b=b, backend="cpp", **exact.options)
        assert result.f.dtype == dtype
        assert_contract(kind, result.f, exact.result.f.detach(), scale=exact.C)
        assert_contract(kind, result.g, exact.result.g.detach(), scale=exact.C)
        assert_contract("value", result.value, exact.result.value, scale=exact.C)
        assert_contract("plan", result.plan(), exact.result.plan())
        assert torch.equal(result.iterations, exact.result.iterations)
        for name, scale in (("f", exact.C), ("g", exact.C), ("residual", torch.full((), 10.0))):
            quantities = [getattr(r, name).detach() for r in (result, eager.result, exact.result)]
            assert_no_worse_than_eager(*quantities, scale=scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(capability: str, case: Case) -> None:
    exact = solved(case, 0.1, 40, torch.float64)
    leaves = [t.detach().to(case[2]).requires_grad_() for t in exact.leaves]
    x, y, a, b = leaves
    value = fewstep.sinkhorn(x, y, a=a, b=b, backend="cpp", **exact.options).value
    grads = torch.autograd.grad((value * exact.weights.to(case[2])).sum(), leaves)
    assert all(grad.dtype == case[2] for grad in grads)
    for actual, expected in zip(grads[:2], exact.grads[:2], strict=True):
        assert_contract("gradient", actual, expected)
    for actual, expected in zip(grads[2:], exact.grads[2:], strict=True):  # the potentials
        assert_contract("potential", actual, expected, scale=exact.C)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("width", [1, 3, 16, 70])
def test_transport_is_the_plan_times_v(backend: str, width: int) -> None:
    x, y, a, b = problem((2, 19, 37, 5))
    result = fewstep.sinkhorn(x, y, eps=2.0, a=a, b=b, max_iter=5, backend=backend)
    plan = result.plan()
    v, w = torch.randn(2, 37, width, dtype=x.dtype), torch.randn(2, 19, width, dtype=x.dtype)
    assert torch.allclose(result.transport(v), plan @ v, rtol=0, atol=1e-14)
    assert torch.allclose(result.transport(w, axis=1), plan.mT @ w, rtol=0, atol=1e-14)
    assert torch.allclose(result.transport(v[..., 0]), (plan @ v)[..., 0], rtol=0, atol=1e-14)
    conditional = plan[:, 1:] / a[:, 1:, None]  # the first weight is zero
    bary = result.barycenter(normalize=False)[:, 1:]
    assert torch.allclose(bary, conditional @ y, rtol=0, atol=1e-13)
    bary = result.barycenter()[:, 1:]
    expected = conditional @ y / conditional.sum(-1, keepdim=True)
    assert torch.allclose(bary, expected, rtol=0, atol=1e-13)


def test_transport_gradient() -> None:
    x, y, a, b = problem((2, 6, 5, 2))
    result = fewstep.sinkhorn(x, y, eps=2.0, a=a, b=b, max_iter=5)
    v = torch.randn(2, 5, 3, dtype=x.dtype, requires_grad=True)
    w = torch.randn(2, 6, 3, dtype=x.dtype, requires_grad=True)
    assert torch.autograd.gradcheck(result.transport, v)
    assert torch.autograd.gradgradcheck(result.transport, v)
    assert torch.autograd.gradcheck(lambda w: result.transport(w, axis=1), w)


def test_ops_pass_opcheck() -> None:
    x, y, a, b = problem((2, 9, 6, 3))
    eps = torch.tensor([0.5, 1.0], dtype=x.dtype)
    ops, check = torch.ops.fewstep, torch.library.opcheck
    none = (None,) * 6
    f, g, *_ = dispatch.solve("cpp", Inputs(Points(x, y), a, b, eps, schedule=Schedule(max_iter=5)))
    plain = (5, None, None, 1.0, None, None, None, 1.0, False, False, 2**20, 0, False)
    check(ops.sinkhorn.default, (x, y, a, b, eps, None, None, *none, 0, None, *plain))
    start, steps = eps.new_tensor([2.0, 3.0]), eps.new_tensor([4.0, 3.0])
    full = (50, 1e-3, start, 0.5, steps, 4.0, None, 0.5, True, False, 0, 1, True)
    check(ops.sinkhorn.default, (x, y, a, b, eps, f, g, *none, 2, 1, *full))
    for need in ((True, True), (False, True)):
        tensors = (x, y, a, b, eps, f, g)
        check(ops.sinkhorn_with_grad.default, (*tensors, *none, 2, 1, *full, *need))
    C = torch.rand(2, 9, 6, dtype=x.dtype)
    several = eps.repeat_interleave(3)
    given = (x[..., :0], y[..., :0], a, b, several, None, None, C, *none[1:], 5, None)
    check(ops.sinkhorn.default, (*given, *plain))
    v = torch.randn(2, 6, 4, dtype=x.dtype)
    check(ops.sinkhorn_transport.default, (x, y, f, g, b, eps, v, *none, 1, None))
    check(ops.sinkhorn_grad.default, (x, y, f, g, a, b, eps, *none, 2, None))
    part = (x[:1], y[:1], a[0], g[0], f[0], 0, 2.0, 0.5, 0.1)
    check(ops.sinkhorn_part.default, (*part, True))
    check(ops.sinkhorn_part.default, (*part[:4], None, *part[5:], False))
    cu_x, cu_y = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 3, 3, 6])
    lx, ly = torch.randint(3, (1, 9)), torch.randint(2, (1, 6))
    geometry = (None, cu_x, cu_y, lx, ly, torch.rand(3, 2, dtype=x.dtype), 0, None)
    x, y, a, b = (t[:1] for t in (x, y, a, b))
    six = torch.rand(6, dtype=x.dtype) + 0.5
    check(ops.sinkhorn.default, (x, y, a, b, six, None, None, *geometry, *plain))
    f, g = torch.rand(2, 9, dtype=x.dtype), torch.rand(2, 6, dtype=x.dtype)
    check(ops.sinkhorn_transport.default, (x, y, f, g, b, six, v, *geometry))
    check(ops.sinkhorn_grad.default, (x, y, f, g, a, b, six, *geometry))


def test_raw_ops_refuse_gradients() -> None:
    """Without a rule of their own torch would return zeros."""
    x, y, a, b = problem((1, 4, 4, 2))
    points = Points(x.requires_grad_(), y)
    eps = torch.ones(1, dtype=x.dtype)
    inputs = Inputs(points, a, b, eps, schedule=Schedule(max_iter=5))
    f, g, value, *_ = dispatch.solve("cpp", inputs)
    f, g = f.detach(), g.detach()
    for out in (
        value,
        dispatch.transport("cpp", points, f, g, b, eps, y)[0],
        dispatch.gradient("cpp", points, f, g, a, b, eps),
    ):
        with pytest.raises(NotImplementedError, match="have no gradients"):
            torch.autograd.grad(out.sum(), x)


def test_potentials_of_kernels_are_not_differentiable() -> None:
    x, y, _, _ = problem((1, 4, 4, 2))
    result = fewstep.sinkhorn(x.requires_grad_(), y, eps=1.0, backend="cpp")
    assert result.value.requires_grad
    assert not result.f.requires_grad
    assert not result.residual.requires_grad


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_tol_stops_each_problem_by_itself(backend: str) -> None:
    x, y, a, b = problem((3, 20, 30, 2))
    eps = torch.tensor([0.2, 1.0, 20.0], dtype=x.dtype)
    result = fewstep.sinkhorn(x, y, a=a, b=b, eps=eps, tol=1e-4, max_iter=500, backend=backend)
    assert result.converged.all()
    assert (result.residual <= 1e-4).all()
    assert result.iterations[0] > result.iterations[1] > result.iterations[2]
    plan = result.plan()
    assert torch.allclose((plan.sum(-1) - a).abs().sum(-1), result.residual, rtol=1e-6, atol=1e-15)
    assert torch.allclose(plan.sum(-2), b, rtol=1e-12)
    for i in range(3):
        count = int(result.iterations[i])
        alone = fewstep.sinkhorn(
            x[i], y[i], a=a[i], b=b[i], eps=float(eps[i]), max_iter=count, backend=backend
        )
        assert torch.allclose(alone.f, result.f[i], rtol=1e-14)
        before = fewstep.sinkhorn(
            x[i], y[i], a=a[i], b=b[i], eps=float(eps[i]), max_iter=count - 1, backend=backend
        )
        assert before.residual > 1e-4
    stopped = fewstep.sinkhorn(x, y, eps=0.01, tol=1e-9, max_iter=3, backend=backend)
    assert not stopped.converged.any()
    assert (stopped.iterations == 3).all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_init_continues_where_it_stopped(backend: str) -> None:
    x, y, a, b = problem((2, 12, 9, 3))
    options = {"eps": 0.7, "a": a, "b": b, "backend": backend}
    first = fewstep.sinkhorn(x, y, max_iter=4, **options)
    second = fewstep.sinkhorn(x, y, max_iter=6, init=(first.f, first.g), **options)
    whole = fewstep.sinkhorn(x, y, max_iter=10, **options)
    assert torch.allclose(second.g, whole.g, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("eps", [1e-4, 1e-3])
def test_small_eps_underflows_and_recovers(backend: str, eps: float, capability: str) -> None:
    """Column sums of the first iterations underflow here, in float32 most of them."""
    x, y = torch.randn(1, 70, 2), torch.randn(1, 90, 2) * 2 + 3
    C = cost_matrix(x.double(), y.double(), "sqeuclidean")
    options = {"eps": eps * float(C.mean()), "max_iter": 30}
    exact = fewstep.sinkhorn(x.double(), y.double(), backend="reference", **options)
    result = fewstep.sinkhorn(x, y, backend=backend, **options)
    assert_contract("potential", result.f, exact.f, scale=C)
    assert_contract("potential", result.g, exact.g, scale=C)
    assert_contract("value", result.value, exact.value)


def test_far_offset_and_duplicates_lose_nothing(capability: str) -> None:
    """At an offset of 8192 multiples of 2^-10 are still exact in float32, so are distances."""
    x = torch.randint(0, 4096, (1, 40, 3)) / 1024
    y = torch.cat([x[:, :20], torch.randint(0, 4096, (1, 30, 3)) / 1024], 1)
    for cost in set(OF_POINTS) - {"dot"}:
        near = fewstep.sinkhorn(x, y, eps=0.1, cost=cost, max_iter=50, backend="cpp")
        far = fewstep.sinkhorn(x + 8192, y + 8192, eps=0.1, cost=cost, max_iter=50, backend="cpp")
        assert torch.equal(near.f, far.f)
        assert torch.equal(near.value, far.value)


def test_bits_do_not_depend_on_threads_or_batch() -> None:
    x, y, a, b = problem((3, 500, 300, 20), torch.float32)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(fewstep.sinkhorn(x, y, a=a, b=b, eps=5.0, max_iter=9, backend="cpp"))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0].f, other.f)
        assert torch.equal(results[0].g, other.g)
    alone = fewstep.sinkhorn(x[1], y[1], a=a[1], b=b[1], eps=5.0, max_iter=9, backend="cpp")
    assert torch.equal(alone.f, results[0].f[1])


def test_concurrent_calls_and_forked_children() -> None:
    """Every caller has a team of its own, and a forked child none."""
    x, y, a, b = problem((1, 300, 200, 5), torch.float32)

    def value(_: int = 0) -> float:
        return float(fewstep.sinkhorn(x, y, a=a, b=b, eps=1.0, max_iter=20, backend="cpp").value)

    expected = value()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(value, range(24))) == {expected}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks, and so does JAX
        child = os.fork()
    if child == 0:
        os._exit(0 if value() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_strided_and_expanded_inputs() -> None:
    x = torch.randn(4, 3, 30).mT.expand(4, 30, 3)
    y = torch.randn(1, 20, 3).expand(4, 20, 3)
    b = torch.rand(20).softmax(-1).expand(4, 20)
    result = fewstep.sinkhorn(x, y, b=b, eps=torch.tensor(0.5).expand(4), max_iter=5)
    dense = fewstep.sinkhorn(x.contiguous(), y.contiguous(), b=b.contiguous(), eps=0.5, max_iter=5)
    assert torch.equal(result.f, dense.f)
    assert torch.equal(result.g, dense.g)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_empty_batch(backend: str) -> None:
    x = torch.empty(0, 5, 2, requires_grad=True)
    result = fewstep.sinkhorn(x, torch.empty(0, 4, 2), eps=0.1, backend=backend)
    assert result.f.shape == (0, 5)
    assert result.barycenter().shape == (0, 5, 2)
    assert torch.autograd.grad(result.value.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 9, 4, dtype=dtype, requires_grad=True), torch.randn(2, 8, 4, dtype=dtype)
    result = fewstep.sinkhorn(x, y, eps=0.5)
    wide = fewstep.sinkhorn(x.detach().float(), y.float(), eps=0.5)
    assert result.f.dtype == torch.float32
    assert torch.equal(result.f, wide.f)
    assert torch.autograd.grad(result.value.sum(), x)[0].dtype == dtype


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_nan_comes_out_as_nan(backend: str, capability: str) -> None:
    x, y, _, _ = problem((2, 6, 5, 2), torch.float32)
    x[1, 2, 0] = math.nan
    result = fewstep.sinkhorn(x, y, eps=0.5, tol=1e-6, max_iter=50, backend=backend)
    assert result.value[0].isfinite()
    assert result.value[1].isnan()
    assert result.converged.tolist() == [True, False]


@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    d=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    relative_eps=st.floats(1e-2, 10),
)
@settings(max_examples=40, deadline=None)
def test_invariances(n: int, m: int, d: int, seed: int, relative_eps: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(m, d, generator=generator, dtype=torch.float64)
    eps = relative_eps * max(mean_cost(x[None], y[None], "sqeuclidean"), 1e-3)
    base = fewstep.sinkhorn(x, y, eps=eps, max_iter=15)
    order = torch.randperm(n, generator=generator)
    permuted = fewstep.sinkhorn(x[order], y, eps=eps, max_iter=15)
    assert torch.allclose(permuted.f, base.f[order], rtol=1e-10, atol=1e-10)
    scaled = fewstep.sinkhorn(3 * x, 3 * y, eps=9 * eps, max_iter=15)
    assert torch.allclose(scaled.value, 9 * base.value, rtol=1e-10, atol=1e-10)
    moved = fewstep.sinkhorn(x + 5, y + 5, eps=eps, max_iter=15)
    assert torch.allclose(moved.value, base.value, rtol=1e-9, atol=1e-9)
    doubled = fewstep.sinkhorn(x, torch.cat([y, y]), eps=eps, max_iter=15)
    assert torch.allclose(doubled.value, base.value, rtol=1e-10, atol=1e-10)
    assert torch.allclose(base.plan().sum(0), torch.full((m,), 1 / m, dtype=x.dtype), rtol=1e-10)


def test_compiles_into_one_graph() -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        result = fewstep.sinkhorn(x, y, eps=0.5, max_iter=5)
        return result.value.sum() + result.barycenter().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (7, 12):
        x, y = torch.randn(2, n, 3, requires_grad=True), torch.randn(2, n + 1, 3)
        (expected,) = torch.autograd.grad(loss(x, y), x)
        (grad,) = torch.autograd.grad(compiled(x, y), x)
        assert torch.allclose(grad, expected, rtol=1e-6)


X, Y = torch.zeros(4, 2), torch.zeros(3, 2)
BAD = [
    ({"x": torch.zeros(4)}, ValueError, r"x must be \[.., N, D\], got \(4,\)"),
    ({"x": torch.zeros(0, 2)}, ValueError, r"x must have points and D > 0, got \(0, 2\)"),
    ({"y": torch.zeros(3, 5)}, ValueError, r"y must match x \(4, 2\).*got \(3, 5\)"),
    (
        {"x": torch.zeros(2, 4, 2), "y": torch.zeros(3, 3, 2)},
        ValueError,
        r"y must match x .*got \(3, 3, 2\)",
    ),
    ({"y": Y.double()}, TypeError, r"y must have the dtype of x.*float64"),
    ({"x": X.long()}, TypeError, r"x must have a floating dtype, got torch.int64"),
    ({"x": [[0.0]]}, TypeError, r"x must be a Tensor, got list"),
    ({"y": Y.to("meta")}, ValueError, r"y must be on cpu with x, got meta"),
    ({"eps": 0.0}, ValueError, r"eps must be positive and finite, got 0.0"),
    ({"eps": True}, TypeError, r"eps must be a number, .* got bool"),
    ({"eps": [True]}, TypeError, r"eps must be a sequence of numbers, got \[True\]"),
    ({"eps": [torch.ones(1)]}, TypeError, r"eps must be .* numbers, got \[tensor\(\[1"),
    ({"eps": torch.tensor(True)}, TypeError, r"eps must be numbers, got torch.bool"),
    ({"eps": np.array(["a"])}, TypeError, r"eps must be numbers, got <U1"),
    ({"eps": b"x"}, TypeError, r"eps must be a number, .* got bytes"),
    ({"tol": True}, TypeError, r"tol must be a number, got True"),
    ({"max_iter": True}, TypeError, r"max_iter must be an integer, got True"),
    ({"eps": -1.0}, ValueError, r"eps must be positive and finite, got -1.0"),
    ({"eps": math.nan}, ValueError, r"eps must be positive and finite, got nan"),
    ({"eps": torch.tensor(-2.0)}, ValueError, r"eps must be positive and finite, got -2.0"),
    ({"eps": torch.ones(2, 2)}, ValueError, r"eps must have shape \(\), or .* got \(2, 2\)"),
    ({"eps": torch.ones((), requires_grad=True)}, ValueError, r"eps must not require a gradient"),
    ({"a": torch.ones(3) / 3}, ValueError, r"a must have shape \(4,\), got \(3,\)"),
    ({"a": torch.tensor([2.0, -1, 0, 0])}, ValueError, r"a must not be negative, got -1.0"),
    ({"b": torch.ones(3)}, ValueError, r"a and b .* sums of 1 \(the default\) and 3; scale"),
    ({"b": torch.full((3,), math.nan)}, ValueError, r"b must have a mass .* got a sum of nan"),
    ({"b": torch.ones(3, dtype=torch.int64)}, TypeError, r"b must be a floating Tensor"),
    ({"a": torch.ones(4, device="meta")}, ValueError, r"a must be on cpu with x, got meta"),
    ({"cost": "manhattan"}, ValueError, r"cost must be one of .*got 'manhattan'"),
    ({"backend": "fast"}, ValueError, r"backend must be one of .*got 'fast'"),
    ({"backend": "cuda"}, ValueError, r"backend 'cuda' cannot serve.*not cpu"),
    ({"max_iter": 0}, ValueError, r"max_iter must be at least 1, got 0"),
    ({"tol": -1.0}, ValueError, r"tol must be None or at least 0, got -1.0"),
    ({"init": (torch.zeros(3), torch.zeros(3))}, ValueError, r"init f must be \(4,\), got \(3,\)"),
    (
        {"x": torch.full((4, 2), math.inf), "check_finite": True},
        ValueError,
        r"x must be finite, got 8 NaN or inf values",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2][:30] for b in BAD])
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": X, "y": Y, "eps": 0.1} | change
    with pytest.raises(error, match=message):
        fewstep.sinkhorn(arguments.pop("x"), arguments.pop("y"), **arguments)


def test_bad_transport_input() -> None:
    result = fewstep.sinkhorn(X, Y, eps=0.1)
    with pytest.raises(ValueError, match=r"v must be \(3, K\) for axis 0, got \(4, 1\)"):
        result.transport(torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"axis must be 0 or 1, got 2"):
        result.transport(torch.zeros(3), axis=2)
    with pytest.raises(TypeError, match=r"v must be torch.float32, got torch.float64"):
        result.transport(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"axis must be 0 or 1, got True"):
        result.transport(torch.zeros(4), axis=True)
    with pytest.raises(TypeError, match=r"implicit must be True or False, got 'no'"):
        result.transport(torch.zeros(3), implicit="no")
    for name in ("normalize", "implicit"):
        with pytest.raises(TypeError, match=rf"{name} must be True or False, got 0"):
            result.barycenter(**{name: 0})
    with pytest.raises(TypeError, match=r"check_finite must be True or False, got 'a'"):
        fewstep.sinkhorn(X, Y, eps=0.1, check_finite="a")
    with pytest.raises(TypeError, match=r"result must be what sinkhorn returned, got Tensor"):
        fewstep.transport(X, Y)


def test_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_BACKEND", "reference")
    assert fewstep.sinkhorn(X, Y, eps=0.1)._problem.backend == "reference"
    monkeypatch.setenv("FEWSTEP_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        fewstep.sinkhorn(X, Y, eps=0.1)


def test_transport_of_a_shape_with_two_meanings() -> None:
    """As many temperatures as points of y, and as many vectors."""
    x, y = torch.randn(5, 2), torch.randn(3, 2)
    result = fewstep.sinkhorn(x, y, eps=[0.5, 1.0, 2.0])
    with pytest.raises(ValueError, match=r"v must be \(3, 3, K\) here"):
        result.transport(torch.eye(3))
    found = result.transport(torch.eye(3).expand(3, 3, 3))
    torch.testing.assert_close(found, result.plan())
