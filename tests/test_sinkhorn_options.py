"""Options of `fewstep.sinkhorn`: the C++ kernels against the reference, and both against facts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fewstep
from fewstep.reference.costs import cost_matrix
from tolerances import assert_contract

SHAPES = [(1, 2, 3, 1), (3, 5, 7, 2), (2, 33, 65, 3), (1, 150, 130, 17)]


def clouds(shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Rounded to float32, with a zero among the weights of each side."""
    B, N, M, D = shape
    x, y = torch.randn(B, N, D), torch.randn(B, M, D) + 0.5
    a, b = torch.rand(B, N) + 0.1, torch.rand(B, M) + 0.1
    a[:, 0] = b[:, M // 2] = 0
    weights = {"a": a / a.sum(-1, keepdim=True), "b": b / b.sum(-1, keepdim=True)}
    return {k: t.double() for k, t in ({"x": x, "y": y} | weights).items()}


def some_labels(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    B, N, M, _ = shape
    return {"labels": (torch.randint(3, (B, N)), torch.randint(4, (B, M)))}


# Relative to the mean squared distance, which is about 2 D.
OPTIONS: dict[str, dict[str, Any]] = {
    "anneal": {"eps": 0.02, "anneal": 0.3, "max_iter": 6},
    "temperatures": {"eps": 0.05, "anneal": [4.0, 1.0, 0.1], "max_iter": 2},
    "symmetric": {"eps": 0.3, "update": "symmetric", "max_iter": 12},
    "symmetric annealed": {"eps": 0.05, "update": "symmetric", "anneal": 0.25, "max_iter": 3},
    "symmetric tol": {"eps": 0.5, "update": "symmetric", "max_iter": 300, "tol": 1e-4},
    "over-relaxed": {"eps": 0.2, "relax": 1.5, "max_iter": 25},
    "under-relaxed": {"eps": 0.05, "relax": 0.7, "max_iter": 9},
    "reach": {"eps": 0.1, "reach": 1.0, "max_iter": 20},
    "reach of x": {"eps": 0.1, "reach": (0.5, None), "max_iter": 20},
    "reach of y": {"eps": 0.02, "reach": (None, 2.0), "max_iter": 20},
    "reach symmetric": {"eps": 0.1, "reach": (1.0, 3.0), "update": "symmetric", "max_iter": 20},
    "reach euclidean": {"eps": 0.3, "reach": 1.5, "cost": "euclidean", "relax": 1.2},
    "diagonal": {"eps": 0.1, "exclude_diagonal": True, "max_iter": 15},
    "diagonal below": {"eps": 0.02, "exclude_diagonal": -1, "cost": "l1", "max_iter": 15},
    "diagonal above": {"eps": 1.0, "exclude_diagonal": 1, "max_iter": 15, "tol": 1e-3},
    "several eps": {"eps": [0.02, 0.3, 2.0], "max_iter": 10},
    "several eps annealed": {"eps": [0.02, 0.3], "max_iter": 5, "anneal": 0.4, "tol": 1e-2},
    "cosine": {"eps": 0.1, "cost": "cosine", "max_iter": 10},
}


def solve(
    data: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype, backend: str
) -> tuple[fewstep.SinkhornResult, tuple[Tensor, ...]]:
    leaves = {k: t.to(dtype).requires_grad_() for k, t in data.items()}
    options = {k: t.to(dtype) if k == "label_cost" else t for k, t in options.items()}
    result = fewstep.sinkhorn(
        leaves.get("x"),
        leaves.get("y"),
        **{k: leaves[k] for k in ("a", "b", "C") if k in leaves},
        **options,
        backend=backend,
    )
    weights = torch.arange(1, result.value.numel() + 1, dtype=dtype).reshape(result.value.shape)
    return result, torch.autograd.grad((result.value * weights).sum(), list(leaves.values()))


def check(data: dict[str, Tensor], options: dict[str, Any], scale: Tensor) -> None:
    """Both dtypes, with and without kept kernels, against the reference in float64."""
    exact, exact_grads = solve(data, options, torch.float64, "reference")
    for dtype in (torch.float32, torch.float64):
        for memory_limit in (2**27, 0):
            extra = options | {"memory_limit": memory_limit}
            result, grads = solve(data, extra, dtype, "cpp")
            for name in ("f", "g", "value"):
                kind = "value" if name == "value" else "potential"
                actual, expected = getattr(result, name), getattr(exact, name).detach()
                assert_contract(kind, actual, expected, scale=scale)
            if "tol" not in options or dtype == torch.float64:
                assert torch.equal(result.iterations, exact.iterations)
            assert_contract("plan", result.residual, exact.residual.detach(), scale=torch.ones(1))
            for name, grad, expected in zip(data, grads, exact_grads, strict=True):
                if name in "ab":
                    assert_contract("potential", grad, expected, scale=10 * scale)
                else:
                    assert_contract("gradient", grad, expected)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_options_agree_with_the_reference(
    capability: str, name: str, shape: tuple[int, int, int, int]
) -> None:
    data, options = clouds(shape), dict(OPTIONS[name])
    if name in ("diagonal", "diagonal below", "diagonal above") and min(shape[1:3]) < 3:
        pytest.skip("too few pairs are left")
    if "reach" in options:
        data |= {"a": 1.7 * data["a"], "b": 0.4 * data["b"]}
    scale = cost_matrix(data["x"], data["y"], "sqeuclidean").max().clamp(min=1)
    check(data, options, scale)


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


@pytest.mark.parametrize("cost", ["sqeuclidean", "half_sqeuclidean", "euclidean", "l1", "dot"])
def test_labels_agree_with_the_reference_and_with_a_matrix(capability: str, cost: str) -> None:
    shape = (2, 33, 65, 3)
    data, W = clouds(shape), torch.rand(3, 4, dtype=torch.float64)
    options = {"eps": 0.3, "cost": cost, "max_iter": 10, "label_cost": W} | some_labels(shape)
    scale = cost_matrix(data["x"], data["y"], "sqeuclidean").max()
    check(data, options, scale)
    lx, ly = options["labels"]
    C = cost_matrix(data["x"], data["y"], cost) + W[lx[:, :, None], ly[:, None, :]]
    labelled = fewstep.sinkhorn(**data, **options)
    given_costs = fewstep.sinkhorn(None, None, C=C, a=data["a"], b=data["b"], eps=0.3, max_iter=10)
    assert torch.allclose(labelled.f, given_costs.f, rtol=0, atol=1e-12)
    assert torch.allclose(labelled.plan(), given_costs.plan(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrix_agrees_with_the_reference(
    capability: str, shape: tuple[int, int, int, int]
) -> None:
    data = clouds(shape)
    C = cost_matrix(data.pop("x"), data.pop("y"), "l1").float().double()
    options: dict[str, Any] = {"eps": [0.2, 1.0], "max_iter": 8}
    check(data | {"C": C}, options, C.max())
    if min(shape[1:3]) > 2:
        check(data | {"C": C}, options | {"exclude_diagonal": True}, C.max())
    check(data | {"C": C}, options | {"anneal": 0.3, "reach": 2.0}, C.max())


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


@pytest.mark.filterwarnings("ignore:Numerical errors at iteration")  # what POT says of 1e-16
def test_unbalanced_agrees_with_pot() -> None:
    """POT's penalty is the same; its value is the primal objective without the constant of KL."""
    ot = pytest.importorskip("ot")
    data = {k: t[0] for k, t in clouds((1, 12, 15, 2)).items()}
    x, y, a, b = data["x"], data["y"], 1.5 * data["a"] + 0.01, 0.7 * data["b"] + 0.01
    eps, reach = 0.3, 1.2
    C = cost_matrix(x[None], y[None], "sqeuclidean")[0]
    for pair in ((reach, reach), (reach, None)):
        rho = tuple(math.inf if r is None else r**2 for r in pair)
        result = fewstep.sinkhorn(
            x, y, a=a, b=b, eps=eps, reach=pair, max_iter=3000, backend="reference"
        )
        expected = ot.unbalanced.sinkhorn_unbalanced(
            a, b, C, eps, rho, reg_type="kl", c=a[:, None] * b, numItermax=5000, stopThr=1e-12
        )
        assert torch.allclose(result.plan(), expected, rtol=0, atol=1e-9)
        assert result.residual < 1e-9


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.special.xlogy(p, p / q) - p + q).sum()


def test_unbalanced_value_is_the_primal_objective_and_its_gradients_are_right() -> None:
    torch.manual_seed(3)
    x, y = torch.randn(6, 2).double(), torch.randn(5, 2).double() + 1
    a, b = torch.rand(6).double() + 0.2, torch.rand(5).double() + 0.2
    options = {"eps": 0.4, "reach": (0.8, 1.5), "max_iter": 2000, "backend": "cpp"}
    inputs = [t.requires_grad_() for t in (x, y, a, b)]

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return fewstep.sinkhorn(x, y, a=a, b=b, **options).value

    assert torch.autograd.gradcheck(value, inputs)
    result = fewstep.sinkhorn(x, y, a=a, b=b, **options)
    P, C = result.plan(), cost_matrix(x[None], y[None], "sqeuclidean")[0]
    primal = (P * C).sum() + 0.4 * kl(P, a[:, None] * b)
    primal = primal + 0.8**2 * kl(P.sum(1), a) + 1.5**2 * kl(P.sum(0), b)
    assert torch.allclose(result.value, primal, rtol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_every_update_has_one_fixed_point(backend: str) -> None:
    data = clouds((2, 15, 12, 2))
    data |= {k: data[k] / data[k].sum(-1, keepdim=True) for k in "ab"}  # beyond float32
    plain = fewstep.sinkhorn(**data, eps=4.0, max_iter=3000, backend=backend)
    for options in (
        {"relax": 1.3},
        {"update": "symmetric"},
        {"anneal": 0.5},
        {"update": "symmetric", "anneal": [10.0, 3.0]},
    ):
        other = fewstep.sinkhorn(**data, eps=4.0, max_iter=3000, backend=backend, **options)
        assert torch.allclose(other.value, plain.value, rtol=1e-12)
        assert torch.allclose(other.plan(), plain.plan(), rtol=0, atol=1e-12)
    assert plain.residual.max() < 1e-12


@pytest.mark.parametrize("options", [{}, {"anneal": 0.25}, {"reach": 1.0}, {"tol": 1e-5}])
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


def test_gradients_that_come_with_the_solution(capability: str) -> None:
    """They are those of a pass of their own, which derivatives of the gradient take."""
    for cost in ("sqeuclidean", "euclidean", "l1", "dot"):
        data = clouds((2, 70, 45, 19))
        x, y = data["x"].requires_grad_(), data["y"].requires_grad_()
        value = fewstep.sinkhorn(**data, eps=0.5, cost=cost, max_iter=9).value.sum()
        with_solution = torch.autograd.grad(value, (x, y), retain_graph=True)
        alone = torch.autograd.grad(value, (x, y), create_graph=True)
        for p, q in zip(with_solution, alone, strict=True):
            assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)
        value = fewstep.sinkhorn(**data | {"x": x.detach()}, eps=0.5, cost=cost, max_iter=9).value
        assert torch.equal(torch.autograd.grad(value.sum(), y)[0], with_solution[1])


def test_cosine_is_one_minus_the_cosine() -> None:
    x, y = torch.randn(7, 5).double(), torch.randn(9, 5).double()
    C = 1 - torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)
    result = fewstep.sinkhorn(x, y, eps=0.1, cost="cosine")
    expected = fewstep.sinkhorn(None, None, C=C, eps=0.1)
    assert torch.allclose(result.value, expected.value, rtol=1e-12)
    assert torch.allclose(result.plan(), expected.plan(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [3, 5, 8, 9, 17])
def test_cosine_of_a_view_has_the_bits_of_its_copy(dtype: torch.dtype, D: int) -> None:
    x, y = torch.randn(3, 7, D, dtype=dtype), torch.randn(3, 6, D, dtype=dtype)
    views = x.mT.contiguous().mT, torch.stack([y, y], -1)[..., 0]
    options: dict = {"eps": 0.1, "cost": "cosine", "max_iter": 5}
    whole = fewstep.sinkhorn(*views, **options)
    for i in range(3):
        alone = fewstep.sinkhorn(x[i], y[i], **options)
        assert torch.equal(whole.f[i], alone.f)
        assert torch.equal(whole.value[i], alone.value)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_reach_of_cosine_is_in_its_own_unit(backend: str) -> None:
    """`rho = reach`, as for all costs but squared ones."""
    x, y = torch.eye(2, dtype=torch.float64)[:, None]
    options: dict = {"cost": "cosine", "eps": 0.1, "reach": 0.5, "backend": backend}
    for solve in (fewstep.sinkhorn, fewstep.sinkhorn_divergence):
        assert solve(x, y, **options).value.item() == pytest.approx(0.656817, rel=1e-5)
    C = torch.ones(1, 1, dtype=torch.float64)
    assert torch.allclose(
        fewstep.sinkhorn(x, y, **options).value,
        fewstep.sinkhorn(None, None, C=C, eps=0.1, reach=0.5).value,
    )


def test_warm_start_stops_at_once() -> None:
    data = clouds((2, 20, 14, 2))
    options = {"eps": 1.0, "tol": 1e-6, "max_iter": 2000}
    for update in ("alternating", "symmetric"):
        first = fewstep.sinkhorn(**data, update=update, **options)
        again = fewstep.sinkhorn(**data, update=update, init=(first.f, first.g), **options)
        assert first.converged.all()
        assert (first.iterations > 5).all()
        assert (again.iterations == 1).all()


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


X, Y = torch.zeros(4, 2), torch.zeros(3, 2)
CU = torch.tensor([0, 2, 4]), torch.tensor([0, 2, 3])
LABELS = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 0, 1])
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reach": 0.0}, ValueError, r"reach must be positive, got 0.0"),
    ({"reach": (1.0, -2.0)}, ValueError, r"reach must be positive, got -2.0"),
    ({"reach": (1.0, 2.0, 3.0)}, ValueError, r"reach must be a number or a pair, got \(1.0"),
    ({"reach": 1.0, "a": torch.zeros(4)}, ValueError, r"a must have mass, got a sum of 0.0"),
    ({"a": 2 * torch.ones(4)}, ValueError, r"a must sum to 1, got a sum of 8.0"),
    ({"anneal": 1.5}, ValueError, r"anneal must be a factor in \(0, 1\), got 1.5"),
    ({"anneal": [1.0, -0.5]}, ValueError, r"anneal must be positive and finite, got -0.5"),
    ({"anneal": torch.ones(2, 2)}, ValueError, r"anneal must be .* got \(2, 2\)"),
    ({"update": "both"}, ValueError, r"update must be one of .* got 'both'"),
    ({"relax": 2.0}, ValueError, r"relax must be above 0 and below 2, got 2.0"),
    ({"relax": 1.5, "update": "symmetric"}, ValueError, r"relax must be 1 with .* got 1.5"),
    ({"memory_limit": -1}, ValueError, r"memory_limit must not be negative, got -1"),
    ({"precision": "tf16"}, ValueError, r"sinkhorn: precision must be one of .*, got 'tf16'"),
    ({"eps": []}, ValueError, r"eps must have a temperature, got \(0,\)"),
    ({"eps": [0.1, 0.0]}, ValueError, r"eps must be positive and finite, got 0.0"),
    ({"exclude_diagonal": 0, "y": Y[:1]}, ValueError, r"exclude_diagonal needs two .* got 4 and 1"),
    ({"C": torch.zeros(4, 3)}, ValueError, r"x must be None with a cost matrix C"),
    ({"x": None, "y": None}, TypeError, r"x must be a Tensor, got NoneType"),
    ({"x": None, "y": None, "C": torch.zeros(4)}, ValueError, r"C must be .* got \(4,\)"),
    ({"labels": LABELS}, ValueError, r"label_cost must be given with its counterpart"),
    ({"label_cost": torch.zeros(2, 3)}, ValueError, r"labels must be given with its counterpart"),
    (
        {"labels": LABELS, "label_cost": torch.zeros(2, 2)},
        ValueError,
        r"labels ly must be from 0 to 1 for this label_cost, got 2",
    ),
    (
        {"labels": (LABELS[0] - 1, LABELS[1]), "label_cost": torch.zeros(2, 3)},
        ValueError,
        r"labels lx must be from 0 to 1 for this label_cost, got -1",
    ),
    (
        {"labels": LABELS[::-1], "label_cost": torch.zeros(3, 3)},
        ValueError,
        r"labels lx must be int64 \(4,\), got torch.int64 \(3,\)",
    ),
    (
        {"labels": LABELS, "label_cost": torch.zeros(6)},
        ValueError,
        r"label_cost must be a floating \[L, L'\], got torch.float32 \(6,\)",
    ),
    ({"cu_seqlens": (CU[0].float(), CU[1])}, TypeError, r"cu_x must be an int64 Tensor"),
    ({"cu_seqlens": (CU[0], CU[1][:2])}, ValueError, r"cu_y must be \[B \+ 1\] .* got \(2,\)"),
    (
        {"cu_seqlens": (torch.tensor([0, 3, 2, 4]), torch.tensor([0, 1, 2, 3]))},
        ValueError,
        r"cu_x must rise from 0 to the number of points, 4, got \[0, 3, 2, 4\]",
    ),
    (
        {"cu_seqlens": (torch.tensor([1, 4]), torch.tensor([0, 3]))},
        ValueError,
        r"cu_x must rise from 0 to the number of points, 4, got \[1, 4\]",
    ),
    (
        {"cu_seqlens": (torch.tensor([0, 4, 4]), torch.tensor([0, 1, 3]))},
        ValueError,
        r"both sides of a problem 1 or more points, or none, got 0 and 2 in problem 1",
    ),
    (
        {"x": X[None], "y": Y[None], "cu_seqlens": CU},
        ValueError,
        r"cu_seqlens needs flat x \[N, D\], got \(1, 4, 2\)",
    ),
    ({"cost": "l1", "backend": "triton"}, ValueError, r"'triton' cannot serve .* no cost 'l1'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_options(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "y": Y, "eps": 0.1} | change
    with pytest.raises(error, match=message):
        fewstep.sinkhorn(arguments.pop("x"), arguments.pop("y"), **arguments)


def test_results_without_points_or_of_several_shapes_say_so() -> None:
    given_costs = fewstep.sinkhorn(None, None, C=torch.rand(4, 3), eps=0.1)
    with pytest.raises(ValueError, match="barycenter: needs points"):
        given_costs.barycenter()
    flat = fewstep.sinkhorn(X, Y, eps=0.1, cu_seqlens=CU)
    with pytest.raises(ValueError, match="plan: ragged problems"):
        flat.plan()


def test_compiles_into_one_graph() -> None:
    cu = torch.tensor([0, 3, 7]), torch.tensor([0, 5, 7])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        flat = fewstep.sinkhorn(x, y, eps=[0.5, 1.0], max_iter=5, reach=2.0, cu_seqlens=cu)
        whole = fewstep.sinkhorn(x, y, eps=0.7, anneal=0.5, update="symmetric", max_iter=3)
        return flat.value.sum() + whole.value + flat.barycenter().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    x, y = torch.randn(7, 3, requires_grad=True), torch.randn(7, 3)
    (expected,) = torch.autograd.grad(loss(x, y), x)
    (grad,) = torch.autograd.grad(compiled(x, y), x)
    assert torch.allclose(grad, expected, rtol=1e-5, atol=1e-6)
