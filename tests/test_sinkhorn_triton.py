"""The Triton backend of `fewstep.sinkhorn` against the reference in float64.

Without a GPU the kernels are interpreted, a few milliseconds per operation: hence small problems
and few iterations.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.ops.sinkhorn import dispatch, implicit
from fewstep.ops.sinkhorn.problem import Constants, Problem
from fewstep.reference import sinkhorn as reference
from fewstep.reference.costs import served
from tolerances import assert_contract

pytest.importorskip("triton")

from fewstep.kernels import config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
ARGUMENTS = ("x", "y", "a", "b")


def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Clouds and weights, one weight of each side 0 where there is more than one point."""
    batch, n, m, dim = shape
    weights = [torch.rand(batch, count, dtype=dtype) + 0.1 for count in (n, m)]
    for w in weights:
        w[:, 1::7] = 0
        w /= w.sum(-1, keepdim=True)
    x, y = torch.randn(batch, n, dim, dtype=dtype), torch.randn(batch, m, dim, dtype=dtype) + 0.3
    return {k: t.to(DEVICE) for k, t in zip(ARGUMENTS, (x, y, *weights), strict=True)}


def arguments(
    g0: Tensor | None = None, cost: int = 0, max_iter: int = 1, tol: float | None = None
) -> tuple[object, ...]:
    """What follows eps in the raw op."""
    return (None, g0, cost, None, max_iter, tol, None, 1.0, *[None] * 3, 1.0, False, False, 0, 0)


def near(mine: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Of points that may go nowhere, and their partners, the size of a potential means nothing."""
    far = true.abs() > 1e15
    assert (mine[far] * true[far].sign() > 1e15).all()
    return torch.where(far, 0, mine), torch.where(far, 0, true)


def compare(data: dict[str, Tensor], *, kind: str = "potential", **options: object) -> None:
    """Everything that the backend computes for one problem, held to the numerics contract."""
    scale = reference.cost_matrix(data["x"].double(), data["y"].double(), options["cost"]).max()
    found = []
    for backend, dtype in (("triton", data["x"].dtype), ("reference", torch.float64)):
        inputs = {k: t.detach().to(dtype).requires_grad_() for k, t in data.items()}
        result = fewstep.sinkhorn(**inputs, backend=backend, **options)
        gradients = torch.autograd.grad(result.value.sum(), list(inputs.values()))
        rows = result.transport(torch.cos(inputs["y"]).detach())
        columns = result.transport(inputs["x"].detach()[..., 0], axis=1)
        found.append((result, gradients, rows, columns))
    (actual, *products), (exact, *exact_products) = found
    assert_contract(kind, *near(actual.f, exact.f), scale=scale)
    assert_contract(kind, *near(actual.g, exact.g), scale=scale)
    assert_contract("value", actual.value, exact.value, scale=scale)
    assert_contract("plan", actual.residual, exact.residual, scale=torch.ones(1))
    assert torch.equal(actual.iterations, exact.iterations)
    for mine, true in zip(products[0][:2], exact_products[0][:2], strict=True):
        assert_contract("gradient", mine, true)
    for mine, true in zip(products[0][2:], exact_products[0][2:], strict=True):
        assert_contract(kind, *near(mine, true), scale=scale)
    for mine, true in zip(products[1:], exact_products[1:], strict=True):
        assert_contract("plan", mine, true)


@pytest.mark.parametrize(
    ("shape", "cost", "dtype"),
    [
        ((1, 1, 1, 1), "euclidean", torch.float32),
        ((1, 1, 1, 40), "sqeuclidean", torch.float32),
        ((3, 5, 7, 2), "half_sqeuclidean", torch.float32),
        ((2, 35, 21, 3), "sqeuclidean", torch.float32),
        ((1, 18, 37, 5), "euclidean", torch.float32),
        ((2, 18, 37, 35), "sqeuclidean", torch.float32),
        ((1, 37, 18, 20), "euclidean", torch.float32),
        ((1, 18, 37, 70), "euclidean", torch.float32),
        ((2, 5, 19, 3), "sqeuclidean", torch.float64),
        ((1, 19, 5, 18), "euclidean", torch.float64),
    ],
    ids=str,
)
def test_agrees_with_reference(
    shape: tuple[int, int, int, int], cost: str, dtype: torch.dtype
) -> None:
    data = problem(shape, dtype)
    eps = torch.linspace(0.1, 0.3, shape[0], dtype=dtype, device=DEVICE) * shape[3]
    compare(data, eps=eps, cost=cost, max_iter=3)


def test_any_mass() -> None:
    data = problem((2, 5, 7, 3))
    mass = torch.tensor([7.0, 0.03], device=DEVICE)[:, None]
    compare(data | {s: mass * data[s] for s in "ab"}, eps=1.0, cost="sqeuclidean", max_iter=3)


OPTIONS: dict[str, dict[str, object]] = {
    "anneal": {"anneal": 0.3, "max_iter": 2},
    "temperatures": {"anneal": [3.0, 1.0], "max_iter": 2, "tol": 0.3},
    "reach": {"reach": (1.5, None), "max_iter": 3},
    "reach of y": {"reach": (None, 2.0), "max_iter": 3, "tol": 1e-2},
    "relax": {"relax": 1.3, "max_iter": 3},
    "diagonal": {"exclude_diagonal": -2, "max_iter": 3},
    "symmetric": {"update": "symmetric", "max_iter": 3},
    "symmetric, to a tolerance": {"update": "symmetric", "max_iter": 9, "tol": 2e-2},
    "symmetric, annealed": {"update": "symmetric", "anneal": 0.4, "max_iter": 2, "tol": 1e-1},
    "symmetric, with all": {
        "update": "symmetric",
        "anneal": [5.0, 3.0],
        "reach": (2.0, 1.0),
        "exclude_diagonal": 1,
    },
    "several": {"exclude_diagonal": 1, "relax": 0.8, "reach": 2.0, "anneal": [4.0]},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, object], dtype: torch.dtype) -> None:
    data = problem((2, 9, 13, 18 if dtype == torch.float32 else 3), dtype)
    eps = torch.tensor([0.2, 1.0], dtype=dtype, device=DEVICE) * data["x"].shape[2]
    compare(data, **{"eps": eps, "cost": "sqeuclidean", "max_iter": 2} | options)


KEPT: dict[str, dict[str, object]] = {
    "plain": {},
    "to a tolerance": {"max_iter": 9, "tol": 0.1},
    "reach": {"reach": (1.5, 3.0), "tol": 1e-2},
    "cold": {"scale": 0.1},
    "several": {"exclude_diagonal": 1, "relax": 0.8, "reach": (None, 2.0), "anneal": [40.0, 30.0]},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT)
def test_kept_costs(
    options: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As computed ones, and with more columns than a tile; where it is cold columns underflow."""
    # Many dimensions are slow in the interpreter.
    monkeypatch.setattr(config, "_KEPT_FROM", 3)
    monkeypatch.setattr(config, "_KEPT_FROM_DOT", 18)
    data = problem((2, 18, 131, 18) if dtype == torch.float32 else (2, 35, 37, 3), dtype)
    scale = data["x"].shape[2] * float(str(options.get("scale", 1.0)))
    eps = torch.tensor([0.2, 1.0], dtype=dtype, device=DEVICE) * scale
    rest = {k: v for k, v in options.items() if k != "scale"}
    compare(data, **{"eps": eps, "cost": "sqeuclidean", "max_iter": 4} | rest)


def test_costs_are_kept_where_that_pays() -> None:
    told = {"dim": 80, "steps": 4, "dtype": "float32", "memory_limit": 2**15}
    assert config.keeps_costs(2, 32, 128, **told)
    for no in ({"dim": 79}, {"steps": 3}, {"memory_limit": 2**15 - 1}, {"dtype": "float64"}):
        assert not config.keeps_costs(2, 32, 128, **told | no)
    assert config.keeps_costs(2, 32, 128, **told | {"dim": 24, "precision": "float32"})


def test_one_potential_for_a_cloud_with_itself() -> None:
    data = problem((2, 9, 9, 3), torch.float64)
    x, a = data["x"], data["a"]
    options = {"eps": 1.0, "max_iter": 3, "update": "symmetric"}
    single, exact = (
        fewstep.sinkhorn(x, x, a=a, b=a, backend=backend, **options)
        for backend in ("triton", "reference")
    )
    assert torch.equal(single.f, single.g)
    assert_contract("potential", single.f, exact.f)
    assert_contract("plan", single.residual, exact.residual, scale=torch.ones(1))


def test_several_temperatures() -> None:
    data = problem((2, 9, 13, 3), torch.float64)
    eps = torch.tensor([[0.2, 1.0, 3.0], [0.5, 2.0, 4.0]], dtype=torch.float64, device=DEVICE)
    compare(data, eps=eps, cost="euclidean", max_iter=2)


@pytest.mark.parametrize("dim", [2, 17])
@pytest.mark.parametrize("cost", served("triton"))
def test_one_step(dim: int, cost: str) -> None:
    compare(problem((1, 17, 9, dim)), kind="one step", eps=0.5, cost=cost, max_iter=1)


def test_stops_each_problem_by_itself() -> None:
    data = problem((3, 6, 5, 2), torch.float64)
    eps = torch.tensor([0.3, 8.0, 200.0], dtype=torch.float64, device=DEVICE)
    options = {"eps": eps, "max_iter": 7, "tol": 1e-3, "cost": "sqeuclidean"}
    stopped = fewstep.sinkhorn(**data, **options, backend="triton")
    exact = fewstep.sinkhorn(**data, **options, backend="reference")
    assert torch.equal(stopped.iterations, exact.iterations)
    assert len(set(stopped.iterations.tolist())) == 3
    assert stopped.converged.tolist() == exact.converged.tolist() == [False, True, True]
    for name in ("f", "g", "value"):
        assert_contract("potential", getattr(stopped, name), getattr(exact, name))
    assert_contract("potential", stopped.residual, exact.residual, scale=torch.ones(1))


def test_starts_from_potentials() -> None:
    data = problem((1, 9, 8, 2))
    start = fewstep.sinkhorn(**data, eps=0.5, max_iter=30, backend="reference")
    result = fewstep.sinkhorn(
        **data, eps=0.5, max_iter=2, tol=1e-4, init=(start.f, start.g), backend="triton"
    )
    assert result.iterations.tolist() == [1]
    assert_contract("potential", result.f, start.f.double())


@pytest.mark.parametrize("dim", [2, 17])
def test_tiles_without_weight(dim: int) -> None:
    """The first tiles of columns and of rows hold no mass at all."""
    data = problem((1, 37, 40, dim))
    for name, massless in (("a", 33), ("b", 34)):
        data[name][:, :massless] = 0
        data[name][:, massless:] = 1 / (data[name].shape[1] - massless)
    compare(data, eps=0.2 * dim, cost="sqeuclidean", max_iter=2)


WITHOUT_PARTNER: dict[str, dict[str, object]] = {
    "plain": {"tol": 1e-3},
    "symmetric": {"update": "symmetric"},
    "relax and reach": {"relax": 1.4, "reach": (None, 0.5)},
    "symmetric, reach": {"update": "symmetric", "reach": 0.7},
}


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in the interpreter
@pytest.mark.filterwarnings("ignore:sinkhorn.*not converged")
@pytest.mark.parametrize("way", ["computed", "kept", "dot"])
@pytest.mark.parametrize("options", WITHOUT_PARTNER.values(), ids=WITHOUT_PARTNER)
def test_points_without_a_partner(
    options: dict[str, object], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weight at one point, whose pair with the point opposite is left out."""
    if way == "kept":
        monkeypatch.setattr(config, "_KEPT_FROM", 1)
    data = problem((1, 5, 5, 18 if way == "dot" else 2))
    options = {"eps": 1.0, "exclude_diagonal": True, "max_iter": 4} | options
    only = torch.zeros_like(data["a"])
    only[:, 2] = 1
    reach = options.get("reach")
    for weights, met in (({"a": only}, reach), ({"b": only}, reach == 0.7)):
        inputs = data | weights
        if met:
            compare(inputs, cost="sqeuclidean", **options)
            continue
        result = fewstep.sinkhorn(**inputs, **options, backend="triton")
        assert result.value == torch.inf
        assert not result.converged
        assert not torch.cat([result.f, result.g], 1).isnan().any()
    data["b"][:, 2] = 0  # nothing is asked of the point without a partner
    data["b"] /= data["b"].sum()
    compare(data | {"a": only}, cost="sqeuclidean", **options)


@pytest.mark.parametrize("update", ["alternating", "symmetric"])
def test_a_point_without_weight_beside_an_outlier(update: str) -> None:
    """What its marginal would be under the penalty overflows."""
    data = problem((1, 4, 5, 2))
    data["x"][:, 1] = data["y"][:, 0] = 30.0  # x_1 has no weight
    compare(data, cost="sqeuclidean", eps=2.0, reach=1.0, max_iter=3, update=update)


@pytest.mark.parametrize("dim", [2, 20])
def test_padding_far_away(dim: int) -> None:
    data = problem((1, 9, 10, dim))
    padded = {k: t.clone() for k, t in data.items()}
    found = []
    for name, weight in (("x", "a"), ("y", "b")):
        padded[name][:, padded[weight][0] == 0] = 1e6
    options = {"eps": 0.3 * dim, "max_iter": 3}
    for inputs, dtype, backend in (
        (padded, torch.float32, "triton"),
        (data, torch.float64, "reference"),
    ):
        leaves = {k: t.to(dtype).requires_grad_() for k, t in inputs.items()}
        result = fewstep.sinkhorn(**leaves, **options, backend=backend)
        grads = torch.autograd.grad(result.value, [leaves["x"], leaves["y"]])
        found.append((result, grads))
    (mine, slopes), (true, wanted) = found
    assert_contract("value", mine.value, true.value)
    for slope, other in zip(slopes, wanted, strict=True):
        assert_contract("gradient", slope, other)
    for f, other, w in ((mine.f, true.f, data["a"]), (mine.g, true.g, data["b"])):
        assert_contract("potential", f[w > 0], other[w > 0])


@pytest.mark.parametrize("update", ["alternating", "symmetric", "kept"])
def test_a_tiny_weight_is_as_none(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The potential of a row that the L1 error does not see is a transform all the same."""
    if update == "kept":
        monkeypatch.setattr(config, "_KEPT_FROM", 1)
        update = "alternating"
    x = torch.tensor([[0.0], [1.0]], device=DEVICE)
    y = torch.tensor([[0.0], [2.0], [3.0]], device=DEVICE)
    options = {"eps": 0.5, "tol": 1e-6, "max_iter": 20, "update": update}
    for weight in (1e-30, 0.0):
        a = torch.tensor([1 - weight, weight], device=DEVICE, requires_grad=True)
        result = fewstep.sinkhorn(x, y, a=a, **options, backend="triton")
        (slope,) = torch.autograd.grad(result.value, a)
        assert (slope[1] - slope[0]).item() == pytest.approx(-4.4597716, rel=1e-5)
        assert result.converged


def test_potentials_beyond_the_digits_of_float32() -> None:
    data = problem((1, 3, 4, 2))
    result = fewstep.sinkhorn(**data, eps=1e-9, max_iter=2, backend="triton")
    assert result.residual == torch.inf
    assert not result.converged


@pytest.mark.parametrize("dim", [2, 20])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_far_from_the_origin(dim: int, cost: str) -> None:
    data = problem((1, 10, 12, dim))
    data["x"] += 1e4
    data["y"] += 1e4
    compare(data, eps=0.3 * dim, cost=cost, max_iter=2)


@pytest.mark.parametrize("dim", [2, 40])
def test_near_and_equal_points(dim: int) -> None:
    """Where the expanded square would be all cancellation: its root, and gradients of norm 1."""
    data = problem((1, 18, 18, dim))
    data["x"] = data["y"].flip(1).clone()
    data["x"][:, ::2] += 1e-4 * torch.randn_like(data["x"][:, ::2])
    compare(data, eps=0.02 * dim**0.5, cost="euclidean", max_iter=2)


def test_wide_and_narrow_transport() -> None:
    data = problem((2, 10, 20, 2))
    data64 = {k: t.double() for k, t in data.items()}
    plans = [
        fewstep.sinkhorn(**d, eps=0.5, max_iter=2, backend=backend)
        for d, backend in ((data, "triton"), (data64, "reference"))
    ]
    for width in (0, 1, 16, 40):
        v = torch.randn(2, 20, width, device=DEVICE)
        found, exact = plans[0].transport(v), plans[1].transport(v.double())
        if width == 0:
            assert found.shape == (2, 10, 0)
        else:
            assert_contract("plan", found, exact)
    barycenters = [plan.barycenter() for plan in plans]
    assert_contract("plan", barycenters[0], barycenters[1])
    v = torch.randn(2, 20, 3, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(plans[0].transport(v).square().sum(), v)
    v64 = v.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(plans[1].transport(v64).square().sum(), v64)
    assert_contract("gradient", gradient, exact)


def test_strides_do_not_matter_and_runs_repeat() -> None:
    data = problem((2, 5, 6, 3))
    data["b"] = torch.full((1, 1), 1 / 6, device=DEVICE).expand(2, 6)
    plain = {k: t.contiguous() for k, t in data.items()}
    data["x"] = data["x"].mT.contiguous().mT
    data["y"] = data["y"][:1].expand(2, -1, -1)
    plain["y"] = data["y"].contiguous()
    results = [
        fewstep.sinkhorn(**d, eps=0.3, max_iter=2, backend="triton") for d in (data, plain, plain)
    ]
    for name in ("f", "g", "value", "residual"):
        first, *others = (getattr(result, name) for result in results)
        assert all(torch.equal(first, other) for other in others)
        assert first.is_contiguous()


def test_empty_batch() -> None:
    data = problem((0, 3, 4, 2))
    result = fewstep.sinkhorn(**data, eps=0.1, max_iter=2, tol=1e-3, backend="triton")
    assert result.f.shape == (0, 3)
    assert result.g.shape == (0, 4)
    assert result.iterations.dtype == torch.int64
    assert result.converged.dtype == torch.bool
    assert result.transport(torch.randn(0, 4, 5, device=DEVICE)).shape == (0, 3, 5)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("where", ["x", "b"])
def test_nan_stays_in_its_problem(where: str) -> None:
    data = problem((2, 5, 6, 2))
    clean = fewstep.sinkhorn(**data, eps=0.3, max_iter=3, tol=1e-9, backend="triton")
    op = torch.ops.fewstep_triton.sinkhorn.default
    data[where].view(2, -1)[0, 0] = torch.nan
    eps = torch.full((2,), 0.3, device=DEVICE)
    f, g, value, residual, iterations, converged = op(
        *data.values(), eps, *arguments(max_iter=3, tol=1e-9)
    )
    assert f[0].isnan().all()
    assert g[0].isnan().all()
    assert value[0].isnan()
    assert residual[0].isnan()
    assert iterations.tolist() == [3, 3]
    assert not converged[0]
    assert torch.equal(f[1], clean.f[1])
    assert torch.equal(g[1], clean.g[1])


def test_half_precision_is_refused() -> None:
    data = problem((1, 2, 2, 2), torch.float32)
    fewstep.sinkhorn(**data, eps=0.3, max_iter=1, backend="triton")
    half = [t.bfloat16() for t in data.values()]
    with pytest.raises(TypeError, match=r"x must be float32 or float64, got torch\.bfloat16"):
        torch.ops.fewstep_triton.sinkhorn.default(*half, half[0].new_ones(1), *arguments())


def test_opcheck() -> None:
    data = problem((2, 3, 4, 2))
    result = fewstep.sinkhorn(**data, eps=0.3, max_iter=1, backend="triton")
    ops = torch.ops.fewstep_triton
    eps = torch.full((2,), 0.3, device=DEVICE)
    x, y, a, b = data.values()
    f, g = result.f, result.g
    v = torch.randn(2, 4, 3, device=DEVICE)
    torch.library.opcheck(ops.sinkhorn.default, (x, y, a, b, eps, *arguments()))
    torch.library.opcheck(
        ops.sinkhorn.default, (x, y, a, b, eps, *arguments(g0=g, cost=2, tol=1e-2))
    )
    torch.library.opcheck(ops.sinkhorn_transport.default, (x, y, f, g, b, eps, v, 1, None, 0))
    torch.library.opcheck(ops.sinkhorn_grad.default, (x, y, f, g, a, b, eps, 2, 1, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("update", ["alternating", "symmetric"])
def test_device_capture_in_a_graph(update: str) -> None:
    """With the schedule of temperatures, whose length depends on the data."""
    data = problem((2, 300, 280, 20))

    def work() -> tuple[Tensor, ...]:
        result = fewstep.sinkhorn(
            **data, eps=2.0, anneal=0.5, tol=1e-3, max_iter=5, update=update, backend="triton"
        )
        return result.f, result.g, result.value, result.iterations

    expected = work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(captured, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("cost", "options"),
    [
        ("sqeuclidean", {"reach": (1.0, None)}),
        ("half_sqeuclidean", {"exclude_diagonal": -1}),
        ("euclidean", {"exclude_diagonal": 1}),
        ("euclidean", {}),
    ],
    ids=str,
)
def test_second_derivatives_by_the_kernel(
    cost: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by blocks in torch: every variable, points without weight, and points that are equal."""
    data = problem((2, 33, 9, 2), torch.float64)
    data["x"][:, :5] = data["y"][:, :5]
    eps = {"eps": torch.tensor([0.4, 1.0], dtype=torch.float64, device=DEVICE)}
    solved = fewstep.sinkhorn(**data, **eps, cost=cost, max_iter=60, **options, backend="reference")
    p = Problem(*data.values(), None, solved.f, solved.g, eps["eps"])
    rho = solved._problem.schedule.rho
    c = Constants(cost, "triton", *rho, solved._problem.points.diagonal)
    directions = [torch.randn_like(t) for t in data.values()]
    for weights in directions[2:]:
        weights -= weights.mean(-1, keepdim=True)  # of no mass
    u = (*directions, None)
    of_potentials = [t - t.mean(-1, keepdim=True) for t in map(torch.randn_like, (p.f, p.g))]

    def found() -> list[Tensor]:
        need = (True, True, True, True, False)
        one_sided = implicit.hessian_product((None, u[1], *(None,) * 3), p, c, need)
        return [
            *implicit.hessian_product(u, p, c, need),
            *one_sided,
            *implicit.potentials_adjoint(*of_potentials, p, c, need),
        ]

    exact = found()
    monkeypatch.setattr(implicit, "BLOCKS_PAIRS", 0)
    calls = []
    kernel = dispatch.hessian
    monkeypatch.setattr(dispatch, "hessian", lambda *args: calls.append(args) or kernel(*args))
    for mine, true in zip(found(), exact, strict=True):
        assert_contract("gradient", mine, true)
    assert len(calls) == 12


def test_second_derivatives_are_in_float64() -> None:
    data = problem((1, 3, 4, 2), torch.float64)
    x, y, a, b = data.values()
    eps = torch.full((1,), 0.5, dtype=x.dtype, device=DEVICE)
    arguments = (x, y, x, y, a, b, a, b, a, b, a, b, eps, 1, None)
    importlib.import_module("fewstep.kernels.sinkhorn.hessian")
    op = torch.ops.fewstep_triton.sinkhorn_hessian.default
    for sums in (False, True):
        torch.library.opcheck(op, (*arguments, sums))
    assert op(*(t[:0] if isinstance(t, Tensor) else t for t in arguments), False).shape == (0, 3, 2)
    with pytest.raises(TypeError, match=r"x must be float64, got torch\.float32"):
        op(x.float(), *arguments[1:], False)
